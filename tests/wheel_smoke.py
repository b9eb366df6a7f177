"""Run by ``make wheel`` with the interpreter of a clean environment that holds nothing but the built wheel.

Not collected by pytest: it has to see the installed package, never the checkout.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import torch

import lowbit_lightning
from lowbit_lightning import kernels

assert sys.prefix in (lowbit_lightning.__file__ or ""), f"imported the checkout: {lowbit_lightning.__file__}"
sources = {
    f.name.rsplit(".", 1)[-1] for f in files("lowbit_lightning.kernels").joinpath("src").iterdir() if f.is_file()
}
assert {"h", "cpp", "cu"} <= sources, f"kernel sources missing from the wheel: it has {sorted(sources)}"

x = torch.randn(8, 512)
codes, scales = kernels.quantize_blockwise(x)
back = kernels.dequantize_blockwise(codes, scales)
error = ((back - x).norm() / x.norm()).item()
assert error < 0.05, f"relative error {error:.3g} after one round trip"
command = Path(sys.prefix) / "bin" / "lowbit"
said = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout
assert lowbit_lightning.__version__ in said, said
print(f"wheel: imports from {sys.prefix}, round-trip error {error:.4f}, kernels {kernels.calls()}")
