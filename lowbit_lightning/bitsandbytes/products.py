"""``bitsandbytes.matmul`` and ``matmul_4bit``: products with quantised weights, differentiable in the input and the
bias; with a float weight in the weight too."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit_lightning import kernels
from lowbit_lightning.bitsandbytes import functional
from lowbit_lightning.bitsandbytes.quant_state import QuantState
from lowbit_lightning.layers.ops import int8_linear
from lowbit_lightning.layers.product import HIGH, INT8


@dataclass(eq=False)
class MatmulLtState:
    """What ``matmul`` knows of its second operand: ``CB``, int8 codes ``[N, K]``, and ``SCB``, the rows' largest
    magnitudes; ``threshold`` from which an element of the first is an outlier; ``has_fp16_weights``: whether the
    operand is quantised anew in each call. The other fields are bitsandbytes' and have no effect."""

    CB: Tensor | None = None
    SCB: Tensor | None = None
    threshold: float = 0.0
    has_fp16_weights: bool = True
    is_training: bool = True
    use_pool: bool = False
    force_no_igemmlt: bool = False
    idx: Tensor | None = None

    def reset_grads(self) -> None:
        """Forget the codes."""
        self.CB = self.SCB = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MatmulLtState) and all(_same(vars(self)[k], vars(other)[k]) for k in vars(self))


def _same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b


def matmul(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    state: MatmulLtState | None = None,
    threshold: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """``A @ B.T (+ bias)`` in int8 (LLM.int8()), in A's dtype.

    Args:
        A: float32, float16 or bfloat16 ``[..., K]``; nothing passes through float16.
        B: ``[N, K]``, int8 codes that ``state`` describes, or floats. Floats are quantised by rows: in each call if
            ``state.has_fp16_weights``, else once, into ``state``.
        threshold: replaces ``state.threshold`` if it is positive.

    Raises:
        TypeError, ValueError: naming the argument and what is allowed.
    """
    state = state or MatmulLtState()
    if threshold:
        state.threshold = threshold
    if B.is_floating_point() and state.has_fp16_weights and B.requires_grad and torch.is_grad_enabled():
        found = _trained(A, B, bias)
    else:
        if state.CB is None or state.SCB is None or (state.has_fp16_weights and B.is_floating_point()):
            state.CB, state.SCB, _ = functional.int8_vectorwise_quant(B)
        codes, scales = state.CB.view(torch.uint8), (state.SCB.float() / 127).unsqueeze(1)
        found = kernels.int8_outlier_matmul(A, codes, scales, bias, state.threshold)
    return found if out is None else out.copy_(found)


def _trained(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product of a weight that is trained: output and weight gradient in int8, input gradient in high precision."""
    y, *_ = int8_linear(x.reshape(-1, x.shape[-1]), weight, bias, INT8, HIGH, INT8, True, False)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def matmul_4bit(
    A: Tensor, B: Tensor, quant_state: QuantState, out: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """``A @ weight.T (+ bias)`` in A's dtype, of a weight ``[N, K]`` that ``functional.quantize_4bit`` made ``B`` of.

    Raises:
        TypeError, ValueError: naming the argument and what is allowed.
    """
    if quant_state is None:
        raise ValueError("quant_state must be what functional.quantize_4bit returned, got None")
    if len(quant_state.shape) != 2:
        raise ValueError(f"the weight must be of shape [N, K], got {tuple(quant_state.shape)}")
    rows, length = quant_state.shape
    if A.shape[-1] == rows != length:
        warnings.warn(
            f"the weight was quantised as [K, N] = {[rows, length]}: it is decoded and transposed in each product. "
            "Re-quantize from the weight in [N, K] (out_features, in_features)",
            DeprecationWarning,
            stacklevel=2,
        )
        weight = functional.dequantize_4bit(B.reshape(-1, 1), quant_state).to(A.dtype)
        found = torch.nn.functional.linear(A, weight.T, bias)
    else:
        found = functional.linear_4bit(A, B, quant_state, bias)
    return found if out is None else out.copy_(found)
