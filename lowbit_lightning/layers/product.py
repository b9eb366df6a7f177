"""One product that every transform of torch can differentiate and batch: ``a @ b.T``, in int8 or in high precision.

``ops`` has the fast path of training: first derivatives, in reverse. Everything else goes through here: ``jvp``,
``vmap``, ``hessian``, double backward. It is slower, for operands are quantised anew in each product.

Why one function is enough
--------------------------
A linear layer and its gradients are the three partial derivatives of one trilinear form::

    t(x, w, dy) = sum over m, n, k of dy[m, n] x[m, k] w[n, k]

    y  = x @ w.T       contracts k       dt / d dy
    dx = dy @ w        contracts n       dt / d x
    dw = dy.T @ x      contracts m       dt / d w

The gradients of each of the three are again products of these kinds: of ``y = x @ w.T`` they are dx and dw; of
``dx = dy @ w`` they are of the kinds y and dw. So ``product(a, b, kinds)`` carries how all three are computed: the
kind of its result, of a, and of b. Its derivatives are products with the three exchanged. Hence all orders of
derivatives, each with the error of its own quantised operands.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit_lightning import kernels

HIGH, INT8, ROTATED = 0, 1, 2
"""How a product runs: in high precision, in int8, or in int8 with both operands rotated along what it contracts."""

NEAREST, DITHERED, STOCHASTIC = 0, 1, 2
"""How an incoming gradient is rounded: to nearest; for the gradient by the weight alone, by a fixed dither; or by one
whose seed is drawn each time."""

Kinds = tuple[int, int, int]
"""How products of the kind of the result, of a, and of b run."""


def form(x: Tensor, dim: int, kind: int, seed: int | None = None) -> tuple[Tensor, Tensor]:
    """The int8 form of a matrix ``[R, C]`` for a product that contracts ``dim``, and its scales: its rows for 1, its
    columns, transposed, for 0. ``kind``: ``INT8`` or ``ROTATED``."""
    y = kernels.hadamard(x, dim) if kind == ROTATED else x
    return kernels.quantize_rowwise(y, seed) if dim else kernels.quantize_colwise(y, seed)


def seeds_of(rounding: int) -> tuple[int | None, int | None]:
    """Of the rows and the columns of an incoming gradient, for ``form``; where rounding is ``STOCHASTIC``, one is drawn
    from torch's default CPU generator."""
    if rounding != STOCHASTIC:
        return None, 0 if rounding == DITHERED else None
    seed = int(torch.randint(2**63 - 1, ()))
    return seed, seed


def forms(
    x: Tensor, rows: int, columns: int, seeds: tuple[int | None, int | None] = (None, None)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(*form(x, 1, rows, seeds[0]), *form(x, 0, columns, seeds[1]))``, in one op where neither is rotated.
    ``seeds``: as ``seeds_of`` gives them."""
    if rows == columns == INT8:
        return kernels.quantize_both(x, seeds[1], seeds[0] is None)
    return *form(x, 1, rows, seeds[0]), *form(x, 0, columns, seeds[1])


def form_of_weight(matrix: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    """``form(matrix, 1, kind)`` of a matrix that may be the transpose of a contiguous one."""
    if matrix.is_contiguous() or not matrix.T.is_contiguous():
        return form(matrix, 1, kind)
    return form(matrix.T, 0, kind)


def product(a: Tensor, b: Tensor, kinds: Kinds) -> Tensor:
    """``a @ b.T`` of ``a [M, K]`` and ``b [N, K]``, ``[M, N]`` in a's dtype; gradients in the operands' dtypes."""
    return _Product.apply(a, b, kinds)  # type: ignore[no-untyped-call]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(a: Tensor, b: Tensor, kinds: Kinds) -> Tensor:
        if kinds[0] == HIGH or a.numel() == 0 or b.numel() == 0:
            return a @ b.to(a.dtype).T
        (aq, a_scales), (bq, b_scales) = form(a, 1, kinds[0]), form(b, 1, kinds[0])
        return kernels.int8_matmul(aq, bq, a_scales, b_scales, None, a.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Kinds], output: Tensor) -> None:
        a, b, ctx.kinds = inputs
        ctx.save_for_backward(a, b)
        ctx.save_for_forward(a, b)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        a, b = ctx.saved_tensors
        of_result, of_a, of_b = ctx.kinds
        da = product(dy, b.T, (of_a, of_result, of_b)).to(a.dtype) if ctx.needs_input_grad[0] else None
        db = product(dy.T, a.T, (of_b, of_result, of_a)).to(b.dtype) if ctx.needs_input_grad[1] else None
        return da, db, None

    @staticmethod
    def jvp(ctx: Any, da: Tensor | None, db: Tensor | None, _: None) -> Tensor:  # type: ignore[override]
        a, b = ctx.saved_tensors
        by_a = None if da is None else product(da, b, ctx.kinds)
        by_b = None if db is None else product(a, db, ctx.kinds)
        if by_a is None or by_b is None:
            return by_a if by_b is None else by_b  # type: ignore[return-value]
        return by_a + by_b

    @staticmethod
    def vmap(  # type: ignore[override]
        info: Any, in_dims: tuple[Any, Any, None], a: Tensor, b: Tensor, kinds: Kinds
    ) -> tuple[Tensor, int]:
        """Scales are per row, so that batches of one operand are more rows of it: the same numbers in one product."""
        a_dim, b_dim, _ = in_dims
        if b_dim is None:
            a = a.movedim(a_dim, 0)
            return product(a.flatten(0, 1), b, kinds).unflatten(0, a.shape[:2]), 0
        b = b.movedim(b_dim, 0)
        if a_dim is None:
            return product(a, b.flatten(0, 1), kinds).unflatten(1, b.shape[:2]), 1
        pairs = zip(a.movedim(a_dim, 0).unbind(), b.unbind(), strict=True)
        return torch.stack([product(*pair, kinds) for pair in pairs]), 0
