"""The ops: validate once, pick the backend by device, count calls.

Backends are modules of equal functions: ``reference`` (plain torch, anywhere), ``cpu`` (C++ by the host's compiler)
and ``cuda`` (CUDA C++ by NVRTC). Nothing is compiled or loaded before the first call on a device.
``LOWBIT_LIGHTNING_BACKEND=reference`` forces the reference everywhere, ``use_backend`` does so for a block of code.

Every op is registered with ``torch.library`` in the namespace ``lowbit_lightning``, with a fake implementation and
its mutated arguments, so that autograd, ``torch.compile`` and version counters know what it touches.

``blockwise``, ``step`` and ``int8`` hold the ops, ``backends`` what runs them.
"""

from lowbit_lightning.kernels.arguments import StepArguments
from lowbit_lightning.kernels.backends import calls, reset_calls, use_backend
from lowbit_lightning.kernels.blockwise import dequantize_blockwise, quantize_blockwise
from lowbit_lightning.kernels.int8 import (
    int8_matmul,
    quantize_both,
    quantize_colwise,
    quantize_rowwise,
)
from lowbit_lightning.kernels.step import optimizer_norms, optimizer_step

__all__ = [
    "StepArguments",
    "calls",
    "dequantize_blockwise",
    "int8_matmul",
    "optimizer_norms",
    "optimizer_step",
    "quantize_blockwise",
    "quantize_both",
    "quantize_colwise",
    "quantize_rowwise",
    "reset_calls",
    "use_backend",
]
