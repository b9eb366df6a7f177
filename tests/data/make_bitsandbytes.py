"""Writes ``bitsandbytes.pt``: checkpoints as bitsandbytes' own optimizers save them, for tests/state.

Made with bitsandbytes 0.50.2 on a CPU; run it again where bitsandbytes is installed to try another version:
``python tests/data/make_bitsandbytes.py``.
"""

from __future__ import annotations

from pathlib import Path

import bitsandbytes
import torch

SHAPES = {
    "AdamW8bit": ((8, 512), (33, 130), (20,)),
    "SGD8bit": ((8, 512),),
    "AdEMAMix8bit": ((8, 512),),
}
OPTIONS = {"SGD8bit": {"lr": 0.1, "momentum": 0.8, "dampening": 0.3}}

saved = {}
for name, shapes in SHAPES.items():
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = getattr(bitsandbytes.optim, name)(params, **OPTIONS.get(name, {}))
    for _ in range(5):
        for p in params:
            p.grad = torch.randn(p.shape)
        optimizer.step()
    saved[name] = optimizer.state_dict()
path = Path(__file__).with_name("bitsandbytes.pt")
torch.save(saved, path)
print(f"{path}: {path.stat().st_size} bytes")
