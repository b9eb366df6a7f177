"""The arguments of ``plan``, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lowbit_lightning.memory import states
from lowbit_lightning.memory.step import Step
from lowbit_lightning.optim.options import parse_bytes
from lowbit_lightning.sharding import Policy

Strategy = Literal["single", "ddp", "sharded"]
Precision = Literal["32-true", "16-true", "bf16-true", "16-mixed", "bf16-mixed", "int8-mixed"]

_TRUE = {"16-true": torch.float16, "bf16-true": torch.bfloat16}
_AUTOCAST = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16, "int8-mixed": torch.bfloat16}
PRECISIONS = ("32-true", *_TRUE, *_AUTOCAST)
STRATEGIES = ("single", "ddp", "sharded")


@dataclass(frozen=True)
class Settings:
    """The arguments of ``plan``; it says what they are."""

    world_size: int
    strategy: str
    precision: str
    optimizer: states.Kind
    bits: int | None
    batch: Any
    step: Step | None
    accumulate: int
    reshard_after_forward: bool
    replicas: int
    policy: Policy | None
    activation_checkpointing: bool
    int8: Mapping[str, Any]
    all_gather: str
    paged: bool | str
    resident: int | str
    options: Mapping[str, Any]

    def check(self) -> None:
        _one_of("strategy", self.strategy, STRATEGIES)
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("bits", self.bits, (8, 32, None))
        for name in ("world_size", "accumulate", "replicas"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.strategy == "single" and self.world_size > 1:
            raise ValueError(f"world_size={self.world_size} needs strategy='ddp' or 'sharded', got 'single'")
        if not isinstance(self.reshard_after_forward, bool):
            raise ValueError(f"reshard_after_forward must be True or False, got {self.reshard_after_forward!r}")
        if self.world_size % self.replicas or (self.replicas > 1 and self.strategy != "sharded"):
            raise ValueError(
                f"replicas must divide world_size, {self.world_size}, and be 1 unless strategy='sharded'; "
                f"got {self.replicas}"
            )
        _one_of("all_gather", self.all_gather, ("high", "int8"))
        if self.all_gather == "int8" and not self.sharded:
            raise ValueError(f"all_gather='int8' needs strategy='sharded', got {self.strategy!r}: nothing is gathered")
        _one_of("paged", self.paged, (False, True, "disk"))
        if parse_bytes(self.resident) and not self.paged:
            raise ValueError(f"resident={self.resident!r} does nothing without paged=True or 'disk': leave it out")
        if self.int8 and self.precision != "int8-mixed":
            raise ValueError(f"int8={dict(self.int8)} does nothing under precision={self.precision!r}: leave it out")

    def dtype_of(self, tensor: Tensor) -> torch.dtype:
        """A parameter's or buffer's dtype in the run."""
        true = self.true_dtype
        return true if true and tensor.is_floating_point() else tensor.dtype

    @property
    def true_dtype(self) -> torch.dtype | None:
        """What the model is cast to, or None."""
        return _TRUE.get(self.precision)

    @property
    def autocast(self) -> torch.dtype | None:
        return _AUTOCAST.get(self.precision)

    @property
    def sharded(self) -> bool:
        return self.strategy == "sharded"

    @property
    def ranks(self) -> int:
        """The ranks that share out one copy of a parameter."""
        return self.world_size // self.replicas if self.sharded else 1

    def shown(self) -> dict[str, Any]:
        name = self.optimizer if isinstance(self.optimizer, (str, type)) else type(self.optimizer)
        shown: dict[str, Any] = {
            "world_size": self.world_size,
            "strategy": self.strategy,
            "precision": self.precision,
            "optimizer": name if isinstance(name, str) else name.__name__,
        }
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            shown["bits"] = self.bits
        if self.sharded:
            shown |= {"reshard_after_forward": self.reshard_after_forward, "replicas": self.replicas}
        if self.all_gather != "high":
            shown["all_gather"] = self.all_gather
        if self.paged:
            shown |= {"paged": self.paged, "resident": self.resident}
        return {**shown, "accumulate": self.accumulate, "activation_checkpointing": self.activation_checkpointing}


def _one_of(name: str, value: Any, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
