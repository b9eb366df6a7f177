"""The scaled int8 product, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def int8_matmul(
    a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """``(a @ b.T) * a_scales[:, None] * b_scales (+ bias)``: ``a`` int8 ``[M, K]``, ``b`` int8 ``[N, K]``, result
    ``[M, N]``.

    The sum over K is exact (int32); it is converted to float32 and multiplied by the smaller scale first, then by the
    larger: a large scale alone could overflow where the result does not. -128 is a number like any other. A sum of zero
    is +0.0, so the result's zeros have the sign of the scales' product. A NaN in either scale is kept, 0 * inf is NaN,
    and a result beyond ``out_dtype``'s range is infinite.
    """
    exact = (a.double() @ b.double().T).float() + 0.0  # -0.0, of products of zero, becomes 0.0
    of_a, of_b = torch.broadcast_tensors(a_scales.unsqueeze(1), b_scales)
    result = exact * torch.where(of_a < of_b, of_a, of_b) * torch.where(of_b > of_a, of_b, of_a)
    return (result if bias is None else result + bias.float()).to(out_dtype)
