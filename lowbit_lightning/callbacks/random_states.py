"""The states of the global random generators: torch's, numpy's and Python's."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

State = dict[str, Any]


def get(device: torch.device) -> State:
    """The states of torch's generator on the CPU and on ``device``, of numpy's and of Python's: tensors and tuples,
    which ``torch.load(weights_only=True)`` reads."""
    numpy_state: Any = np.random.get_state(legacy=False)
    key = torch.from_numpy(numpy_state["state"]["key"].astype(np.int64))
    state = {
        "torch": torch.get_rng_state(),
        "numpy": (key, numpy_state["state"]["pos"], numpy_state["has_gauss"], numpy_state["gauss"]),
        "python": random.getstate(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def put_back(state: State, device: torch.device) -> None:
    """Set all generators to states that ``get`` returned."""
    torch.set_rng_state(state["torch"])
    key, pos, has_gauss, gauss = state["numpy"]
    np.random.set_state(("MT19937", key.numpy().astype(np.uint32), pos, has_gauss, gauss))
    random.setstate(state["python"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
