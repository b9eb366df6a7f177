"""What a checkpoint says about itself, asked before anything of it is loaded.

DeepSpeed pairs the saved groups with a run's by their numbers, and leaves what has no partner as it is: parameters
whose states were saved in another group would go on from zeros. So a checkpoint says which parameters its groups hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from lowbit_lightning.optim import LowBitOptimizer

FOLDER = "checkpoint"  # Lightning's tag: the folder inside a checkpoint's folder
CONVERTED = "latest_universal"  # where DeepSpeed's converter leaves the name of the folder it has made
OURS = "lowbit_lightning"  # what we add to a checkpoint

Groups = Sequence[Sequence[str]]
"""The names of the parameters of each group."""


def read(path: Path) -> dict[str, Any] | None:
    """What rank 0 saved beside states of optimizers; weights stay on the disk. None where there is none to be read."""
    files = sorted((path / FOLDER).glob("*mp_rank_00_model_states.pt"))
    return torch.load(files[0], mmap=True, map_location="cpu", weights_only=False) if files else None


def read_groups(path: Path) -> list[dict[str, Any]]:
    """The hyperparameters of each group, from what DeepSpeed's converter made."""
    file = path / (path / CONVERTED).read_text().strip() / "zero" / "optimizer_state.pt"
    return torch.load(file, mmap=True, map_location="cpu", weights_only=False)["param_groups"]


def check_stage(path: Path, saved: dict[str, Any], stage: int) -> None:
    """
    Raises:
        ValueError: where one of the checkpoint's stage and this run's is 3 and the other is not.
    """
    theirs = saved["ds_config"]["zero_optimization"]["stage"]
    if (theirs == 3) != (stage == 3):
        raise ValueError(
            f"{path} was saved at stage {theirs}, and DeepSpeed can't load it at stage {stage}: use stage={theirs}, or "
            "the weights alone, by lightning.pytorch.utilities.deepspeed.convert_zero_checkpoint_to_fp32_state_dict"
        )


def check_groups(path: Path, saved: dict[str, Any], groups: Groups, split: bool) -> None:
    """
    Args:
        saved: what ``read`` returned.
        groups: this run's.
        split: whether some were split off (``groups.py``); no other strategy does that.

    Raises:
        ValueError: where the checkpoint's are others.
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
    """The states of an optimizer, if DeepSpeed's converter would drop some of them, or fail: it takes ``exp_avg`` and
    ``exp_avg_sq`` for all there are."""
    if isinstance(optimizer, LowBitOptimizer):
        names = {state.name for group in optimizer.param_groups for state in optimizer.rule_of(group).states}
    else:
        names = {name for entries in optimizer.state.values() for name in entries} - {"step"}
    return [] if names in (set(), {"exp_avg", "exp_avg_sq"}) else sorted(names)
