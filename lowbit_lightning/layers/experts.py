"""Three-dimensional weights in low bits: the experts of mixture-of-experts models, which are parameters, not layers.

``LowBitTensor`` takes the place of a parameter ``[experts, rows, row_length]``, under its name. Code that reads the
parameter works unchanged:

- ``weight[i]`` is one expert. ``torch.nn.functional.linear(x, weight[i])`` multiplies it in its packed form, forward
  and backward; any other op decodes only that expert.
- ``torch.nn.functional.grouped_mm`` (``torch._grouped_mm``) of rows that are sorted by expert, with ``weight`` or
  ``weight.transpose(-2, -1)``, multiplies each expert's rows in its packed form, too.
- Another op that takes the whole parameter (``torch.bmm``) gets all of it decoded for the duration of the call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lowbit_lightning import kernels
from lowbit_lightning.layers.lowbit import LowBitWeight, Weights

T = TypeVar("T")
LINEAR = torch._C._nn.linear
"""``torch.nn.functional.linear``, in whose place DeepSpeed's stage 3 puts a function that takes nothing but tensors."""

TENSOR_ATTRIBUTES = frozenset(
    {"T", "mT", "bmm", "contiguous", "detach", "matmul", "permute", "size", "transpose", "unbind"}
)
"""The attributes of a tensor that code reads from a weight."""


class ActsAsTensor:
    """Takes the place of a tensor: torch's functions get the decoded tensor."""

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        raise NotImplementedError

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func is LINEAR and len(args) > 1 and isinstance(args[1], LowBitMatrix):
            bias = args[2] if len(args) > 2 else given.get("bias")
            return args[1].multiply(args[0], bias)
        if func in GROUPED:
            return _grouped(*args, **given)
        return func(*tree_map(_decoded, args), **tree_map(_decoded, given))

    def __matmul__(self, other: Tensor) -> Tensor:
        return self.dequantize() @ other

    def __rmatmul__(self, other: Tensor) -> Tensor:
        return other @ self.dequantize()


def _decoded(x: Any) -> Any:
    return x.dequantize() if isinstance(x, ActsAsTensor) else x


GROUPED = tuple(
    getattr(owner, name)
    for owner, name in ((torch, "_grouped_mm"), (nn.functional, "grouped_mm"))
    if hasattr(owner, name)
)
"""torch's product of groups of rows; older versions lack it, or its public name."""


def _grouped(
    x: Tensor, weight: Any, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: Any = None
) -> Tensor:
    """torch's ``grouped_mm`` with a low-bit weight ``[E, K, N]``, or the transpose of one."""
    if not isinstance(weight, (LowBitTensor, TransposedExperts)) or not isinstance(x, Tensor) or x.ndim != 2:
        return GROUPED[-1](_decoded(x), _decoded(weight), offs=offs, bias=bias, out_dtype=out_dtype)
    if offs is None or bias is not None:
        raise ValueError("grouped_mm of experts in low bits takes offs, and no bias: add it to the result")
    held, transposed = (weight, True) if isinstance(weight, LowBitTensor) else (weight.held, False)
    y = held.multiply_groups(x, offs, transposed=transposed)
    return y if out_dtype is None else y.to(out_dtype)


