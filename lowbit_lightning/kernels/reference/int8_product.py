"""The scaled int8 product, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def int8_matmul(
    a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """``(a @ b.T) * a_scales[:, None] * b_scales (+ bias)``: ``a`` int8 ``[M, K]``, ``b`` int8 ``[N, K]``, result
    ``[M, N]``.

    The sum over K is exact (int32); it is converted to float32 and scaled left to right.
    """
    exact = (a.double() @ b.double().T).float()
    result = exact * a_scales.unsqueeze(1) * b_scales
    return (result if bias is None else result + bias.float()).to(out_dtype)
