"""The ops: validate once, pick the backend by device, count calls.

``backend.py`` is the contract: what each backend offers (``reference``: plain torch, anywhere; ``cpu``: C++ by the
host's compiler; ``cuda``: CUDA C++ by NVRTC). ``dispatch.py`` declares ops to torch, in the namespace
``lowbit_lightning``, and says how to add one. ``blockwise``, ``int8``, ``int8_conv``, ``int8_grouped``,
``int8_product``, ``lowbit`` and ``step`` hold the ops; each backend has files of these names.

Nothing is compiled or loaded before the first call on a device. ``LOWBIT_LIGHTNING_BACKEND=reference`` forces the
reference everywhere, ``use_backend`` does so for a block of code.
"""

from lowbit_lightning.kernels.arguments import StepArguments, StepScalars
from lowbit_lightning.kernels.blockwise import dequantize_blockwise, quantize_blockwise
from lowbit_lightning.kernels.dispatch import calls, reset_calls, use_backend
from lowbit_lightning.kernels.int8 import (
    hadamard,
    quantize_both,
    quantize_channels,
    quantize_colwise,
    quantize_image,
    quantize_rowwise,
)
from lowbit_lightning.kernels.int8_conv import int8_conv, int8_conv_input, int8_conv_weight
from lowbit_lightning.kernels.int8_grouped import (
    int8_grouped_matmul,
    int8_grouped_outer,
    quantize_group_columns,
    quantize_groups,
)
from lowbit_lightning.kernels.int8_product import int8_matmul
from lowbit_lightning.kernels.lowbit import (
    int8_outlier_matmul,
    lowbit_dequantize,
    lowbit_embedding,
    lowbit_matmul,
    lowbit_quantize,
)
from lowbit_lightning.kernels.lowbit_grouped import lowbit_grouped_matmul
from lowbit_lightning.kernels.step import optimizer_norms, optimizer_step

__all__ = [
    "StepArguments",
    "StepScalars",
    "calls",
    "dequantize_blockwise",
    "hadamard",
    "int8_conv",
    "int8_conv_input",
    "int8_conv_weight",
    "int8_grouped_matmul",
    "int8_grouped_outer",
    "int8_matmul",
    "int8_outlier_matmul",
    "lowbit_dequantize",
    "lowbit_embedding",
    "lowbit_grouped_matmul",
    "lowbit_matmul",
    "lowbit_quantize",
    "optimizer_norms",
    "optimizer_step",
    "quantize_blockwise",
    "quantize_both",
    "quantize_channels",
    "quantize_colwise",
    "quantize_group_columns",
    "quantize_groups",
    "quantize_image",
    "quantize_rowwise",
    "reset_calls",
    "use_backend",
]
