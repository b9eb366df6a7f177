"""States of optimizers under DeepSpeed, as ``deepspeed_ranks.py`` looks at them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lowbit_lightning import kernels


def picture(trainer: Any) -> list[dict[str, Tensor]]:
    """This rank's states, a group after the other."""
    return [
        {k: torch.as_tensor(x).clone() for k, x in entries.items()} for entries in trainer.optimizers[0].state.values()
    ]


def equal(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> str | None:
    for i, (x, y) in enumerate(zip(found, expected, strict=True)):
        if x.keys() != y.keys():
            return f"group {i} has {sorted(x)}, not {sorted(y)}"
        for name in x:
            if x[name].dtype != y[name].dtype or not torch.equal(x[name], y[name]):
                return f"group {i}: {name} differs"
    return None


def nbytes(states: list[dict[str, Tensor]]) -> int:
    return sum(x.nbytes for entries in states for x in entries.values())


class Compare(L.Callback):
    """Loaded states with DeepSpeed's universal files, a parameter after the other."""

    def __init__(self, folder: Path, stage: int) -> None:
        self.folder, self.stage, self.problem = folder, stage, "nothing was compared"

    def on_train_start(self, trainer: Any, module: L.LightningModule) -> None:
        found = list(self._problems(trainer, module))
        self.problem = next((p for p in found if p), "" if len(found) > 8 else f"only {len(found)} were compared")

    def _problems(self, trainer: Any, module: L.LightningModule) -> Iterator[str | None]:
        zero = trainer.optimizers[0]
        for name, start, count, flat, offset in pieces(zero, module, self.stage):
            for key, codebook in (("exp_avg", "dynamic_signed"), ("exp_avg_sq", "dynamic_unsigned")):
                saved = torch.load(self.folder / name / f"{key}.pt", weights_only=False)
                saved = (saved["param"] if isinstance(saved, dict) else saved).flatten()[start : start + count]
                entries, matrix = zero.state[flat], name.startswith(("head", "blocks")) and "norm" not in name
                problem = within_a_code(entries, key, codebook, offset, saved)
                if (f"{key}_codes" in entries) != (matrix and name.endswith("weight")) or len(saved) != count:
                    problem = f"{sorted(entries)}, {len(saved)} of {count}"
                yield problem and f"{name} {key}: {problem}"


def pieces(zero: Any, module: nn.Module, stage: int) -> Iterator[tuple[str, int, int, Tensor, int]]:
    """What this rank holds: a parameter's name, the range of its elements, and where they lie in which partition."""
    names = {p: name for name, p in module.named_parameters()}
    if stage < 3:
        for i, group in enumerate(zero.bit16_groups):
            for p in group:
                if p._hp_mapping is not None:
                    here, there = p._hp_mapping.lp_fragment_address, p._hp_mapping.hp_fragment_address
                    yield names[p], here.start, here.numel, zero.single_partition_of_fp32_groups[i], there.start
        return
    for i, group in enumerate(zero.fp16_groups):
        offset = 0
        for p in group:
            share, start = p.partition_numel(), p.partition_numel() * dist.get_rank()
            yield names[p], start, max(0, min(share, p.ds_numel - start)), zero.fp32_partitioned_groups_flat[i], offset
            offset += share


def within_a_code(entries: Any, key: str, codebook: str, offset: int, saved: Tensor) -> str | None:
    part = slice(offset, offset + len(saved))
    if key in entries:
        return None if torch.equal(entries[key][part], saved) else "32-bit values differ"
    codes, scales = entries[f"{key}_codes"], entries[f"{key}_scales"]
    below, above = (
        kernels.dequantize_blockwise((codes.int() + step).clamp(0, 255).byte(), scales, codebook, 256)
        for step in (-1, 1)
    )
    if codebook == "dynamic_signed":  # its last code is -0.993, and stands for -1 too
        below = torch.where(codes == 0, -scales[0].repeat_interleave(256)[: len(codes)], below)
    low, high = torch.minimum(below, above)[part], torch.maximum(below, above)[part]
    bad = (saved < low) | (saved > high)
    return f"{int(bad.sum())} of {len(saved)} are further than a code away" if bad.any() else None
