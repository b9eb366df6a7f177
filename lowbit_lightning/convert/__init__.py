"""Change a model's layers in place, and back. ``layers.select`` chooses the layers and makes the report.

``int8``: layers that compute in int8 and keep their weights in high precision, for training. ``lowbit``: weights that
are stored in low bits. ``files``: checkpoints on disk that are quantised while they are loaded. ``bitsandbytes``: files
of bitsandbytes.
"""

from lowbit_lightning.convert.bitsandbytes import to_bitsandbytes
from lowbit_lightning.convert.files import empty_parameters, load_quantized
from lowbit_lightning.convert.int8 import MIN_FEATURES, NothingToSwap, restore, swap_linears
from lowbit_lightning.convert.lowbit import NothingToQuantize, WeightReport, dequantize, quantize, weight_report
from lowbit_lightning.layers.select import Report

__all__ = [
    "MIN_FEATURES",
    "NothingToQuantize",
    "NothingToSwap",
    "Report",
    "WeightReport",
    "dequantize",
    "empty_parameters",
    "load_quantized",
    "quantize",
    "restore",
    "swap_linears",
    "to_bitsandbytes",
    "weight_report",
]
