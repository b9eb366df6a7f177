"""What whole recipes take in training: ``recipes.py FOLDER`` prints, for each, bytes a parameter as planned, as counted
by torch's allocator, and as resident memory; page files go to FOLDER.

The batch is small: what is compared is what a parameter costs.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from support.planned_memory import peak_of
from torch import nn

from lowbit_lightning import memory, optim

WIDTH, DEPTH = 1024, 24
RECIPES: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "32-true"},
    "bf16, rounded at random": {"precision": "bf16-true", "stochastic_rounding": True},
    "+ gradient release": {"precision": "bf16-true", "stochastic_rounding": True, "release_gradients": True},
    "+ states on disk": {
        **{"precision": "bf16-true", "stochastic_rounding": True, "release_gradients": True},
        "paged": "disk",
    },
}


def model() -> nn.Module:
    return nn.Sequential(*[nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh()) for _ in range(DEPTH)])


def memory_of_process(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def run(told: dict[str, Any], folder: str) -> Callable[[], None]:
    """A step of training. Nothing of it is left when that goes."""
    dtype = torch.bfloat16 if told["precision"] == "bf16-true" else torch.float32
    net, data = model().to(dtype), torch.randn(4, WIDTH, dtype=dtype)
    options: dict[str, Any] = {"stochastic_rounding": told.get("stochastic_rounding", False)}
    if "paged" in told:
        options |= {"paged": told["paged"], "page_dir": folder}
    optimizer = optim.AdamW(net.parameters(), **options)
    if told.get("release_gradients"):
        optim.release_gradients(net, optimizer)

    def step() -> None:
        optimizer.zero_grad()
        net(data).float().square().mean().backward()
        optimizer.step()

    return step


def resident(told: dict[str, Any], folder: str) -> dict[str, int]:
    """The most memory that the first step takes, and that later ones do, beyond what the process had before."""
    gc.collect()
    found, before = {}, memory_of_process("VmRSS")
    step = run(told, folder)
    for name, steps in (("first", 1), ("resident", 3)):
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        for _ in range(steps):
            step()
        found[name] = memory_of_process("VmHWM") - before
    return found


def main(folder: str) -> None:
    torch.set_num_threads(1)
    found, numbers = {}, WIDTH * WIDTH * DEPTH
    for told in RECIPES.values():
        peak_of(lambda told=told: run(told, folder))  # type: ignore[misc]  # kernels, code and pages of libraries
    for name, told in RECIPES.items():
        with torch.device("meta"):
            net = model()
        dtype = torch.bfloat16 if told["precision"] == "bf16-true" else torch.float32
        planned = memory.plan(
            net,
            batch=torch.empty(4, WIDTH, dtype=dtype, device="meta"),
            step=lambda net, x: net(x).float().square().mean(),
            **told,
        )
        counted = peak_of(lambda told=told: run(told, folder))  # type: ignore[misc]
        taken = {"planned": planned.total, "counted": counted, **resident(told, folder)}
        found[name] = {key: value / numbers for key, value in taken.items()} | {"fits": planned.needed / numbers}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
