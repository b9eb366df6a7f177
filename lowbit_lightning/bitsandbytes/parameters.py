"""Parameters that are quantised when they are moved to a device, as ``bitsandbytes.nn`` has them.

Both are made of a float tensor and stay floats until ``.to(device)``, ``.cuda()`` or ``.cpu()``, by itself or with a
module, quantises them in place. A cast changes only what is not quantised yet. Attributes have bitsandbytes' names,
and constructors take its keywords; they ignore others, because callers hand over a whole ``__dict__`` of an old
parameter.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lowbit_lightning.bitsandbytes import functional
from lowbit_lightning.bitsandbytes.quant_state import QuantState

Self = TypeVar("Self", bound="QuantizedParameter")


class QuantizedParameter(nn.Parameter):
    """What both share: copies and pickles keep the class and the attributes."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuilt, (type(self), self.data, self.requires_grad, dict(vars(self)))

    def __copy__(self: Self) -> Self:
        return _rebuilt(type(self), self.data, self.requires_grad, dict(vars(self)))

    def __deepcopy__(self: Self, memo: dict[int, Any]) -> Self:
        if id(self) not in memo:
            memo[id(self)] = made = _rebuilt(type(self), copy.deepcopy(self.data, memo), self.requires_grad, {})
            vars(made).update(copy.deepcopy(vars(self), memo))
        return memo[id(self)]

    def cpu(self: Self) -> Self:  # type: ignore[override]
        return self.to("cpu")

    def cuda(self: Self, device: Any = None, non_blocking: bool = False) -> Self:  # type: ignore[override]
        return self.to(device="cuda" if device is None else device, non_blocking=non_blocking)

    def to(self: Self, *args: Any, **kwargs: Any) -> Self:  # type: ignore[override]
        """Quantise, if it has not been yet and a device is given; else the moved parameter."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and device.type != "meta" and self._waits():
            self._quantize(device)
            return self
        return self._moved(device, nn.Parameter.to(self, device=device, dtype=dtype, non_blocking=non_blocking))

    def quantize(self: Self) -> Self:
        """Quantise where it is, if it has not been yet."""
        return self.to(self.device)

    def _waits(self) -> bool:
        """Whether it is to be quantised by the next move."""
        raise NotImplementedError

    def _quantize(self, device: torch.device) -> None:
        raise NotImplementedError

    def _moved(self: Self, device: torch.device | None, data: Tensor) -> Self:
        return _rebuilt(type(self), data.detach(), self.requires_grad, dict(vars(self)))


def _rebuilt(cls: Any, data: Tensor, requires_grad: bool, attributes: Mapping[str, Any]) -> Any:
    made = torch.Tensor._make_subclass(cls, data, requires_grad)
    vars(made).update(attributes)
    return made


class Params4bit(QuantizedParameter):
    """A weight of 4 bits: codes ``[(numel + 1) // 2, 1]`` in ``quant_storage``, and their ``quant_state``.

    Args:
        data: the float weight, or codes together with ``quant_state`` and ``bnb_quantized=True``.
        blocksize, compress_statistics, quant_type, quant_storage: as for ``functional.quantize_4bit``.
        ignored: bitsandbytes' ``module`` and whatever else an old parameter's ``__dict__`` has.
    """

    quant_state: QuantState | None
    blocksize: int
    compress_statistics: bool | None
    quant_type: str
    quant_storage: torch.dtype
    bnb_quantized: bool

    def __new__(
        cls,
        data: Tensor | None = None,
        requires_grad: bool = False,
        quant_state: QuantState | None = None,
        blocksize: int | None = None,
        compress_statistics: bool | None = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        module: Any = None,
        bnb_quantized: bool = False,
        **ignored: Any,
    ) -> Params4bit:
        attributes = {
            "blocksize": 64 if blocksize is None else blocksize,
            "compress_statistics": compress_statistics,
            "quant_type": quant_type,
            "quant_state": quant_state,
            "quant_storage": quant_storage,
            "bnb_quantized": bnb_quantized,
        }
        return _rebuilt(cls, torch.empty(0) if data is None else data.detach(), requires_grad, attributes)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        if func in (torch.chunk, torch.split, torch.Tensor.chunk, torch.Tensor.split) and isinstance(result, tuple):
            whole = args[0]
            return tuple(_rebuilt(cls, part, whole.requires_grad, dict(vars(whole))) for part in result)
        return result

    @classmethod
    def from_prequantized(
        cls,
        data: Tensor,
        quantized_stats: Mapping[str, Any],
        requires_grad: bool = False,
        device: Any = "cuda",
        module: Any = None,
        **ignored: Any,
    ) -> Params4bit:
        """A parameter of saved codes and the entries beside them in a state_dict: ``absmax``, ``quant_map``,
        ``quant_state.bitsandbytes__nf4`` and so on, with any prefix.

        Raises:
            ValueError: for entries that are missing, unknown or damaged.
        """
        state = QuantState.from_dict(quantized_stats, device=device)
        if module is not None:
            module.quant_state = state
        return cls(
            data.to(device),
            requires_grad,
            state,
            state.blocksize,
            state.nested,
            state.quant_type or "fp4",
            data.dtype,
            bnb_quantized=True,
        )

    def _waits(self) -> bool:
        return not self.bnb_quantized

    def _quantize(self, device: torch.device) -> None:
        self.data, self.quant_state = functional.quantize_4bit(
            self.data.to(device),
            blocksize=self.blocksize,
            compress_statistics=self.compress_statistics,
            quant_type=self.quant_type,
            quant_storage=self.quant_storage,
        )
        self.bnb_quantized = True

    def _moved(self, device: torch.device | None, data: Tensor) -> Params4bit:
        if self.quant_state is not None and device is not None:
            self.quant_state.to(device)
        return super()._moved(device, data)

    # FSDP1 looks the entries of a state_dict up as attributes: ``weight.absmax``.

    @property
    def absmax(self) -> Tensor:
        return self._known("absmax").absmax

    @property
    def code(self) -> Tensor:
        return self._known("code").code

    @property
    def quant_map(self) -> Tensor:
        return self._known("quant_map").code

    @property
    def nested_absmax(self) -> Tensor:
        return self._known("nested_absmax", nested=True).absmax

    @property
    def nested_quant_map(self) -> Tensor:
        return self._known("nested_quant_map", nested=True).code

    def _known(self, name: str, nested: bool = False) -> QuantState:
        state = self.quant_state
        state = state.state2 if nested and state is not None else state
        if state is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return state


class Int8Params(QuantizedParameter):
    """An int8 weight: codes by rows, which are also ``CB``, and ``SCB``, the rows' largest magnitudes (float32).

    Args:
        data: the float weight, or codes together with ``SCB``.
        has_fp16_weights: True leaves it a float parameter, which is quantised in each forward and can be trained.
        ignored: ``CB`` and whatever else an old parameter's ``__dict__`` has.
    """

    SCB: Tensor | None
    has_fp16_weights: bool

    def __new__(
        cls,
        data: Tensor | None = None,
        requires_grad: bool = True,
        has_fp16_weights: bool = False,
        CB: Tensor | None = None,
        SCB: Tensor | None = None,
        **ignored: Any,
    ) -> Int8Params:
        data = torch.empty(0) if data is None else data.detach()
        trains = requires_grad and data.is_floating_point()
        return _rebuilt(cls, data, trains, {"SCB": SCB, "has_fp16_weights": has_fp16_weights})

    @property
    def CB(self) -> Tensor | None:
        return self.data if self.data.dtype == torch.int8 else None

    def _waits(self) -> bool:
        return not self.has_fp16_weights and self.data.dtype != torch.int8

    def _quantize(self, device: torch.device) -> None:
        codes, self.SCB, _ = functional.int8_vectorwise_quant(self.data.to(device))
        self.requires_grad = False
        self.data = codes

    def _moved(self, device: torch.device | None, data: Tensor) -> Int8Params:
        if self.SCB is not None and device is not None and device.type != "meta":
            self.SCB = self.SCB.to(device)
        return super()._moved(device, data)
