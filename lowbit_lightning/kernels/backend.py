"""The interface of a backend, and the list of its ops.

A backend is a folder of ``kernels`` with a ``load`` function and one file for each class below. The file has the
functions of that class. The functions of ``reference`` define the results, and those of ``cpu`` and ``cuda`` are equal
to them bit for bit. If a folder's name is a device type (``torch.device.type``), it serves that device.

The functions may rely on this (``dispatch.py`` and the ops ensure it): arguments have been checked, and all tensors are
contiguous and on one device. The functions return new tensors, do not synchronise with the device, and keep no
reference to their arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lowbit_lightning.kernels.arguments import Scaled, StepArguments, StepScalars


class Load(Protocol):
    """``__init__.py``."""

    def load(self) -> None:
        """Raise ``CompilerNotFound``, which says what to install, if the backend cannot run. Compiles nothing."""


class Blockwise(Protocol):
    """``blockwise.py``: 8-bit codes with a scale for each block.

    ``codebook``: ``"dynamic_signed"``, ``"dynamic_unsigned"``, or ``"custom"`` with its float32 ``values``.
    """

    def quantize_blockwise(
        self, x: Tensor, codebook: str, values: Tensor | None, block_size: int
    ) -> tuple[Tensor, Tensor]:
        """Codes, uint8 of x's shape, and scales, float32 ``[rows, blocks_per_row]``."""

    def dequantize_blockwise(
        self,
        codes: Tensor,
        scales: Tensor,
        codebook: str,
        values: Tensor | None,
        block_size: int,
        dtype: torch.dtype,
    ) -> Tensor:
        """The values, of the codes' shape, in ``dtype``."""


