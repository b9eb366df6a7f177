"""Flat partitions, which DeepSpeed's ZeRO gives an optimizer instead of the model's parameters.

ZeRO concatenates the parameters of a group in float32, cuts the vector into one piece per rank, and puts each rank's
piece into ``group["params"]``. It is a plain 1-D tensor, and not an ``nn.Parameter``. This has consequences, with
Lightning and without:

- States are saved as float32 under their 32-bit names, because DeepSpeed's converter to universal checkpoints expects
  float32 values in ``exp_avg`` and ``exp_avg_sq``. Loading quantises them to the same codes.
- Loading a universal checkpoint writes such values directly into ``optimizer.state``, beside the old codes. It also
  writes one ``step`` tensor on the CPU for several partitions. The next step takes them over.
- Trust ratios need the norms of layers, and a partition has no layers.
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
    """The share of p's states that will lie on this machine: 1 if p is sharded or a partition already, else ``known``.

    ``known``: what the strategy says; None if there is none. Then the share is 1, unless DeepSpeed has set up its
    communication, in which case ZeRO is expected to cut p. The launcher says how many of the ranks it started on this
    machine. If it does not, the share of one rank is returned, which is the least.
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
    """Check that the rule can update these parameters.

    Raises:
        ValueError: for a rule with trust ratios and parameters that are all partitions. (In DeepSpeed's stage 0 the
            float32 copies of vectors look like partitions, but those of matrices do not.)
    """
    if rule.norms and are_partitions(params):
        raise ValueError(
            f"{rule.name} needs the norm of each layer, and DeepSpeed's flat partitions have no layers: use AdamW or "
            "SGD here, or FSDP2 (strategy='lowbit_sharded'), which keeps layers apart"
        )
