"""Low-bit weights by plain torch, as the reference has them."""

from lowbit_lightning.kernels.reference.lowbit import (
    lowbit_dequantize,
    lowbit_embedding,
    lowbit_gemv,
    lowbit_matmul,
    lowbit_matmul_backward,
    lowbit_quantize,
)

__all__ = [
    "lowbit_dequantize",
    "lowbit_embedding",
    "lowbit_gemv",
    "lowbit_matmul",
    "lowbit_matmul_backward",
    "lowbit_quantize",
]
