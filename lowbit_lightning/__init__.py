"""lowbit_lightning: train in low-bit arithmetic under PyTorch Lightning, with optimizer state in 8 bits.

Importing it makes ``precision="int8-mixed"`` known to ``lightning.Trainer`` and ``lightning.Fabric``. It touches no
GPU and starts no compiler.
"""

from lowbit_lightning import callbacks, convert, kernels, layers, memory, optim, precision, strategies
from lowbit_lightning.convert import dequantize, load_quantized, quantize
from lowbit_lightning.precision import Int8MixedPrecision, LowBitWeights

__all__ = [
    "Int8MixedPrecision",
    "LowBitWeights",
    "callbacks",
    "convert",
    "dequantize",
    "kernels",
    "layers",
    "load_quantized",
    "memory",
    "optim",
    "precision",
    "quantize",
    "strategies",
]
__version__ = "0.1.0"

precision.register()
strategies.register()
