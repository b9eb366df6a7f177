"""Change a model's layers in place, and back. Which ones, and the report, is the matter of ``layers.select``.

``int8``: layers that compute in int8 while their weights stay in high precision, for training. ``lowbit``: weights that
are kept in low bits. ``files``: checkpoints on disk that become low bits on the way in. ``bitsandbytes``: its files.
"""

from lowbit_lightning.convert.bitsandbytes import to_bitsandbytes
from lowbit_lightning.convert.files import empty_parameters, load_quantized
from lowbit_lightning.convert.int8 import MIN_FEATURES, NothingToSwap, restore, swap_linears
from lowbit_lightning.convert.lowbit import WeightReport, dequantize, quantize, weight_report
from lowbit_lightning.layers.select import Report

__all__ = [
    "MIN_FEATURES",
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
