"""The arguments of the optimizer step, for every rule and backend: what stays from step to step (``StepArguments``),
the gradients, and what else is new in each step (``StepScalars``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from lowbit_lightning.kernels import rules
from lowbit_lightning.kernels.formats import DEFAULT_BLOCK_SIZE, BlockGrid, check_block_size

FLOATS = (torch.float32, torch.float16, torch.bfloat16)

_PLACE = attrgetter("shape", "device", "layout", "dtype")


class StepScalars(NamedTuple):
    """What is new in each step, beside the gradients.

    ``hyper``: the rule's hyperparameters in its order, as Python floats. Optional 0-d float32 tensors on the
    parameters' device, read there without a synchronisation: ``lr`` replaces ``hyper``'s; ``unscale`` and ``clip``
    multiply the gradients; ``skip``: non-zero means that nothing happens, step counts included. ``seed`` is the one of
    ``stochastic_rounding``; ``maximize`` negates the gradients.
    """

    hyper: Sequence[float]
    lr: Tensor | None = None
    unscale: Tensor | None = None
    clip: Tensor | None = None
    skip: Tensor | None = None
    seed: int = 0
    maximize: bool = False


_TENSORS = [name for name, kind in StepScalars.__annotations__.items() if "Tensor" in str(kind)]


@dataclass(frozen=True, eq=False)
class StepArguments:
    """What stays from one step to the next: n parameters that one launch updates, and their states.

    ``params``: n tensors. ``steps``: n 0-d float32 tensors, the number of steps taken so far.
    ``states[s][i]``: state s of parameter i, of the parameter's shape: uint8 codes, or float32. ``scales[s][i]``:
    float32 of ``BlockGrid.scales_shape`` for codes; unused (any tensor) for float32. Parameters have one dtype,
    float32, float16 or bfloat16, and each of the states one.

    ``ordinals`` (a number per parameter) and ``offsets`` (the global index of each parameter's first element, for
    shards) key, with the seed, the random words of ``stochastic_rounding`` (bfloat16 parameters only).

    ``remainders``: none, or for each parameter, all bfloat16, the next eight bits of a 24-bit master copy: int8, of
    its shape. The master's bits are those of the parameter, followed by eight zeros, plus the remainder.

    Raises:
        TypeError, ValueError: naming what does not fit.
    """

    rule: str
    params: list[Tensor]
    steps: list[Tensor]
    states: list[list[Tensor]]
    scales: list[list[Tensor]]
    block_size: int = DEFAULT_BLOCK_SIZE
    ordinals: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    stochastic_rounding: bool = False
    remainders: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, default in (("ordinals", range(len(self.params))), ("offsets", [0] * len(self.params))):
            object.__setattr__(self, name, getattr(self, name) or list(default))
        self._check()

    @property
    def device(self) -> torch.device:
        return self.params[0].device

    def grid(self, i: int) -> BlockGrid:
        """The block grid of parameter i."""
        return BlockGrid.of(self.params[i].shape, self.block_size)

    @cached_property
    def written(self) -> list[Tensor]:
        """All that a step writes, because autograd must see that a kernel overwrote a saved tensor."""
        tensors = [*self.params, *self.steps, *self.remainders, *(t for s in (*self.states, *self.scales) for t in s)]
        return [t for t in dict.fromkeys(tensors) if not t.is_inference()]

    @cached_property
    def plain(self) -> bool:
        """Whether no parameter is a tensor subclass."""
        return {*map(type, self.params)} <= {Tensor, torch.nn.Parameter}

    @cached_property
    def _places(self) -> dict[torch.dtype, list[tuple]]:
        """What gradients of a dtype must be, as ``_PLACE`` gives it."""
        return {dtype: [(p.shape, p.device, torch.strided, dtype) for p in self.params] for dtype in FLOATS}

    # -- checks ------------------------------------------------------------------------------------------------------

    def check_step(self, grads: Sequence[Tensor], scalars: StepScalars) -> None:
        """Raise TypeError or ValueError, naming the argument, for what does not fit these parameters.

        ``grads``: one for each parameter, of its shape; float32, float16 or bfloat16, all alike.
        """
        rule = rules.get(self.rule)
        if len(scalars.hyper) != len(rule.hyper):
            raise ValueError(f"hyper must hold {rule.hyper} for rule {rule.name!r}, got {len(scalars.hyper)} values")
        if len(grads) != len(self.params):
            raise ValueError(f"grads must have one entry for each of the {len(self.params)} params, got {len(grads)}")
        dtype = grads[0].dtype
        if dtype not in FLOATS:
            raise TypeError(f"grads must be float32, float16 or bfloat16, got {dtype}")
        if list(map(_PLACE, grads)) != self._places[dtype]:
            for i, grad in enumerate(grads):
                self._check_gradient(i, grad, dtype)
        for name in _TENSORS:
            value = getattr(scalars, name)
            if value is None:
                continue
            if value.dtype != torch.float32 or value.numel() != 1 or value.device != self.device:
                raise ValueError(
                    f"{name} must be one float32 value on {self.device}, got {value.dtype} of shape "
                    f"{tuple(value.shape)} on {value.device}"
                )

    def _check_gradient(self, i: int, g: Tensor, dtype: torch.dtype) -> None:
        shape = self.params[i].shape
        if g.layout != torch.strided:
            raise ValueError(f"grads[{i}] is {g.layout}; sparse gradients are not supported: use sparse=False")
        if g.shape != shape:
            raise ValueError(f"grads[{i}] must have the parameter's shape {tuple(shape)}, got {tuple(g.shape)}")
        if g.dtype != dtype:
            raise TypeError(f"grads must have one dtype, got {dtype} and {g.dtype}: make one call for each")
        self._check_place("grads", i, g)

    def _check(self) -> None:
        rule = rules.get(self.rule)
        check_block_size(self.block_size)
        if len(self.states) != len(rule.states) or len(self.scales) != len(rule.states):
            raise ValueError(f"states and scales must hold {rule.state_names} for rule {rule.name!r}")
        n = len(self.params)
        if not n:
            raise ValueError("params must hold one parameter or more")
        for name in ("steps", "ordinals", "offsets"):
            if len(getattr(self, name)) != n:
                raise ValueError(
                    f"{name} must have one entry for each of the {n} params, got {len(getattr(self, name))}"
                )
        if self.remainders and (len(self.remainders) != n or self.stochastic_rounding):
            raise ValueError("remainders must be one per parameter, without stochastic_rounding: they round to nearest")
        for i in range(n):
            self._check_parameter(i, rule)

    def _check_parameter(self, i: int, rule: rules.Rule) -> None:
        p = self.params[i]
        if p.device != self.device:
            raise ValueError(f"params[{i}] is on {p.device} and params[0] on {self.device}; a step takes one device")
        if p.dtype not in FLOATS:
            raise TypeError(f"params[{i}] must be float32, float16 or bfloat16, got {p.dtype}")
        if p.dtype != self.params[0].dtype:
            raise TypeError(
                f"params must have one dtype, got {self.params[0].dtype} and {p.dtype}: make one call for each"
            )
        if self.stochastic_rounding and p.dtype == torch.float16:
            raise TypeError(f"stochastic_rounding serves bfloat16 parameters; params[{i}] is float16")
        if self.remainders:
            remainder = self.remainders[i]
            if p.dtype != torch.bfloat16 or remainder.dtype != torch.int8 or remainder.shape != p.shape:
                raise TypeError(
                    f"remainders[{i}] must be int8 of a bfloat16 parameter's shape {tuple(p.shape)}, "
                    f"got {remainder.dtype} of {tuple(remainder.shape)} for {p.dtype}"
                )
            self._check_place("remainders", i, remainder)
        self._check_place("steps", i, self.steps[i])
        for s, name in enumerate(rule.state_names):
            self._check_state(name, i, self.states[s][i], self.scales[s][i])
            if self.states[s][i].dtype != self.states[s][0].dtype:
                raise TypeError(f"{name} must be codes of all params or of none: make one call for each kind")

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
