"""GPUs whose tensor units multiply int8 slower than fp8. ``precision="int8-mixed"`` says so once.

Published dense peaks. On most GPUs int8 and fp8 have the same; docs/int8_mixed.md has the table.
"""

from __future__ import annotations

from functools import cache

import torch

WEAK = {(10, 3): ("B300", 0.15, 4.5, 2.25)}
"""Compute capability -> name, and 1e15 operations a second in int8, fp8 and bfloat16."""


@cache
def weakness(device: int) -> str | None:
    """What to know about int8 on a GPU, by its number; None if there is nothing. Asked once a process."""
    capability = torch.cuda.get_device_capability(device)
    if capability not in WEAK:
        return None
    name, int8, fp8, bfloat16 = WEAK[capability]
    major, minor = capability
    return (
        f"int8 is weak on GPUs of compute capability {major}.{minor} ({name}): {int8:g} POP/s, but {fp8:g} in fp8 and "
        f"{bfloat16:g} in bfloat16. precision='bf16-mixed' is faster, and so is training in fp8 (torchao, Transformer "
        "Engine). int8-mixed saves memory for activations, and leaves layers that are slower in int8 in high precision "
        "(swap='faster')"
    )
