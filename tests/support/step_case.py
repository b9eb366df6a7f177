"""An optimizer step with all its arguments in one place, which the tests of kernels change as they like."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from lowbit_lightning import kernels
from lowbit_lightning.kernels import StepArguments, StepScalars


@dataclass
class StepCase:
    """The fields of ``StepArguments``, the gradients, and the fields of ``StepScalars``."""

    rule: str
    params: list[Tensor]
    grads: list[Tensor]
    steps: list[Tensor]
    states: list[list[Tensor]]
    scales: list[list[Tensor]]
    hyper: list[float]
    block_size: int = 256
    lr: Tensor | None = None
    unscale: Tensor | None = None
    clip: Tensor | None = None
    skip: Tensor | None = None
    seed: int = 0
    ordinals: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    maximize: bool = False
    stochastic_rounding: bool = False
    remainders: list[Tensor] = field(default_factory=list)

    @property
    def arguments(self) -> StepArguments:
        return StepArguments(**{name: getattr(self, name) for name in StepArguments.__dataclass_fields__})

    @property
    def scalars(self) -> StepScalars:
        return StepScalars(**{name: getattr(self, name) for name in StepScalars._fields})

    def step(self, norms: Tensor | None = None) -> None:
        kernels.optimizer_step(self.arguments, self.grads, self.scalars, norms)

    def norms(self) -> Tensor:
        return kernels.optimizer_norms(self.arguments, self.grads, self.scalars)
