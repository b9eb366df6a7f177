"""Copies of parameters and gradients that communication needs, and what travels.

FSDP2 gathers a block's parameters for its forward and again for its backward, where it gathers the block before it at
the same time; the root's stay from forward to backward. A group's gradients are whole until its last one is there; then
they are copied into one float32 tensor, padded to equal shares, and reduced. DDP copies all gradients into buckets.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

from torch import nn

from lowbit_lightning.memory.run import Run
from lowbit_lightning.memory.step import Reduction
from lowbit_lightning.sharding import (
    chosen_blocks,
    first_share,
    grouped,
    int8_share,
    padded,
    travels_in_int8,
)

Group = list[nn.Parameter]


@dataclass(frozen=True)
class Copies:
    """What communication needs on a device.

    ``gathered``, ``reduction``: bytes of gathered parameters, and of gradients that are being reduced.
    ``communication``: bytes of each collective in a step. ``reductions``: gradients that are reduced together.
    """

    gathered: int = 0
    reduction: int = 0
    communication: dict[str, int] = field(default_factory=dict)
    reductions: tuple[Reduction, ...] = ()


def copies_of(twin: nn.Module, run: Run) -> Copies:
    """What the run's model, which lies on the meta device, needs."""
    buffers = sum(b.nbytes for b in twin.buffers())  # DDP sends rank 0's before the first forward of a step
    if run.strategy == "ddp":
        buckets = sum(p.nbytes for p in twin.parameters() if p.requires_grad)
        return Copies(reduction=buckets, communication={"all_reduce": buckets, "broadcast": buffers})
    return _sharded(twin, run, buffers * run.accumulate) if run.sharded else Copies()


def _sharded(twin: nn.Module, run: Run, buffers: int) -> Copies:
    blocks, root = grouped(twin, chosen_blocks(twin, run.policy))
    names, ranks, cast = {p: name for name, p in twin.named_parameters()}, run.ranks, run.autocast

    def whole(p: nn.Parameter) -> int:
        dtype = cast if cast and p.is_floating_point() else p.dtype
        return padded(tuple(p.shape), ranks) * dtype.itemsize

    def packed(p: nn.Parameter) -> int:  # stays beside the whole parameter, as long as that does
        if run.all_gather != "int8" or not travels_in_int8(tuple(p.shape)):
            return 0
        return ranks * int8_share(first_share(tuple(p.shape), ranks)[0], prod(p.shape[1:]))[1]

    def gather(group: Group) -> int:
        return sum(packed(p) or whole(p) for p in group)

    def kept(group: Group) -> int:
        return sum(packed(p) + whole(p) for p in group)

    def reduction(group: Group) -> Reduction:
        trained = [p for p in group if p.requires_grad]
        shards = {names[p]: first_share(tuple(p.shape), ranks) for p in trained}
        return Reduction(shards, sum(padded(tuple(p.shape), ranks) * 4 for p in trained))

    sizes, reductions = [kept(group) for group in blocks], [reduction(group) for group in (*blocks, root)]
    in_float32, again = sum(r.bytes for r in reductions), 2 if run.reshard_after_forward else 1
    travels = {
        "all_gather": run.accumulate * (gather(root) + again * sum(gather(group) for group in blocks)),
        "reduce_scatter": in_float32,
        "broadcast": buffers,
    }
    if run.replicas > 1:
        travels["all_reduce"] = in_float32 // ranks
    return Copies(
        gathered=kept(root) + sum(sorted(sizes)[-2:] if run.reshard_after_forward else sizes),
        reduction=max(r.bytes for r in reductions) + (in_float32 if run.accumulate > 1 else 0),
        communication=travels,
        reductions=tuple(r for r in reductions if r.shards),
    )
