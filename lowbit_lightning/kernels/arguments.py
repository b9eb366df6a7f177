"""The optimizer step's argument block, complete for every rule and backend."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lowbit_lightning.kernels import rules
from lowbit_lightning.kernels.formats import DEFAULT_BLOCK_SIZE, BlockGrid, check_block_size

FLOATS = (torch.float32, torch.float16, torch.bfloat16)

_CHANGING = ("hyper", "lr", "unscale", "clip", "skip", "seed", "maximize")


@dataclass
class StepArguments:
    """What one optimizer step reads and writes, for the n parameters of a group.

    ``params``, ``grads``: n tensors of equal shapes, float32, float16 or bfloat16. ``steps``: n 0-d float32 tensors,
    the number of steps taken so far. ``states[s][i]``: state s of parameter i, of the parameter's shape: uint8
    codes, or float32. ``scales[s][i]``: float32 of ``BlockGrid.scales_shape`` for codes; unused (any tensor) for
    float32.

    ``hyper``: the rule's hyperparameters in its order, as Python floats. Optional 0-d float32 tensors on the
    parameters' device, read there without a synchronisation: ``lr`` replaces ``hyper``'s; ``unscale`` and ``clip``
    multiply the gradients;
    ``skip``: non-zero means that nothing happens, step counts included.

    ``remainders``: none, or for each parameter, all bfloat16, the next eight bits of a 24-bit master copy: int8, of
    its shape. The master's bits are those of the parameter, followed by eight zeros, plus the remainder.

    ``seed``, ``ordinals`` (a number per parameter) and ``offsets`` (the global index of each parameter's first
    element, for shards) key the random words of ``stochastic_rounding`` (bfloat16 parameters only). ``maximize``
    negates the gradients.

    An object may serve many steps: ``grads`` and the fields of ``_CHANGING`` may be set anew, the rest stays.
    ``cache`` is what checks and backends remember meanwhile.
    """

    rule: str
    params: list[Tensor]
    grads: list[Tensor]
    steps: list[Tensor]
    states: list[list[Tensor]]
    scales: list[list[Tensor]]
    hyper: list[float]
    block_size: int = DEFAULT_BLOCK_SIZE
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
    cache: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.ordinals = self.ordinals or list(range(len(self.params)))
        self.offsets = self.offsets or [0] * len(self.params)

    @property
    def device(self) -> torch.device:
        return self.params[0].device

    def grid(self, i: int) -> BlockGrid:
        """The block grid of parameter i."""
        return BlockGrid.of(self.params[i].shape, self.block_size)

    def parts(self) -> list[tuple[list[int], StepArguments]]:
        """The same step in parts whose parameters, gradients and states have equal dtypes: one launch each.

        With the indices of each part's parameters; empty parameters are in none.
        """
        if "parts" not in self.cache:
            groups: dict[tuple, list[int]] = {}
            for i, (p, g) in enumerate(zip(self.params, self.grads, strict=True)):
                if p.numel():
                    groups.setdefault((p.dtype, g.dtype, *[s[i].dtype for s in self.states]), []).append(i)
            self.cache["parts"] = [
                (indices, None if len(indices) == len(self.params) else self._select(indices))
                for indices in groups.values()
            ]
        result = []
        for indices, part in self.cache["parts"]:
            if part is not None:
                part.grads = [self.grads[i] for i in indices]
                part.copy_settings(self)
            result.append((indices, self if part is None else part))
        return result

    def copy_settings(self, other: StepArguments) -> None:
        """Take what may change from step to step, but for the gradients, from another."""
        for name in _CHANGING:
            setattr(self, name, getattr(other, name))

    def forget_gradients(self) -> None:
        """Let go of the gradients: an object that is kept for the next step must not keep them alive."""
        self.grads = []
        for _, part in self.cache.get("parts", ()):
            if part is not None:
                part.grads = []

    def _select(self, indices: list[int]) -> StepArguments:
        def pick(items: list) -> list:
            return [items[i] for i in indices]

        return replace(
            self,
            params=pick(self.params),
            grads=pick(self.grads),
            steps=pick(self.steps),
            states=[pick(s) for s in self.states],
            scales=[pick(s) for s in self.scales],
            ordinals=pick(self.ordinals),
            offsets=pick(self.offsets),
            remainders=pick(self.remainders) if self.remainders else [],
        )

    def check(self) -> None:
        """Raise TypeError or ValueError, naming the argument, before anything is changed. Once for an object."""
        if "checked" in self.cache:
            return
        rule = rules.get(self.rule)
        check_block_size(self.block_size)
        if len(self.hyper) != len(rule.hyper):
            raise ValueError(f"hyper must hold {rule.hyper} for rule {rule.name!r}, got {len(self.hyper)} values")
        if len(self.states) != len(rule.states) or len(self.scales) != len(rule.states):
            raise ValueError(f"states and scales must hold {rule.state_names} for rule {rule.name!r}")
        n = len(self.params)
        for name in ("grads", "steps", "ordinals", "offsets"):
            if len(getattr(self, name)) != n:
                raise ValueError(
                    f"{name} must have one entry for each of the {n} params, got {len(getattr(self, name))}"
                )
        if self.remainders and (len(self.remainders) != n or self.stochastic_rounding):
            raise ValueError("remainders must be one per parameter, without stochastic_rounding: they round to nearest")
        for i in range(n):
            self._check_parameter(i, rule)
        for name in ("lr", "unscale", "clip", "skip"):
            value = getattr(self, name)
            if value is None or not n:
                continue
            if value.dtype != torch.float32 or value.numel() != 1 or value.device != self.device:
                raise ValueError(
                    f"{name} must be one float32 value on {self.device}, got {value.dtype} of shape "
                    f"{tuple(value.shape)} on {value.device}"
                )
        self.cache["checked"] = True

    def _check_parameter(self, i: int, rule: rules.Rule) -> None:
        p, g = self.params[i], self.grads[i]
        if p.device != self.device:
            raise ValueError(f"params[{i}] is on {p.device} and params[0] on {self.device}; a step takes one device")
        if g.layout != torch.strided:
            raise ValueError(f"grads[{i}] is {g.layout}; sparse gradients are not supported: use sparse=False")
        if p.dtype not in FLOATS or g.dtype not in FLOATS:
            raise TypeError(
                f"params[{i}] and grads[{i}] must be float32, float16 or bfloat16, got {p.dtype} and {g.dtype}"
            )
        if self.stochastic_rounding and p.dtype == torch.float16:
            raise TypeError(f"stochastic_rounding serves bfloat16 parameters; params[{i}] is float16")
        if g.shape != p.shape:
            raise ValueError(f"grads[{i}] must have the parameter's shape {tuple(p.shape)}, got {tuple(g.shape)}")
        if self.remainders:
            remainder = self.remainders[i]
            if p.dtype != torch.bfloat16 or remainder.dtype != torch.int8 or remainder.shape != p.shape:
                raise TypeError(
                    f"remainders[{i}] must be int8 of a bfloat16 parameter's shape {tuple(p.shape)}, "
                    f"got {remainder.dtype} of {tuple(remainder.shape)} for {p.dtype}"
                )
            self._check_place("remainders", i, remainder)
        self._check_place("grads", i, g)
        self._check_place("steps", i, self.steps[i])
        for s, name in enumerate(rule.state_names):
            self._check_state(name, i, self.states[s][i], self.scales[s][i])

    def _check_state(self, name: str, i: int, state: Tensor, scales: Tensor) -> None:
        if state.dtype not in (torch.uint8, torch.float32):
            raise TypeError(f"{name}[{i}] must be uint8 codes or float32, got {state.dtype}")
        shape = self.params[i].shape
        if state.shape != shape:
            raise ValueError(f"{name}[{i}] must have the parameter's shape {tuple(shape)}, got {tuple(state.shape)}")
        self._check_place(name, i, state)
        if state.dtype != torch.uint8:
            return
        expected = self.grid(i).scales_shape
        if scales.dtype != torch.float32 or tuple(scales.shape) != expected:
            raise ValueError(
                f"scales of {name}[{i}] must be float32 of shape {expected} for a parameter of shape {tuple(shape)} in "
                f"blocks of {self.block_size}, got {scales.dtype} of shape {tuple(scales.shape)}"
            )
        self._check_place(f"scales of {name}", i, scales)

    def _check_place(self, name: str, i: int, tensor: Tensor) -> None:
        if tensor.device != self.device:
            raise ValueError(f"{name}[{i}] is on {tensor.device}; all tensors of a step must be on {self.device}")
        if name != "grads" and not tensor.is_contiguous():
            raise ValueError(f"{name}[{i}] must be contiguous, got strides {tensor.stride()}")


def as_int64(seed: int) -> int:
    """The same 64 bits as what a schema's int holds."""
    return seed if -(2**63) <= seed < 2**63 else (seed + 2**63) % 2**64 - 2**63
