"""The optimizer step on the GPU: src/optimizer_prepare.cu, then optimizer_step.cu or optimizer_norms.cu."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit_lightning.kernels import rules
from lowbit_lightning.kernels.arguments import StepArguments, StepScalars
from lowbit_lightning.kernels.cuda import launch
from lowbit_lightning.kernels.cuda.launch import Launch, ceil_div, geometry, shared_out
from lowbit_lightning.kernels.cuda.table import parameter_table
from lowbit_lightning.kernels.sources import StepVariant, specialised
from lowbit_lightning.kernels.structs import StepSettings, hyper_values, settings_tensors, settings_values


def optimizer_step(
    arguments: StepArguments, grads: Sequence[Tensor], scalars: StepScalars, norms: Tensor | None
) -> None:
    _Step(arguments, grads, scalars).step(norms)


def optimizer_norms(arguments: StepArguments, grads: Sequence[Tensor], scalars: StepScalars) -> Tensor:
    return _Step(arguments, grads, scalars).norms()


class _Step:
    """The launches of one step: ``prepare``, then ``step`` or the norms."""

    def __init__(self, arguments: StepArguments, grads: Sequence[Tensor], given: StepScalars) -> None:
        self.arguments, self.grads, self.given = arguments, grads, given
        self.rule = rules.get(arguments.rule)
        self.variant = StepVariant.of(arguments, grads[0].dtype)
        self.settings = StepSettings(*settings_values(given))
        self.count = len(arguments.params)
        self.table, self.blocks = parameter_table(arguments, grads)
        self.scalars = self._empty(self.count * max(1, len(self.rule.elementwise_scalars)), torch.float32)
        self.factor = self._empty(1, torch.float32)

    def step(self, norms: Tensor | None) -> None:
        text = self.variant.text("optimizer_step.cu")
        self._prepare(norms, advance=True)
        self._run_blocks(text, "step", self.scalars, self.factor, self.settings)

    def norms(self) -> Tensor:
        kinds = len(self.rule.norms)
        out = torch.empty(self.count, kinds, dtype=torch.float64, device=self.arguments.device)
        if not kinds:
            return out
        text = self.variant._replace(stochastic=False).text("optimizer_norms.cu")
        sums, other = (self._empty(kinds * self.blocks, torch.float64) for _ in range(2))
        self._prepare(None, advance=False)
        self._run_blocks(text, "norm_blocks", self.scalars, self.factor, sums)
        fold = self.table, ctypes.c_int64(self.blocks), sums, other, out
        launch.run(Launch(text, "norm_fold", (self.count, kinds, 1), 256, fold))
        return out

    def _prepare(self, norms: Tensor | None, advance: bool) -> None:
        told = hyper_values(self.given), self.settings, norms, ctypes.c_int(advance)
        arguments = self.table, ctypes.c_int64(self.count), *told, self.scalars, self.factor
        text = specialised("optimizer_prepare.cu", self.rule.name)
        self._run(text, "prepare", ceil_div(self.count, 128), 128, arguments)

    def _run_blocks(self, text: str, kernel: str, *arguments: object) -> None:
        threads, at_a_time = geometry(self.arguments.block_size)
        if not self.blocks:
            return
        grid, turns = shared_out(self.blocks, at_a_time)
        counts = ctypes.c_int64(self.count), ctypes.c_int64(self.blocks), ctypes.c_int(turns)
        self._run(text, kernel, grid, threads, (self.table, *counts, *arguments))

    def _run(self, text: str, kernel: str, grid: int, block: int, arguments: tuple) -> None:
        launch.run(Launch(text, kernel, (grid, 1, 1), block, arguments, self._memory))

    def _memory(self) -> list[Tensor]:
        a = self.arguments
        tensors = [*settings_tensors(self.given), *a.params, *self.grads, *a.steps, *a.remainders]
        return [*tensors, *(t for s in (*a.states, *a.scales) for t in s)]

    def _empty(self, count: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(count, dtype=dtype, device=self.arguments.device)
