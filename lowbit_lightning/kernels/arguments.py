"""The arguments of the optimizer step, for every rule and backend: ``StepArguments``, which stay from step to step, the
gradients, and ``StepScalars``, which are new in each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from lowbit_lightning.kernels import rules
from lowbit_lightning.kernels.formats import DEFAULT_BLOCK_SIZE, BlockGrid, check_block_size

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
Scaled = tuple[Tensor, Tensor]
"""int8 values and their float32 scales."""
PART = 2**16
"""The number of pixels whose products ``int8_conv_weight`` sums exactly, in int32, before it scales the sum. An int32
holds them even if all are products of -128."""

_PLACE = attrgetter("shape", "device", "layout", "dtype")


class StepScalars(NamedTuple):
    """The scalars that are new in each step.

    ``hyper``: the rule's hyperparameters in its order, as Python floats. ``lr``, ``unscale``, ``clip`` and ``skip`` are
    optional 0-d float32 tensors on the parameters' device, which are read there without a synchronisation. ``lr``
    replaces that of ``hyper``. ``unscale`` and ``clip`` multiply the gradients. If ``skip`` is not zero, nothing
    changes, not even step counts. ``seed`` is for ``stochastic_rounding``. ``maximize`` negates the gradients.
    """

    hyper: Sequence[float]
    lr: Tensor | None = None
    unscale: Tensor | None = None
    clip: Tensor | None = None
    skip: Tensor | None = None
    seed: int = 0
    maximize: bool = False


SCALARS: dict[str, Any] = get_type_hints(StepScalars)
"""Names and types. torch's schema of the step and the struct of its kernels follow from them."""


@dataclass(frozen=True, eq=False)
class StepArguments:
    """The arguments that stay from one step to the next: n parameters that one launch updates, and their states.

    ``params``: n tensors of one dtype: float32, float16 or bfloat16. ``steps``: n 0-d float32 tensors with the number
    of steps taken so far. ``states[s][i]``: state s of parameter i, of the parameter's shape: uint8 codes, or float32.
    A state has the same dtype for all parameters. ``scales[s][i]``: for codes float32 of ``BlockGrid.scales_shape``;
    for float32 states any tensor, which is not used.

    ``ordinals`` (a number per parameter) and ``offsets`` (the global index of each parameter's first element, for
    shards) are, with the seed, the key of the random words of ``stochastic_rounding`` (bfloat16 parameters only).

    ``remainders``: empty, or for each parameter, which must be bfloat16, the next eight bits of a 24-bit master copy:
    int8, of the parameter's shape. The bits of the master are the parameter's bits, followed by eight zeros, plus the
    remainder.

    Raises:
        TypeError, ValueError: for arguments that do not fit together; the error names them.
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
        return BlockGrid.of(self.params[i].shape, self.block_size)

    @cached_property
    def written(self) -> list[Tensor]:
        """All tensors that a step writes. Autograd must notice if a kernel overwrites a tensor that it saved."""
        tensors = [*self.params, *self.steps, *self.remainders, *(t for s in (*self.states, *self.scales) for t in s)]
        return [t for t in dict.fromkeys(tensors) if not t.is_inference()]

    @cached_property
    def coded(self) -> int:
        """Bit s is set if state s is 8-bit codes."""
        return sum(1 << s for s, state in enumerate(self.states) if state[0].dtype == torch.uint8)

    @cached_property
    def plain(self) -> bool:
        """Whether no parameter is a tensor subclass."""
        return {*map(type, self.params)} <= {Tensor, torch.nn.Parameter}

    @cached_property
    def _places(self) -> dict[torch.dtype, list[tuple]]:
        """Dtype of the gradients -> what ``_PLACE`` must return for each."""
        return {dtype: [(p.shape, p.device, torch.strided, dtype) for p in self.params] for dtype in FLOATS}

    # -- checks ------------------------------------------------------------------------------------------------------

    def check_step(self, grads: Sequence[Tensor], scalars: StepScalars) -> None:
        """Raise TypeError or ValueError, which name the argument, if these arguments do not fit the parameters.

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
        for name, value in zip(SCALARS, scalars, strict=True):
            if not isinstance(value, Tensor):
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
    """The int64 with the same 64 bits, for the ``int`` of a schema."""
    return seed if -(2**63) <= seed < 2**63 else (seed + 2**63) % 2**64 - 2**63
