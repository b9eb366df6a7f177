"""How each op would run on each device, without compiling anything: the table of op x device.

Every case is called once with a compiler that refuses. What comes through is in the cache; what asks for the compiler
would be compiled on first use; what the backend leaves to the reference is said to be so.
"""

from __future__ import annotations

import warnings
from typing import Any

CACHED, COMPILED, FIRST_USE, REFERENCE = "cached", "compiled", "on first use", "reference"
LIMIT = 60.0


class _NotCachedError(Exception):
    """A kernel would have to be compiled."""


def devices() -> list[str]:
    """``["cpu", "cuda:0", ...]``, as torch sees them."""
    import torch

    return ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0))]


def gather() -> list[dict[str, Any]]:
    """In a child, for each device: ``{"device", "name", "backend", "why", "ops": {op: {state: number of cases}},
    "engines": {op: how it runs, where there are several ways}}``."""
    import torch

    from lowbit_command.doctor.cases import cases

    torch.set_num_threads(1)  # inputs are small
    _refuse_to_compile()
    found = []
    for device in devices():
        ops: dict[str, dict[str, int]] = {}
        backend, why = backend_of(device)
        for case in cases():
            states = ops.setdefault(case.op, {})
            state = REFERENCE if runs_reference(backend, case.op) else _state(case, device)
            states[state] = states.get(state, 0) + 1
        about = {"device": device, "name": _name(device), "backend": backend, "why": why, "ops": ops}
        found.append({**about, "engines": {op: said for op in ops if (said := engine(op, device))}})
    return found


def engine(op: str, device: str) -> str:
    """By which instructions or kernel a device runs an op, if it is in the cache and there are several ways; or ""."""
    import torch

    from lowbit_lightning.kernels import dispatch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return dispatch.engine(op, torch.device(device))
    except _NotCachedError:
        return ""


def backend_of(device: str) -> tuple[str, str]:
    """The backend that serves a device, and the warning that says why it is the reference, or ""."""
    import torch

    from lowbit_lightning.kernels import dispatch

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        backend = dispatch.backend_of(torch.device(device).type)
    return backend, str(said[0].message) if said else ""


def runs_reference(backend: str, op: str) -> bool:
    """Whether a backend leaves an op to the reference."""
    from lowbit_lightning.kernels import dispatch

    return backend == "reference" or ".reference." in dispatch.function(backend, op).__module__


def _state(case: Any, device: str) -> str:
    import torch

    from lowbit_lightning.kernels import dispatch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case.run(torch.device(device))
    except _NotCachedError:
        return FIRST_USE
    return CACHED if dispatch.backend_of(torch.device(device).type) != REFERENCE else REFERENCE


def _refuse_to_compile() -> None:
    """In this process, for good."""
    from lowbit_lightning.kernels import compile

    def refuse(*_: Any) -> Any:
        raise _NotCachedError

    for name in ("_compile_host", "_compile_cuda"):
        setattr(compile, name, refuse)


def _name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device != "cpu" else "CPU"
