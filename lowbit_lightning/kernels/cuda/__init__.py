"""The CUDA backend: CUDA C++ from ``src/``, compiled by NVRTC for the device at hand, on torch's current stream.

Every function takes the device's tensors, allocates its results with torch and describes launches (``launch.py``). None
waits for the device, so all of them can be captured in a CUDA graph. Texts are specialised by macros, one for each
combination of types and block size that occurs.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from lowbit_lightning.kernels import formats, rules
from lowbit_lightning.kernels.arguments import StepArguments
from lowbit_lightning.kernels.compile import source_text
from lowbit_lightning.kernels.cuda import launch
from lowbit_lightning.kernels.cuda.int8 import quantize_both, quantize_colwise, quantize_rowwise
from lowbit_lightning.kernels.cuda.int8_product import int8_matmul
from lowbit_lightning.kernels.cuda.launch import Launch, load
from lowbit_lightning.kernels.cuda.table import parameter_table
from lowbit_lightning.kernels.cuda.types import CPP_TYPES, ceil_div
from lowbit_lightning.kernels.formats import BlockGrid

__all__ = [
    "dequantize_blockwise",
    "int8_matmul",
    "load",
    "optimizer_norms",
    "optimizer_step",
    "quantize_blockwise",
    "quantize_both",
    "quantize_colwise",
    "quantize_rowwise",
]

_MAPS = {"dynamic_signed": 0, "dynamic_unsigned": 1, "custom": 2}
_FILL = 2048  # CUDA blocks that keep a large GPU busy; with more work than that, each takes several turns
_TURNS = 8


def _geometry(block_size: int) -> tuple[int, int]:
    """Threads of a CUDA block, and how many quantisation blocks it handles at a time: as in src/group.h."""
    group = block_size // 8
    threads = max(256, group)
    return threads, threads // group


# -- block-wise quantisation -----------------------------------------------------------------------------------------


@cache
def quantize_text(dtype: torch.dtype, codebook: str, block_size: int) -> str:
    """src/quantize.cu for one dtype, codebook and block size."""
    macros = f"#define ELEMENT {CPP_TYPES[dtype]}\n#define MAP {_MAPS[codebook]}\n#define BLOCK {block_size}"
    return source_text("quantize.cu", prelude=macros, generated={"dynamic_tables.h": formats.cpp_tables()})


def quantize_blockwise(x: Tensor, codebook: str, values: Tensor | None, block_size: int) -> tuple[Tensor, Tensor]:
    """See ``reference.quantize_blockwise``; equal to it to the bit."""
    grid = BlockGrid.of(x.shape, block_size)
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    scales = torch.empty(grid.scales_shape, dtype=torch.float32, device=x.device)
    if x.numel():
        arguments = (x, *_rows(grid), *_codebook(values), codes, scales)
        _run_blocks(quantize_text(x.dtype, codebook, block_size), "quantize", grid, arguments)
    return codes, scales


def dequantize_blockwise(
    codes: Tensor, scales: Tensor, codebook: str, values: Tensor | None, block_size: int, dtype: torch.dtype
) -> Tensor:
    """See ``reference.dequantize_blockwise``; equal to it to the bit."""
    grid = BlockGrid.of(codes.shape, block_size)
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    if codes.numel():
        arguments = (codes, scales, *_rows(grid), *_codebook(values), out)
        _run_blocks(quantize_text(dtype, codebook, block_size), "dequantize", grid, arguments)
    return out


def _rows(grid: BlockGrid) -> tuple[ctypes.c_int64, ctypes.c_int64]:
    return ctypes.c_int64(grid.rows), ctypes.c_int64(grid.row_length)


def _codebook(values: Tensor | None) -> tuple[Tensor | None, ctypes.c_int]:
    return values, ctypes.c_int(0 if values is None else values.numel())


def _run_blocks(text: str, kernel: str, grid: BlockGrid, arguments: tuple) -> None:
    threads, at_a_time = _geometry(grid.block_size)
    count = ceil_div(grid.rows * grid.blocks_per_row, at_a_time)
    launch.run(Launch(text, kernel, (count, 1, 1), threads, arguments))


# -- optimizer step --------------------------------------------------------------------------------------------------


@cache
def optimizer_text(
    source: str,
    rule: str,
    param: torch.dtype,
    grad: torch.dtype,
    coded: int,
    block_size: int,
    stochastic: bool = False,
    remainder: bool = False,
) -> str:
    """src/optimizer_step.cu or _norms.cu for one combination; bit s of ``coded``: state s is 8-bit codes."""
    macros = {
        "PARAM": CPP_TYPES[param],
        "GRAD": CPP_TYPES[grad],
        "CODED": coded,
        "BLOCK": block_size,
        "STOCHASTIC": int(stochastic),
        "REMAINDER": int(remainder),
    }
    defines = "\n".join(f"#define {name} {value}" for name, value in macros.items())
    generated = {"rule.h": rules.get(rule).cpp(), "dynamic_tables.h": formats.cpp_tables()}
    return source_text(source, prelude=defines, generated=generated)


@cache
def prepare_text(rule: str) -> str:
    """src/optimizer_prepare.cu for a rule."""
    return source_text("optimizer_prepare.cu", generated={"rule.h": rules.get(rule).cpp()})


def optimizer_step(arguments: StepArguments, norms: Tensor | None) -> None:
    """See ``reference.optimizer_step``; equal to it to the bit."""
    _Step(arguments).step(norms)


def optimizer_norms(arguments: StepArguments) -> Tensor:
    """See ``reference.optimizer_norms``; equal to it to the bit."""
    return _Step(arguments).norms()


class _Step:
    """The launches of one step: ``prepare``, then ``step`` or the norms."""

    def __init__(self, arguments: StepArguments) -> None:
        self.arguments = arguments
        self.rule = rules.get(arguments.rule)
        self.count = len(arguments.params)
        self.table, self.blocks = parameter_table(arguments)
        self.scalars = self._empty(self.count * max(1, len(self.rule.elementwise_scalars)), torch.float32)
        self.factor = self._empty(1, torch.float32)

    def step(self, norms: Tensor | None) -> None:
        a = self.arguments
        text = self._text("optimizer_step.cu", a.stochastic_rounding and a.params[0].dtype == torch.bfloat16)
        self._prepare(a.skip, norms, advance=True)
        self._run_blocks(text, "step", self.scalars, self.factor, a.skip, ctypes.c_uint64(a.seed & (2**64 - 1)))

    def norms(self) -> Tensor:
        kinds = len(self.rule.norms)
        out = torch.empty(self.count, kinds, dtype=torch.float64, device=self.arguments.device)
        if not kinds:
            return out
        text = self._text("optimizer_norms.cu")
        sums, other = (self._empty(kinds * self.blocks, torch.float64) for _ in range(2))
        self._prepare(None, None, advance=False)
        self._run_blocks(text, "norm_blocks", self.scalars, self.factor, sums)
        fold = self.table, ctypes.c_int64(self.blocks), sums, other, out
        launch.run(Launch(text, "norm_fold", (self.count, kinds, 1), 256, fold))
        return out

    def _text(self, source: str, stochastic: bool = False) -> str:
        a = self.arguments
        coded = sum(1 << s for s, state in enumerate(a.states) if state[0].dtype == torch.uint8)
        dtypes = a.params[0].dtype, a.grads[0].dtype
        return optimizer_text(source, a.rule, *dtypes, coded, a.block_size, stochastic, bool(a.remainders))

    def _prepare(self, skip: Tensor | None, norms: Tensor | None, advance: bool) -> None:
        a = self.arguments
        hyper = (ctypes.c_double * max(1, len(a.hyper)))(*a.hyper)
        flags = ctypes.c_int(a.maximize), ctypes.c_int(advance)
        head = self.table, ctypes.c_int64(self.count), hyper
        arguments = *head, a.lr, a.unscale, a.clip, skip, norms, *flags, self.scalars, self.factor
        self._run(prepare_text(a.rule), "prepare", ceil_div(self.count, 128), 128, arguments)

    def _run_blocks(self, text: str, kernel: str, *arguments: object) -> None:
        threads, at_a_time = _geometry(self.arguments.block_size)
        if not self.blocks:
            return
        turns = min(_TURNS, max(1, self.blocks // (at_a_time * _FILL)))
        counts = ctypes.c_int64(self.count), ctypes.c_int64(self.blocks), ctypes.c_int(turns)
        grid = ceil_div(self.blocks, at_a_time * turns)
        self._run(text, kernel, grid, threads, (self.table, *counts, *arguments))

    def _run(self, text: str, kernel: str, grid: int, block: int, arguments: tuple) -> None:
        launch.run(Launch(text, kernel, (grid, 1, 1), block, arguments, self._memory))

    def _memory(self) -> list[Tensor]:
        a = self.arguments
        return [*a.params, *a.grads, *a.steps, *a.remainders, *(t for s in (*a.states, *a.scales) for t in s)]

    def _empty(self, count: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(count, dtype=dtype, device=self.arguments.device)
