"""What to change first if a plan does not fit. Each change is planned separately."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lowbit_lightning.memory.result import Advice, Plan
from lowbit_lightning.memory.run import Run
from lowbit_lightning.sharding import repeated_blocks


@dataclass(frozen=True)
class _Change:
    text: str
    cost: str
    weight: float
    options: dict[str, Any]


def _changes(model: nn.Module, now: Run) -> list[_Change]:
    """The changes that are possible. ``weight``: the cost by which the saved bytes are divided."""
    many, changes = now.world_size > 1, []
    if isinstance(now.optimizer, (str, type)) and now.bits != 8:
        changes.append(_Change("bits=8", "optimizer states in 8 bits", 1, {"bits": 8}))
    if now.paged is False and (isinstance(now.optimizer, str) or now.sharded) and now.bits is not None:
        changes.append(_Change("paged=True", "states travel to the device and back in a step", 2, {"paged": True}))
    if many and not now.sharded:
        changes.append(
            _Change('strategy="sharded"', "parameters travel in forward and backward", 2, {"strategy": "sharded"})
        )
    if now.sharded and not now.reshard_after_forward:
        cost = "a second all-gather of each block"
        changes.append(_Change("reshard_after_forward=True", cost, 1.5, {"reshard_after_forward": True}))
    if now.replicas > 1:
        changes.append(_Change("replicas=1", "gathers among all ranks", 2, {"replicas": 1}))
    more = {"world_size": 2 * now.world_size, "strategy": "sharded"}
    changes.append(_Change(f"{2 * now.world_size} ranks, sharded", "twice the devices", 4, more))
    if now.precision in ("32-true", "bf16-mixed") and any(type(m) is nn.Linear for m in model.modules()):
        changes.append(_Change('precision="int8-mixed"', "matmuls in int8", 1.5, {"precision": "int8-mixed"}))
    if now.precision == "32-true":
        changes.append(_Change('precision="bf16-mixed"', "activations in bfloat16", 1.2, {"precision": "bf16-mixed"}))
    if now.precision != "bf16-true" and isinstance(now.optimizer, str) and now.bits is not None:
        master = {"precision": "bf16-true", "master": "bf16+8", "int8": {}}
        changes.append(_Change('precision="bf16-true", master="bf16+8"', "weights of 24 bits", 2, master))
    if not now.release_gradients and now.accumulate == 1 and now.strategy != "ddp":
        release = {"release_gradients": True}
        changes.append(_Change("release_gradients=True", "no accumulation, no clipping by norm", 2, release))
    if not now.activation_checkpointing and now.batch is not None and repeated_blocks(model):
        checkpointing = {"activation_checkpointing": True}
        changes.append(_Change("activation_checkpointing=True", "about a third more time", 3, checkpointing))
    return changes


def advise(model: nn.Module, now: Run, plan: Callable[[Run], Plan], memory: int) -> list[Advice]:
    """The changes that save memory, sorted by bytes saved divided by cost. ``plan``: of another run."""
    before, found = plan(now).total, []
    for change in _changes(model, now):
        try:
            after = plan(replace(now, **change.options))
        except (ValueError, TypeError):  # a change that this model or optimizer does not allow
            continue
        if after.total < before:
            advice = Advice(change.text, change.cost, before - after.total, after.fits(memory))
            found.append((advice.saves / change.weight, advice))
    return [advice for _, advice in sorted(found, key=lambda pair: -pair[0])]
