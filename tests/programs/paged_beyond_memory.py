"""Training with optimizer states that are larger than the memory which the process may have.

``paged_beyond_memory.py MODE LIMIT FOLDER``: MODE is "paged" or "plain"; LIMIT is RLIMIT_DATA in MiB, or 0 for none:
what of private writable memory the kernel lets a process map, its heap, allocations and stacks. Prints JSON: bytes of
the states, the losses, a hash of the trained parameters, and the kernel's accounts of the peak (VmHWM: resident memory
at its highest, files mapped into it included; VmData: what RLIMIT_DATA counts, at the end).
"""

from __future__ import annotations

import hashlib
import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_lightning import optim

LAYERS, WIDTH, STEPS = 24, 2048, 3


def account(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


def model() -> nn.Module:
    """100 M parameters in bfloat16: with their gradients 4 bytes each, beside 12 bytes of states."""
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16) for _ in range(LAYERS)]
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh())))


def train(options: dict[str, Any]) -> dict[str, Any]:
    net = model()
    optimizer = optim.AdamW(net.parameters(), lr=1e-4, bits=32, amsgrad=True, **options)
    losses = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(4, WIDTH, generator=generator).bfloat16()
        optimizer.zero_grad()
        loss: Tensor = (net(x) - x).float().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    digest = hashlib.sha256()
    for p in net.parameters():
        digest.update(p.detach().view(torch.int16).numpy().data)
    states = sum(3 * 4 * p.numel() for p in net.parameters())
    found = {name: account(name) for name in ("VmHWM", "VmData")}
    return {"states": states, "losses": losses, "digest": digest.hexdigest(), **found}


def main(mode: str, limit: int, folder: str) -> None:
    torch.set_num_threads(1)
    if limit:
        resource.setrlimit(resource.RLIMIT_DATA, (limit << 20, limit << 20))
    options: dict[str, Any] = {"paged": "disk", "resident": 0, "page_dir": folder} if mode == "paged" else {}
    print(json.dumps(train(options)))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
