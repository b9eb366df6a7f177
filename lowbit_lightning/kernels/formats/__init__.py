"""The formats: how numbers of 8 bits and fewer are coded, for optimizer states (``maps``) and weights (``weights``)."""

from lowbit_lightning.kernels.formats.maps import (
    DECADES,
    DEFAULT_BLOCK_SIZE,
    ENCODE_OFFSET,
    ENCODE_TOP,
    FOLD,
    MAPS,
    MAX_BLOCK_SIZE,
    MIN_BLOCK_SIZE,
    SMALLEST_SCALE,
    BlockGrid,
    DynamicMap,
    Span,
    check_block_size,
    check_codebook,
    check_name,
    codebook,
    cpp_tables,
    dynamic_map,
)
from lowbit_lightning.kernels.formats.weights import FITS, Format, check_fit, weight_format
