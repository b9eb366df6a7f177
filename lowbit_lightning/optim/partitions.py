"""Flat partitions: what DeepSpeed's ZeRO hands an optimizer in place of the model's parameters.

ZeRO lays the parameters of a group end to end in float32, cuts the vector into one piece per rank, and puts its piece
into ``group["params"]``: a plain 1-D tensor, no ``nn.Parameter``. What follows from that, with Lightning or without:

- Saved states are float32 under their 32-bit names: DeepSpeed's converter to universal checkpoints takes ``exp_avg``
  and ``exp_avg_sq`` for float32 values. Loading quantises them, to the same codes.
- Loading a universal checkpoint writes such values straight into ``optimizer.state``, beside codes of before, and one
  ``step`` tensor for several partitions, on the CPU. The next step takes that over.
- Trust ratios need the norms of layers, which a partition hasn't got.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from lowbit_lightning.kernels.rules import Rule
from lowbit_lightning.state import shards


def is_partition(p: Tensor) -> bool:
    plain = not isinstance(p, nn.Parameter) and not shards.is_sharded(p)
    return plain and p.ndim == 1 and "deepspeed" in sys.modules


def are_partitions(params: Sequence[Tensor]) -> bool:
    return bool(params) and all(map(is_partition, params))


def share_of_machine(p: Tensor, known: float | None) -> float:
    """How much of p's states will lie on this machine: all of what is cut already; of what ZeRO will cut, ``known``.

    None, where no strategy says: all, unless DeepSpeed has set up its communication, so that ZeRO is taken to follow.
    Then the part of the ranks that the launcher says it started here, or of one, the least that it can be.
    """
    if shards.is_sharded(p) or is_partition(p):
        return 1.0
    if known is not None:
        return known
    comm: Any = sys.modules.get("deepspeed.comm")
    if comm is None or not comm.is_initialized():
        return 1.0
    ranks = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1
    return min(1.0, int(ranks) / dist.get_world_size())


def check_rule(rule: Rule, params: Sequence[Tensor]) -> None:
    """
    Raises:
        ValueError: for a rule with trust ratios. (Not for the vectors of DeepSpeed's stage 0, whose float32 copies
            look like partitions: its matrices do not.)
    """
    if rule.norms and are_partitions(params):
        raise ValueError(
            f"{rule.name} needs the norm of each layer, and DeepSpeed's flat partitions have no layers: use AdamW or "
            "SGD here, or FSDP2 (strategy='lowbit_sharded'), which keeps layers apart"
        )
