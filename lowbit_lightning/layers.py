"""Drop-in modules. Here: ``Int8Linear``, an ``nn.Linear`` whose three matmuls run in int8 while it trains.

How it computes
---------------
A linear layer has three products, each a contraction along its own axis::

    y  = x @ w.T       [M, N] = [M, K] [N, K]^T     contracts the input features K
    dx = dy @ w        [M, K] = [M, N] [K, N]^T     contracts the output features N
    dw = dy.T @ x      [N, K] = [N, M] [K, M]^T     contracts the tokens M

An int8 product is exact in int32, so all error comes from quantising its two operands. A scale can only be taken out
of the sum if it is constant along the contracted axis; so each product quantises both operands along *its own* axis,
with one scale ``absmax / 127`` per row and column that remain. Nothing quantised in the forward serves the backward;
what looks like waste is what keeps the error of an element below

    |error of (a @ b.T)[i, j]| <= (|a_i|_1 s_b + |b_j|_1 s_a) / 2 + K s_a s_b / 4,     s = absmax / 127

(|.|_1: sum of magnitudes; each element is off by at most s / 2). On normally distributed data that is about 1 % of the
output's norm.
All three products run as ``A @ B.T`` of two row-major operands, the layout that int8 matrix units want: the
column-wise quantiser writes its result transposed.

The bias is added, and its gradient summed, in float32. What the optimizer sees is unchanged: weights and gradients in
the weight's own dtype. ``x`` is kept for the backward in the dtype in which it was computed with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowbit_lightning import kernels

__all__ = ["Int8Linear", "Products"]

Product = Literal["int8", "high"]
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Products:
    """Which of a linear layer's three products run in int8, and which in the dtype of the input ("high").

    Raises:
        ValueError: if one of them is neither "int8" nor "high".
    """

    forward: Product = "int8"
    grad_input: Product = "int8"
    grad_weight: Product = "int8"

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value not in ("int8", "high"):
                raise ValueError(f"{name} must be 'int8' or 'high', got {value!r}")

    def __str__(self) -> str:
        names = [name for name, value in vars(self).items() if value == "int8"]
        return ", ".join(names) if names else "nothing"


class Int8Linear(nn.Linear):
    """``nn.Linear`` with its matmuls in int8: same parameters, same ``state_dict``, same gradients up to rounding.

    Args:
        in_features, out_features, bias, device, dtype: as for ``nn.Linear``; float32, float16 or bfloat16.
        forward, grad_input, grad_weight: "int8" or "high" (the matmul torch would run), each on its own.

    Input ``[..., in_features]``, output ``[..., out_features]`` in the input's dtype, or autocast's where that is on.
    Evaluation runs the forward in int8 too. A training step costs three int8 products; one less where the input
    needs no gradient, one less where the weight is frozen. There is no second derivative.

    Raises (in ``forward``):
        TypeError, ValueError: dtype, device or shape of the input doesn't fit the weight.
    """

    products: Products
    adopted: bool = False
    """True where a plain ``nn.Linear`` was turned into this layer, and may be turned back."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        forward: Product = "int8",
        grad_input: Product = "int8",
        grad_weight: Product = "int8",
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.products = Products(forward, grad_input, grad_weight)

    @classmethod
    def adopt(cls, linear: nn.Linear, products: Products) -> None:
        """Turn a plain ``nn.Linear`` into this class in place: the object, its parameters and hooks stay."""
        if not isinstance(linear, cls):
            linear.__class__ = cls
        linear.products = products  # type: ignore[assignment]
        linear.adopted = True  # type: ignore[assignment]

    @classmethod
    def release(cls, layer: Int8Linear) -> None:
        """Turn the layer into a plain ``nn.Linear`` in place; the inverse of ``adopt``."""
        del layer.products
        vars(layer).pop("adopted", None)
        layer.__class__ = nn.Linear  # type: ignore[assignment]

    def forward(self, input: Tensor) -> Tensor:
        x = self._checked(input)
        rows = x.unsqueeze(0) if x.ndim == 1 else x.flatten(0, -2)
        p = self.products
        int8 = p.forward == "int8", p.grad_input == "int8", p.grad_weight == "int8"
        y = int8_linear(rows, self.weight, self.bias, *int8)
        return y.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, int8: {self.products}"

    def _checked(self, x: Tensor) -> Tensor:
        """The input in the dtype to compute in (autocast's where it is on); raises if it doesn't fit the weight."""
        weight = self.weight
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"input must be of shape [..., {self.in_features}], got {tuple(x.shape)}")
        if x.device != weight.device:
            raise ValueError(f"input is on {x.device} but the weight on {weight.device}; move one of them")
        if weight.dtype not in FLOATS:
            raise TypeError(f"Int8Linear's weight must be float32, float16 or bfloat16, got {weight.dtype}")
        if x.dtype in FLOATS and torch.is_autocast_enabled(x.device.type):
            return x.to(torch.get_autocast_dtype(x.device.type))
        if x.dtype != weight.dtype:
            raise TypeError(f"input must have the weight's dtype, {weight.dtype}, outside autocast, got {x.dtype}")
        return x