class Int8(Protocol):
    """``int8.py``: int8 matrices with a float32 scale for each row or column."""

    def quantize_rowwise(self, x: Tensor, seed: int | None) -> tuple[Tensor, Tensor]:
        """int8 ``[R, C]`` and scales ``[R]`` of x ``[R, C]``."""

    def quantize_colwise(self, x: Tensor, seed: int | None) -> tuple[Tensor, Tensor]:
        """int8 ``[C, R]`` and scales ``[C]`` of x ``[R, C]``."""

    def quantize_both(
        self, x: Tensor, seed: int | None, nearest_rows: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The results of both, in this order; ``nearest_rows``: rows are rounded to nearest whatever the seed."""

    def quantize_channels(self, x: Tensor, seed: int | None) -> tuple[Tensor, Tensor]:
        """int8 ``[R, C]`` and scales ``[C]`` of x ``[R, C]``."""

    def quantize_image(self, x: Tensor, seed: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The results of ``quantize_rowwise`` and ``quantize_channels``, in this order."""

    def hadamard(self, x: Tensor, dim: int) -> Tensor:
        """x ``[R, C]`` rotated along dimension 0 or 1, in bfloat16 if x is, and in float32 otherwise."""


class Int8Conv(Protocol):
    """``int8_conv.py``: the products of a convolution. A batch has ``images`` images of R pixels, results of M each. An
    operand is int8 and its float32 scales.

    ``table``: int32 ``[M, T]``, not empty: the pixel that tap t of a result's window reads, or -1 outside the image.
    No pixel is read twice by one tap.
    """

    def int8_conv(
        self, a: Scaled, b: Scaled, table: Tensor, images: int, bias: Tensor | None, out_dtype: torch.dtype
    ) -> Tensor:
        """``[images * M, N]`` of a ``[images * R, K]`` and b ``[N, T, K]``."""

    def int8_conv_input(
        self, a: Scaled, b: Scaled, table: Tensor, images: int, pixels: int, out_dtype: torch.dtype
    ) -> Tensor:
        """``[images * R, N]`` of a ``[images * M, K]`` and b ``[K, T, N]``; ``pixels`` is R."""

    def int8_conv_weight(self, a: Scaled, b: Scaled, table: Tensor, images: int, out_dtype: torch.dtype) -> Tensor:
        """``[N, T, K]`` of a ``[N, images * M]`` and b ``[images * R, K]``."""


class Int8Product(Protocol):
    """``int8_product.py``."""

    def int8_matmul(
        self, a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor, bias: Tensor | None, out_dtype: torch.dtype
    ) -> Tensor:
        """``(a @ b.T) * a_scales[:, None] * b_scales (+ bias)``, ``[M, N]`` in ``out_dtype``. Sums fit into int32."""


class Int8Grouped(Protocol):
    """``int8_grouped.py``: matrices whose rows are sorted into groups. ``ends``: the row after the last one of each,
    ascending. Rows after the last end are of no group; their results are zeros.

    *Group columns* ``[S, C]`` hold each group transposed, ``[C, rows]``, in its rows.
    """

    def quantize_groups(
        self, x: Tensor, ends: Sequence[int], seed: int | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """int8 ``[S, C]`` and scales ``[S]`` of x ``[S, C]``; its group columns, int8, and scales ``[E, C]``."""

    def quantize_group_columns(self, x: Tensor, ends: Sequence[int], seed: int | None) -> tuple[Tensor, Tensor]:
        """The group columns and their scales."""

    def int8_grouped_matmul(
        self,
        a: Tensor,
        b: Tensor,
        a_scales: Tensor,
        b_scales: Tensor,
        ends: Sequence[int],
        bias: Tensor | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        """``[S, N]`` of a ``[S, K]`` and b ``[E, N, K]``. Sums fit into int32."""

    def int8_grouped_outer(
        self, a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor, ends: Sequence[int], out_dtype: torch.dtype
    ) -> Tensor:
        """``[E, N, K]`` of group columns a ``[S, N]`` and b ``[S, K]``. Sums fit into int32."""


class LowBit(Protocol):
    """``lowbit.py``: weights of 8 to 2 bits. ``form`` is the ``str`` of a ``formats.Format``, ``row_length`` is K."""

    def lowbit_quantize(self, weight: Tensor, form: str, fit: str) -> tuple[Tensor, Tensor]:
        """uint8 ``[..., packed_width]`` and scales ``[..., scales_width]`` of a weight ``[..., K]``."""

    def lowbit_dequantize(
        self, packed: Tensor, scales: Tensor, form: str, row_length: int, dtype: torch.dtype
    ) -> Tensor:
        """The weight ``[..., K]`` in ``dtype``."""

    def lowbit_gemv(self, x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, form: str) -> Tensor:
        """``lowbit_matmul`` for x ``[..., K]`` of 1 to ``lowbit.FEW_ROWS`` rows. It reads the weight once."""

    def lowbit_matmul(self, x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, form: str) -> Tensor:
        """``x @ weight.T (+ bias)``, ``[M, N]`` in x's dtype, for x ``[M, K]`` and a weight ``[N, K]``; neither is
        empty."""

    def lowbit_matmul_backward(self, dy: Tensor, packed: Tensor, scales: Tensor, form: str, row_length: int) -> Tensor:
        """``dy @ weight``, ``[M, K]`` in dy's dtype, for dy ``[M, N]`` and a weight ``[N, K]``; neither is empty."""

    def split_outliers(
        self, x: Tensor, packed: Tensor, scales: Tensor, threshold: float
    ) -> tuple[Tensor, Tensor | None]:
        """x ``[M, K]`` with zeros in its outlier columns, and these columns' product with an int8 weight ``[N, K]``,
        float32 ``[M, N]``. A backend that knows without waiting that there are none returns x and None."""

    def lowbit_embedding(
        self, packed: Tensor, scales: Tensor, indices: Tensor, form: str, row_length: int, dtype: torch.dtype
    ) -> Tensor:
        """Rows of a weight ``[rows, K]``: ``[*indices.shape, K]`` in ``dtype``."""


class Step(Protocol):
    """``step.py``: the optimizer step. All gradients have one dtype. A parameter and its gradient are both contiguous;
    on the CPU (``cpu`` and ``reference``) both may be channels_last, of four or five dimensions."""

    def optimizer_step(
        self, arguments: StepArguments, grads: Sequence[Tensor], scalars: StepScalars, norms: Tensor | None
    ) -> None:
        """One step, in place. ``norms``: sums of squares, float64 ``[n, len(rule.norms)]``; None for rules without."""

    def optimizer_norms(self, arguments: StepArguments, grads: Sequence[Tensor], scalars: StepScalars) -> Tensor:
        """The sums of squares, float64 ``[n, len(rule.norms)]``. Changes nothing."""


FILES: dict[str, type] = {
    "blockwise": Blockwise,
    "int8": Int8,
    "int8_conv": Int8Conv,
    "int8_grouped": Int8Grouped,
    "int8_product": Int8Product,
    "lowbit": LowBit,
    "step": Step,
}
"""The files of a backend."""
OPS = {op: file for file, contract in FILES.items() for op in vars(contract) if not op.startswith("_")}
"""Every op that backends run, and its file."""
BACKENDS = tuple(sorted({path.parent.name for file in FILES for path in Path(__file__).parent.glob(f"*/{file}.py")}))
"""The folders that are backends."""
