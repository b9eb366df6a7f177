"""Checks of a checkpoint's description of itself, before anything is loaded.

DeepSpeed matches the saved groups with those of the run by number, and leaves states without a match unchanged. So
parameters whose states were saved in another group would continue from zeros. To prevent that, a checkpoint names the
parameters of its groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from lowbit_lightning.optim import LowBitOptimizer

FOLDER = "checkpoint"  # the folder inside a checkpoint's folder, which Lightning names
CONVERTED = "latest_universal"  # the file in which DeepSpeed's converter names the folder that it made
OURS = "lowbit_lightning"  # the key of this library's entries

Groups = Sequence[Sequence[str]]
"""The names of the parameters of each group."""


def read(path: Path) -> dict[str, Any] | None:
    """What rank 0 saved beside the optimizers' states; None if there is no such file. Weights stay on the disk.

    Stage 3 has another file than stages 1 and 2. Where one checkpoint was saved over the other, the newer counts."""
    files = sorted((path / FOLDER).glob("*mp_rank_00_model_states.pt"), key=lambda file: file.stat().st_mtime_ns)
    return torch.load(files[-1], mmap=True, map_location="cpu", weights_only=False) if files else None


def read_groups(path: Path) -> list[dict[str, Any]]:
    """The hyperparameters of each group, from the output of DeepSpeed's converter."""
    file = path / (path / CONVERTED).read_text().strip() / "zero" / "optimizer_state.pt"
    return torch.load(file, mmap=True, map_location="cpu", weights_only=False)["param_groups"]


def check_stage(path: Path, saved: dict[str, Any], stage: int) -> None:
    """Check that DeepSpeed can load the checkpoint at this run's stage.

    Raises:
        ValueError: if one of the two stages is 3 and the other is not.
    """
    theirs = saved["ds_config"]["zero_optimization"]["stage"]
    if (theirs == 3) != (stage == 3):
        raise ValueError(
            f"{path} was saved at stage {theirs}, and DeepSpeed can't load it at stage {stage}: use stage={theirs}, or "
            "the weights alone, by lightning.pytorch.utilities.deepspeed.convert_zero_checkpoint_to_fp32_state_dict"
        )


def check_groups(path: Path, saved: dict[str, Any], groups: Groups, split: bool) -> None:
    """Check that the checkpoint's groups hold the same parameters as this run's.

    Args:
        saved: the result of ``read``.
        groups: the groups of this run.
        split: whether some groups were split off (``groups.py``); no other strategy does that.

    Raises:
        ValueError: if the groups differ.
    """
    ours = saved.get(OURS)
    same = not split if ours is None else list(map(sorted, ours["groups"])) == list(map(sorted, groups))
    if not same:
        by = "another strategy" if ours is None else f"optimizer_bits={ours['optimizer_bits']}"
        raise ValueError(
            f"{path} was saved with {by}, in other groups of parameters than this run's. optimizer_bits=8 splits "
            "vectors and embeddings off; 32 and None leave the groups of configure_optimizers as they are, and so do "
            "other strategies: choose what it was saved with"
        )


def missed_by_converter(optimizer: Optimizer) -> list[str]:
    """The names of an optimizer's states if DeepSpeed's converter would drop some of them, or fail; otherwise an empty
    list. The converter expects exactly ``exp_avg`` and ``exp_avg_sq``."""
    if isinstance(optimizer, LowBitOptimizer):
        names = {state.name for group in optimizer.param_groups for state in optimizer.rule_of(group).states}
    else:
        names = {name for entries in optimizer.state.values() for name in entries} - {"step"}
    return [] if names in (set(), {"exp_avg", "exp_avg_sq"}) else sorted(names)
