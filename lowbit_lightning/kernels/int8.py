"""Int8 matrices with a scale for each row or column."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit_lightning.kernels.arguments import FLOATS, as_int64
from lowbit_lightning.kernels.dispatch import declare


def quantize_rowwise(x: Tensor, seed: int | None = None) -> tuple[Tensor, Tensor]:
    """int8 ``[R, C]`` and float32 scales ``[R]`` (absmax / 127) of a matrix, one scale for a row.

    Args:
        x: float32, float16 or bfloat16 ``[R, C]``.
        seed: None rounds to nearest, ties to even. An int (its low 32 bits count) dithers: each element is rounded up
            or down without bias, as its place in the matrix says (``kernels.reference.words.dither``), with the same
            result on every backend.

    Raises:
        TypeError: if x is not such a matrix, or seed not an int.
    """
    return _rowwise(*_matrix_and_seed(x, seed))


def quantize_colwise(x: Tensor, seed: int | None = None) -> tuple[Tensor, Tensor]:
    """``quantize_rowwise`` of ``x.T``: int8 ``[C, R]``, contiguous, and float32 scales ``[C]``, of a float matrix
    ``[R, C]``. An element's dither is the one that ``quantize_rowwise(x, seed)`` gives it."""
    return _colwise(*_matrix_and_seed(x, seed))


def quantize_both(
    x: Tensor, seed: int | None = None, nearest_rows: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(*quantize_rowwise(x, seed), *quantize_colwise(x, seed))`` in one op that reads x less often.

    ``nearest_rows``: the seed is for the columns alone, and rows are rounded to nearest.
    """
    return _both(*_matrix_and_seed(x, seed), nearest_rows)


def quantize_channels(x: Tensor, seed: int | None = None) -> tuple[Tensor, Tensor]:
    """``quantize_colwise`` without the transposition: int8 ``[R, C]`` and float32 scales ``[C]``, one for a column."""
    return _channels(*_matrix_and_seed(x, seed))


def quantize_image(x: Tensor, seed: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(*quantize_rowwise(x, seed), *quantize_channels(x, seed))`` in one op: the two forms of the pixels of images,
    ``[pixels, channels]``."""
    return _image(*_matrix_and_seed(x, seed))


def hadamard(x: Tensor, dim: int) -> Tensor:
    """A matrix rotated along a dimension, by a block-diagonal orthogonal matrix that is its own inverse.

    Blocks of 64 elements, and what is left over in blocks of 32, 16, 8, 4, 2 and 1, are multiplied by ``D H D /
    sqrt(size)``: H is the Hadamard matrix in its natural order, D has fixed signs on its diagonal, so that equal
    elements are not summed up. A product does not change if both operands are rotated along the
    dimension that it contracts; an outlier in either of them is spread over its block, and costs 8 bits less.

    Args:
        x: float32, float16 or bfloat16 ``[R, C]``. dim: 0 or 1.

    Returns:
        ``[R, C]``, in bfloat16 if x is, and in float32 otherwise: sums could leave float16's range.

    Raises:
        TypeError, ValueError: for another matrix or dimension.
    """
    _matrix_and_seed(x, None)
    if dim not in (0, 1):
        raise ValueError(f"dim must be 0 or 1, got {dim!r}")
    return _hadamard(x, dim)


def _matrix_and_seed(x: Tensor, seed: int | None) -> tuple[Tensor, int | None]:
    if x.dtype not in FLOATS or x.ndim != 2:
        raise TypeError(f"x must be a float32, float16 or bfloat16 matrix, got {x.dtype} of shape {tuple(x.shape)}")
    if seed is not None and not isinstance(seed, (int, torch.SymInt)):
        raise TypeError(f"seed must be an int, or None to round to nearest, got {type(seed).__name__}")
    return x, None if seed is None else as_int64(seed)


def _form(x: Tensor, _: int | None) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, dtype=torch.int8, device=x.device), x.new_empty(x.shape[0], dtype=torch.float32)


def _rotated(x: Tensor, _: int) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32)


_hadamard = declare("hadamard(Tensor x, int dim) -> Tensor", fake=_rotated)
_rowwise = declare("quantize_rowwise(Tensor x, SymInt? seed) -> (Tensor, Tensor)", fake=_form)
_colwise = declare(
    "quantize_colwise(Tensor x, SymInt? seed) -> (Tensor, Tensor)", fake=lambda x, seed: _form(x.T, seed)
)
_both = declare(
    "quantize_both(Tensor x, SymInt? seed, bool nearest_rows=False) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=lambda x, seed, _=False: (*_form(x, seed), *_form(x.T, seed)),
)


def _channels_form(x: Tensor, seed: int | None) -> tuple[Tensor, Tensor]:
    q, _ = _form(x, seed)
    return q, x.new_empty(x.shape[1], dtype=torch.float32)


_channels = declare("quantize_channels(Tensor x, SymInt? seed) -> (Tensor, Tensor)", fake=_channels_form)
_image = declare(
    "quantize_image(Tensor x, SymInt? seed) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=lambda x, seed: (*_form(x, seed), *_channels_form(x, seed)),
)
