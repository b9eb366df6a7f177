"""The kernels that the roofline looks at."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch

from lowbit_lightning import kernels, optim
from lowbit_lightning.kernels import rules
from lowbit_lightning.kernels.cuda import int8_wgmma
from lowbit_lightning.kernels.cuda.int8_product import fused_product
from roofline.describe import BF16, F32, NAMES, Phase, Work, random
from roofline.lowbit import lowbit_works


def works() -> Iterator[Work]:
    yield from _steps()
    yield from _blockwise()
    yield from _int8()
    yield from _products()
    yield from lowbit_works()


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
        states = rules.get(rule).states
        coded = sum(not state.slow for state in states)  # a slow one has 32 bits
        wide = 4 * (len(states) - coded)
        # A quantisation block of 256 is a warp's: eight elements a lane, and the scale of each coded state.
        loads = 8 * (2 * dtype.itemsize + coded + wide) + 4 * coded
        stores = 8 * (dtype.itemsize + coded + wide) + 4 * coded
        traffic = 3 * dtype.itemsize + 2 * (coded * (1 + 4 / 256) + wide)
        run = partial(_take_steps, make, dtype)
        # The gradient's factor, the rule; of a coded state two to decode, two to encode.
        phase = Phase("step", 8, loads, stores, arithmetic=8 * (1 + operations(rules.get(rule)) + 4 * coded))
        yield Work(f"{rule} {NAMES[dtype]}", (phase,), run, traffic, "parameter")


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
        size, traffic = dtype.itemsize, dtype.itemsize + 1 + 4 / 256
        x = random(16, 512, dtype)
        coded = kernels.quantize_blockwise(x)
        phase = Phase("quantize", 8, 8 * size, 8 + 4, arithmetic=2 * 8)
        run: Callable[[], object] = partial(kernels.quantize_blockwise, x)
        yield Work(f"quantize {NAMES[dtype]}", (phase,), run, traffic, "element")
        phase = Phase("dequantize", 8, 8 + 4, 8 * size, arithmetic=3 * 8, unrolled=(1, 2, 4))
        run = partial(kernels.dequantize_blockwise, *coded, dtype=dtype)
        yield Work(f"dequantize {NAMES[dtype]}", (phase,), run, traffic, "element")


def _int8() -> Iterator[Work]:
    for dtype in (F32, BF16):
        width = 16 // dtype.itemsize  # elements of an access
        several = (1, 2, 4, 8)
        rows = (
            Phase("quantize_rows", width, 16, unrolled=several),
            Phase("quantize_rows", width, 16, width, unrolled=several),
        )
        run: Callable[[], object] = partial(kernels.quantize_rowwise, random(4, 2048, dtype))
        yield Work(f"int8 rows {NAMES[dtype]}", rows, run, dtype.itemsize + 1, "element")
        both = (
            Phase("find_tops", 4 * width, 64),
            Phase("quantize_tiles", 4 * width, 64 + 16, 2 * 4 * width),
        )
        run = partial(kernels.quantize_both, random(128, 256, dtype))
        yield Work(f"int8 rows and columns {NAMES[dtype]}", both, run, 2 * dtype.itemsize + 2, "element")


def _products() -> Iterator[Work]:
    a = torch.randint(-127, 128, (256, 256), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(8192)
    multiply = partial(fused_product, a, a, ones[:256], ones[:256], None, BF16)
    for tile_n in (128, 256):
        # A step of 64 along K: each warp multiplies 64 x 64 x 64, by instructions of 16 x 8 x 32.
        phase = Phase("int8_product", 64 * 64 * 64 / 32, (128 + tile_n) * 64 // tile_n, tensor=64, ahead=2)
        tall, wide = torch.empty(8192, 64, dtype=torch.int8), torch.empty(4 * tile_n, 64, dtype=torch.int8)
        large = partial(fused_product, tall, wide, ones, ones[: 4 * tile_n], None, BF16)
        name = f"int8 product, tiles of 128 x {tile_n}"
        yield Work(name, (phase,), multiply, 0.0, "multiplication", operations=2.0, large=large)
    for tile in int8_wgmma.TILES:
        yield _wgmma(*tile)
    yield _convolution()


def _wgmma(tile_m: int, tile_n: int) -> Work:
    """A step of 128 along K: each group of four warps multiplies 64 rows of A by all columns of the tile, by four
    instructions, which read both from shared memory. 256 threads copy."""
    groups = tile_m // 64
    phase = Phase(
        *("int8_product_wgmma", tile_n * 64, (tile_m + tile_n) * 128 // min(128 * groups, 256)), tensor=4, ahead=2
    )
    a = torch.randint(-127, 128, (tile_m, 256), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    b, ones = a[:1].repeat(tile_n, 1), torch.ones(tile_n)
    run = partial(int8_wgmma.wgmma_product, a, b, ones[:tile_m], ones, None, BF16, tile=(tile_m, tile_n))
    return Work(
        *(f"int8 product by wgmma, tiles of {tile_m} x {tile_n}", (phase,), run, 0.0, "multiplication"),
        operations=2.0,
        full_rate=True,
        read=groups * (64 + tile_n) / (tile_m * tile_n),
        architectures=("sm_90",),
    )


def _convolution() -> Work:
    ones, channels, features, pixels = torch.ones(128), 256, 128, 64
    x, w = (
        torch.randint(-127, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(0))
        for shape in ((pixels, channels), (features, 9, channels))
    )
    table = (torch.arange(pixels).unsqueeze(1) + torch.arange(9) - 4).clamp(-1, pixels - 1).int()
    convolve = partial(kernels.int8_conv, x, w, ones[:pixels], ones[:features], table, 1, None, BF16)
    # A step of 64 along the channels: each warp multiplies 64 x 32 x 64. After the channels of a tap, here 256, its 64
    # sums are scaled and added. Once for a tap a thread asks the table for two rows, and for their scales.
    step = Phase("int8_conv", 4 / 3 * 64 * 32 * 64 / 32, 4 * 16, tensor=32, ahead=2)
    last = Phase("int8_conv", 4 * 64 * 32 * 64 / 32, 4 * 16 + 2 * (4 + 4), tensor=32, arithmetic=128, ahead=2)
    return Work("int8 convolution", (step, last), convolve, 0.0, "multiplication", operations=2.0)
