"""A process in which bitsandbytes can't be imported: loads what others saved (``arguments.json`` in a folder that is
given) and writes what the models compute to ``found.pt``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from support.hub_models import tokens


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens()).logits.float()


def main(folder: Path) -> None:
    for absent in ("bitsandbytes", "deepspeed"):  # the second one is slow to import, and not needed
        sys.modules[absent] = None  # type: ignore[assignment]
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from lowbit_lightning.integrations.transformers import load_bitsandbytes

    given = json.loads((folder / "arguments.json").read_text())
    found = {}
    for kind in ("nf4-dq", "int8"):
        loaded = load_bitsandbytes(AutoModelForCausalLM, given[kind], dtype=torch.float32)
        loaded.num_parameters()
        found[kind] = logits(loaded)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(given["model"]), given["adapter"])
    found["adapter"] = logits(model)
    found["merged"] = logits(model.merge_and_unload())
    torch.save(found, folder / "found.pt")


torch.set_num_threads(1)
main(Path(sys.argv[1]))