def pass_matrices_on() -> None:
    """Put a function in front of the one that DeepSpeed has put in place of ``torch.nn.functional.linear``. Idempotent;
    without DeepSpeed's stage 3 nothing is done.

    It has to be there before a forward that says ``linear(x, experts[i])`` begins: Python looks the function up first.
    """
    replaced = nn.functional.linear
    if replaced is LINEAR or hasattr(replaced, "passes_on"):
        return

    @wraps(replaced)
    def linear(input: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        return weight.multiply(input, bias) if isinstance(weight, LowBitMatrix) else replaced(input, weight, bias)

    linear.passes_on = replaced  # type: ignore[attr-defined]
    nn.functional.linear = linear


class LowBitMatrix(ActsAsTensor):
    """One expert of a ``LowBitTensor``: ``[rows, row_length]``."""

    def __init__(self, packed: Tensor, scales: Tensor, weights: Weights, row_length: int, dtype: torch.dtype) -> None:
        self.packed, self.scales, self.weights = packed, scales, weights
        self.row_length, self.dtype = row_length, dtype

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.packed.shape[:-1], self.row_length))

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        form = self.weights.format
        return kernels.lowbit_dequantize(self.packed, self.scales, form, self.row_length, dtype or self.dtype)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``torch.nn.functional.linear(x, self, bias)``, without a decoded copy."""
        return kernels.lowbit_matmul(x, self.packed, self.scales, bias, self.weights.format)

    def __getattr__(self, name: str) -> Any:
        if name in TENSOR_ATTRIBUTES:
            return getattr(self.dequantize(), name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


class LowBitTensor(LowBitWeight, ActsAsTensor):
    """A parameter ``[experts, rows, row_length]`` in low bits; a submodule under the parameter's name.

    Blocks lie inside rows, along the last dimension.
    """

    def __init__(self, weight: Tensor, weights: Weights) -> None:
        super().__init__()
        self.keep(weight, weights)

    def _read(self, read: Callable[[], T]) -> T:
        """What ``read`` makes of the codes. Where accelerate offloads them, it would fetch them before this module's
        forward, which nobody calls."""
        hook = self.__dict__.get("_hf_hook")
        if hook is None:
            return read()
        hook.pre_forward(self)
        try:
            return read()
        finally:
            hook.post_forward(self, None)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight, decoded to ``dtype``; None: to the dtype that it had."""
        return self._read(lambda: LowBitWeight.dequantize(self, dtype))

    def multiply_groups(self, x: Tensor, offs: Tensor, bias: Tensor | None = None, transposed: bool = False) -> Tensor:
        """``x[rows of e] @ weight[e].T (+ bias[e])`` for each expert e, in packed form; of ``weight[e]`` itself if
        ``transposed``. ``offs``: the ends of the experts' rows in x (``kernels.lowbit_grouped_matmul``)."""

        def multiply() -> Tensor:
            operands = x, self.weight, self.scales, offs, bias
            return kernels.lowbit_grouped_matmul(*operands, self.format, self.row_length, transposed)

        return self._read(multiply)

    def transpose(self, dim0: int, dim1: int) -> Tensor | TransposedExperts:
        """The experts transposed, undecoded; decoded for other dimensions."""
        return TransposedExperts(self) if {dim0 % 3, dim1 % 3} == {1, 2} else self.dequantize().transpose(dim0, dim1)

    @property
    def mT(self) -> TransposedExperts:
        return TransposedExperts(self)

    @classmethod
    def adopt(cls, module: nn.Module, name: str, weights: Weights) -> LowBitTensor:
        """Put the module's parameter ``name`` into low bits."""
        p = module._parameters.pop(name)
        assert p is not None
        module.add_module(name, held := cls(p, weights))
        return held

    @classmethod
    def release(cls, module: nn.Module, name: str, dtype: torch.dtype | None = None) -> None:
        """Make it the parameter again, with the decoded weight in ``dtype``; it is frozen."""
        held = module._modules.pop(name)
        assert isinstance(held, LowBitTensor)
        module.register_parameter(name, nn.Parameter(held.dequantize(dtype), requires_grad=False))

    @property
    def shape(self) -> torch.Size:
        return self.weight_shape

    @property
    def ndim(self) -> int:
        return self.weight.ndim

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def __len__(self) -> int:
        return len(self.weight)

    def __getitem__(self, index: Any) -> LowBitMatrix | Tensor:
        packed, scales = self._read(lambda: (self.weight[index], self.scales[index]))
        if packed.ndim != self.weight.ndim - 1 or packed.shape[-1] != self.weight.shape[-1]:
            return self.dequantize()[index]
        pass_matrices_on()
        return LowBitMatrix(packed, scales, self.weights, self.row_length, self.dtype)

    def __iter__(self) -> Iterator[LowBitMatrix | Tensor]:
        return (self[i] for i in range(len(self)))

    def __getattr__(self, name: str) -> Any:
        if name in TENSOR_ATTRIBUTES:
            return getattr(self.dequantize(), name)
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight_shape)}, {self.weights}"


class TransposedExperts(ActsAsTensor):
    """All experts of a ``LowBitTensor``, each transposed: ``[experts, row_length, rows]``."""

    ndim = 3

    def __init__(self, held: LowBitTensor) -> None:
        self.held = held

    @property
    def shape(self) -> torch.Size:
        experts, rows, length = self.held.shape
        return torch.Size((experts, length, rows))

    @property
    def dtype(self) -> torch.dtype:
        return self.held.dtype

    @property
    def device(self) -> torch.device:
        return self.held.device

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.held.dequantize(dtype).mT

    def __len__(self) -> int:
        return len(self.held)

    def __getitem__(self, index: Any) -> Tensor:
        found = self.held[index]
        return found.dequantize().T if isinstance(found, LowBitMatrix) else self.dequantize()[index]

    def __getattr__(self, name: str) -> Any:
        if name in TENSOR_ATTRIBUTES:
            return getattr(self.dequantize(), name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
