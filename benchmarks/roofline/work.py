"""The kernels that the roofline looks at."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch

from lowbit_lightning import kernels, optim
from lowbit_lightning.kernels import rules
from lowbit_lightning.kernels.cuda.int8_product import fused_product
from lowbit_lightning.kernels.sources import MAP_NUMBERS, StepVariant, specialised
from roofline.describe import BF16, F32, NAMES, Phase, Work, random


def works() -> Iterator[Work]:
    yield from _steps()
    yield from _blockwise()
    yield from _int8()


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": optim.AdamW,
    "adam": optim.Adam,
    "lion": optim.Lion,
    "sgd_momentum": partial(optim.SGD, momentum=0.9),
    "rmsprop": optim.RMSprop,
    "adagrad": optim.Adagrad,
    "ademamix": optim.AdEMAMix,
}


def _steps() -> Iterator[Work]:
    for (rule, make), dtype in product(OPTIMIZERS.items(), (F32, BF16)):
        states = len(rules.get(rule).states)
        # A quantisation block of 256 is a warp's: eight elements a lane, and the scale of each state.
        loads = 8 * (2 * dtype.itemsize + states) + 4 * states
        stores = 8 * (dtype.itemsize + states) + 4 * states
        text = StepVariant(rule, dtype, dtype, (1 << states) - 1, 256).text("optimizer_step.cu")
        traffic = 3 * dtype.itemsize + 2 * states * (1 + 4 / 256)
        run = partial(_take_steps, make, dtype)
        # The gradient's factor, the rule; of a state two to decode, two to encode.
        phase = Phase("step", 8, loads, stores, arithmetic=8 * (1 + operations(rules.get(rule)) + 4 * states))
        yield Work(f"{rule} {NAMES[dtype]}", text, (phase,), run, traffic, "parameter")


def operations(rule: rules.Rule) -> int:
    """Sums and products that a rule takes for an element: what depends on scalars alone is computed once a block."""
    known = {*rule.elementwise_scalars, *(f"{name}_scale" for name in rule.state_names)}
    found = 0
    for node in ast.walk(ast.parse(rule.sections["direction"] + rule.sections["finish"])):
        calls = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
        names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
        if isinstance(node, ast.BinOp) or calls == "fused":
            found += not names <= known
        elif calls == "over_root":
            found += 3 + 4 + 7  # its own, a root by Newton's method, a quotient
    return found


def _take_steps(make: Callable[..., torch.optim.Optimizer], dtype: torch.dtype) -> None:
    parameter = torch.nn.Parameter(random(16, 512, dtype))
    optimizer = make([parameter], lr=1e-3)
    for _ in range(2):
        parameter.grad = random(16, 512, dtype)
        optimizer.step()


def _blockwise() -> Iterator[Work]:
    for dtype in (F32, BF16):
        text = specialised("quantize.cu", ELEMENT=dtype, MAP=MAP_NUMBERS["dynamic_signed"], BLOCK=256)
        size, traffic = dtype.itemsize, dtype.itemsize + 1 + 4 / 256
        x = random(16, 512, dtype)
        coded = kernels.quantize_blockwise(x)
        phase = Phase("quantize", 8, 8 * size, 8 + 4, whole=True)
        run: Callable[[], object] = partial(kernels.quantize_blockwise, x)
        yield Work(f"quantize {NAMES[dtype]}", text, (phase,), run, traffic, "element")
        phase = Phase("dequantize", 8, 8 + 4, 8 * size, whole=True)
        run = partial(kernels.dequantize_blockwise, *coded, dtype=dtype)
        yield Work(f"dequantize {NAMES[dtype]}", text, (phase,), run, traffic, "element")


def _int8() -> Iterator[Work]:
    for dtype in (F32, BF16):
        width = 16 // dtype.itemsize  # elements of an access
        text = specialised("int8.cu", ELEMENT=dtype, ROW_THREADS=256, STOCHASTIC=False)
        several = (1, 2, 4, 8)
        rows = (
            Phase("quantize_rows", width, 16, unrolled=several),
            Phase("quantize_rows", width, 16, width, unrolled=several),
        )
        run: Callable[[], object] = partial(kernels.quantize_rowwise, random(4, 2048, dtype))
        yield Work(f"int8 rows {NAMES[dtype]}", text, rows, run, dtype.itemsize + 1, "element")
        both = (
            Phase("find_tops", 4 * width, 64),
            Phase("quantize_tiles", 4 * width, 64 + 16, 2 * 4 * width),
        )
        run = partial(kernels.quantize_both, random(128, 256, dtype))
        yield Work(f"int8 rows and columns {NAMES[dtype]}", text, both, run, 2 * dtype.itemsize + 2, "element")
    a = torch.randint(-127, 128, (256, 256), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    multiply = partial(fused_product, a, a, torch.ones(256), torch.ones(256), None, BF16)
    for tile_n in (128, 256):
        text = specialised("int8_product.cu", ELEMENT=BF16, BIAS=F32, TILE_N=tile_n, STAGES=3)
        # A step of 64 along K: each warp multiplies 64 x 64 x 64, by instructions of 16 x 8 x 32.
        phase = Phase("int8_product", 64 * 64 * 64 / 32, (128 + tile_n) * 64 // tile_n, tensor=64)
        yield Work(
            *(f"int8 product, tiles of 128 x {tile_n}", text, (phase,), multiply),
            traffic=0.0,
            unit="multiplication",
            threads=tile_n,
            operations=2.0,
            shared=3 * (128 + tile_n) * 64,
        )
