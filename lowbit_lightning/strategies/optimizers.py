"""How strategies adapt the optimizers that ``configure_optimizers`` returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from lowbit_lightning import optim
from lowbit_lightning.optim.convert import has_twin


def adapt(optimizer: Optimizer, bits: int | None, paging: Mapping[str, Any], strategy: str) -> None:
    """Turn an optimizer of torch.optim into its twin, in place, unless ``bits`` is None. Set paging of a low-bit
    optimizer as ``paging`` (``paged``, ``resident``, ``page_dir``) says. A warning names what is left unchanged.

    Raises:
        ValueError, OSError: for states that cannot lie on the disk that ``paging`` names.
    """
    if bits is not None and has_twin(optimizer):
        optim.convert_(optimizer, bits=bits)
    if isinstance(optimizer, optim.LowBitOptimizer):
        if paging["paged"]:
            optimizer.check_pages([{**group, **paging} for group in optimizer.param_groups])
            for group in (optimizer.defaults, *optimizer.param_groups):  # groups that are added later take the defaults
                group.update(paging)
    elif paging["paged"] or bits is not None:
        why = "it has no low-bit twin, and is not paged. optimizer_bits=None, paged=False say that this is meant"
        if has_twin(optimizer):
            why = "optimizer_bits=None says so, and only low-bit optimizers are paged; optimizer_bits=32 makes it one"
        rank_zero_warn(f"{strategy} leaves {type(optimizer).__name__} as it is: {why}")