# -- the ops ---------------------------------------------------------------------------------------------------------
#
# Opaque to torch.compile and to autograd, which sees one op in each direction and product. Schemas are written out
# because torch 2.6 cannot infer them from `Tensor | None`.


@torch.library.custom_op(
    "lowbit_lightning::int8_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, bool forward, bool grad_input, bool grad_weight) -> Tensor",
)
def int8_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, forward: bool, grad_input: bool, grad_weight: bool
) -> Tensor:
    """``x @ weight.T + bias`` of ``x [M, K]``, ``weight [N, K]``, ``bias [N]``, in x's dtype.

    ``forward``, ``grad_input``, ``grad_weight``: which products run in int8; the last two only matter to autograd.
    """
    if not forward or _nothing_to_sum(x, weight):
        return nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    xq, x_scales = kernels.quantize_rowwise(x)
    wq, w_scales = kernels.quantize_rowwise(weight)
    return kernels.int8_matmul(xq, wq, x_scales, w_scales, bias, x.dtype)


@torch.library.custom_op(
    "lowbit_lightning::int8_linear_grad_input",
    mutates_args=(),
    schema="(Tensor dy, Tensor weight, ScalarType dtype) -> Tensor",
)
def int8_linear_grad_input(dy: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``dy @ weight`` in int8: ``dy [M, N]``, ``weight [N, K]``, result ``[M, K]`` of ``dtype``."""
    if _nothing_to_sum(dy, weight):
        return dy.new_zeros(dy.shape[0], weight.shape[1], dtype=dtype)
    dyq, dy_scales = kernels.quantize_rowwise(dy)
    wq, w_scales = kernels.quantize_colwise(weight)
    return kernels.int8_matmul(dyq, wq, dy_scales, w_scales, None, dtype)


@torch.library.custom_op(
    "lowbit_lightning::int8_linear_grad_weight",
    mutates_args=(),
    schema="(Tensor dy, Tensor x, ScalarType dtype) -> Tensor",
)
def int8_linear_grad_weight(dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """``dy.T @ x`` in int8: ``dy [M, N]``, ``x [M, K]``, result ``[N, K]`` of ``dtype``."""
    if _nothing_to_sum(dy, x):
        return dy.new_zeros(dy.shape[1], x.shape[1], dtype=dtype)
    dyq, dy_scales = kernels.quantize_colwise(dy)
    xq, x_scales = kernels.quantize_colwise(x)
    return kernels.int8_matmul(dyq, xq, dy_scales, x_scales, None, dtype)


def _nothing_to_sum(a: Tensor, b: Tensor) -> bool:
    return a.numel() == 0 or b.numel() == 0


@int8_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, forward: bool, grad_input: bool, grad_weight: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@int8_linear_grad_input.register_fake
def _(dy: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return dy.new_empty(dy.shape[0], weight.shape[1], dtype=dtype)


@int8_linear_grad_weight.register_fake
def _(dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    return dy.new_empty(dy.shape[1], x.shape[1], dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, _, ctx.int8_grad_input, ctx.int8_grad_weight = inputs
    needs_x, needs_weight, *_ = ctx.needs_input_grad
    ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
    ctx.x_dtype, ctx.weight_dtype, ctx.bias_dtype = x.dtype, weight.dtype, None if bias is None else bias.dtype


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    dx = dw = db = None
    if needs_x and ctx.int8_grad_input:
        dx = int8_linear_grad_input(dy, weight, ctx.x_dtype)
    elif needs_x:
        dx = (dy @ weight.to(dy.dtype)).to(ctx.x_dtype)
    if needs_weight and ctx.int8_grad_weight:
        dw = int8_linear_grad_weight(dy, x, ctx.weight_dtype)
    elif needs_weight:
        dw = (dy.T @ x.to(dy.dtype)).to(ctx.weight_dtype)
    if needs_bias:
        db = dy.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return dx, dw, db, None, None, None


int8_linear.register_autograd(_backward, setup_context=_setup_context)
