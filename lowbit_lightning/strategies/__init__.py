"""Strategies for many ranks: ``ShardedStrategy``, ``strategy="lowbit_sharded"``."""

from __future__ import annotations

from lightning.pytorch.strategies import StrategyRegistry

from lowbit_lightning.strategies.checkpoints import AtomicCheckpointIO, consolidate
from lowbit_lightning.strategies.sharded import NAME, ShardedStrategy

__all__ = ["AtomicCheckpointIO", "ShardedStrategy", "consolidate", "register"]


def register() -> None:
    """Make ``lightning.Trainer`` know ``strategy="lowbit_sharded"``; idempotent."""
    if NAME not in StrategyRegistry:
        StrategyRegistry.register(NAME, ShardedStrategy, description="FSDP2 with 8-bit optimizer states")
