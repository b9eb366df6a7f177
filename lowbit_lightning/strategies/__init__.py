"""Strategies for many ranks: FSDP2 (``"lowbit_sharded"``) and DeepSpeed (``"lowbit_deepspeed_stage_2"``)."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import StrategyRegistry

from lowbit_lightning.strategies import deepspeed
from lowbit_lightning.strategies.checkpoints import AtomicCheckpointIO, consolidate
from lowbit_lightning.strategies.deepspeed import DeepSpeedStrategy, check_deepspeed
from lowbit_lightning.strategies.sharded import NAME, ShardedStrategy

__all__ = [
    "AtomicCheckpointIO",
    "DeepSpeedStrategy",
    "ShardedStrategy",
    "check_deepspeed",
    "consolidate",
    "register",
]

_STAGES: dict[str, dict[str, Any]] = {
    "stage_1": {"stage": 1},
    "stage_2": {"stage": 2},
    "stage_3": {"stage": 3},
    "stage_2_offload": {"stage": 2, "offload_optimizer": True},
    "stage_3_offload": {"stage": 3, "offload_optimizer": True, "offload_parameters": True},
    "stage_2_paged": {"stage": 2, "paged": True},
    "stage_3_paged": {"stage": 3, "paged": True},
}


def register() -> None:
    """Make ``lightning.Trainer`` know the strategies by name; idempotent."""
    if NAME not in StrategyRegistry:
        StrategyRegistry.register(NAME, ShardedStrategy, description="FSDP2 with 8-bit optimizer states")
    if f"{NAME}_paged" not in StrategyRegistry:
        description = "FSDP2 with 8-bit optimizer states in host memory"
        StrategyRegistry.register(f"{NAME}_paged", ShardedStrategy, description=description, paged=True)
    for suffix, arguments in _STAGES.items():
        name = f"{deepspeed.NAME}_{suffix}"
        if name not in StrategyRegistry:
            description = f"DeepSpeed with 8-bit optimizer states: {arguments}"
            StrategyRegistry.register(name, DeepSpeedStrategy, description=description, **arguments)
