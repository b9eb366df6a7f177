"""What the parts of the CUDA backend share."""

from __future__ import annotations

import torch

CPP_TYPES = {torch.float32: "float", torch.float16: "Half", torch.bfloat16: "BFloat16"}
"""A dtype's name in ``src/gpu.h``."""


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
