"""Hostile inputs to every op of the CPU backend, beside the reference: ``python -m support.fuzz --seconds 60``.

Every tensor, those that ops allocate included, ends or begins at a page that nobody may touch, and has another one on
its other side: an access outside it ends the process, and the case that was running is named. Values are of all kinds:
NaN, infinities, zeros of both signs, subnormal and huge numbers, -128, states and step counts that no training gives.
Results have to be equal to the bit, any NaN being equal to any other.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowbit_lightning import kernels
from lowbit_lightning.kernels import compile, rules
from lowbit_lightning.kernels.cpu import blockwise, int8, int8_conv, int8_product, lowbit, step
from lowbit_lightning.kernels.formats import BlockGrid
from support.guards import guards, protect
from support.step_case import StepCase

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CODEBOOKS = ("dynamic_signed", "dynamic_unsigned", "linear", "linear_unsigned", "nf4", "fp4", "nf2")
KINDS = ("8", "32", "mixed", "any")
"""States of a step: their bits (mixed: as optimizers keep them), or anything, other dtypes and block sizes too."""
QUANTIZERS = ("quantize_rowwise", "quantize_colwise", "quantize_both", "quantize_channels", "quantize_image")
LOWBIT = ("int8", "nf4", "fp4", "int4", "int3", "int2")
SPECIAL = (
    *(0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 127.0, 1e-45, -1e-45, 1e-40, 2.0**-126, -(2.0**-126), 2.0**-120, 1.2e-38),
    *(65504.0, 65520.0, 7e20, -7e20, 1e22, -1e22, 3e38, -3.4028234e38, float("inf"), -float("inf"), float("nan")),
)
STEPS = (0.0, 1.0, 5.0, 1000.0, 2.0**24, 0.5, -1.0, -3.0, 1e30, float("inf"), -float("inf"), float("nan"))


# -- values ----------------------------------------------------------------------------------------------------------


def values(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(shape) * torch.exp(random.choice((0.0, 1.0, 8.0)) * torch.randn(shape))
    share = random.choice((0.0, 0.0, 0.02, 0.3, 1.0))
    special = torch.tensor(random.sample(SPECIAL, random.randint(1, len(SPECIAL))))
    chosen = special[torch.randint(len(special), tuple(shape))]
    return torch.where(torch.rand(shape) < share, chosen, x).to(dtype)


def scalar() -> Tensor | None:
    return random.choice((None, torch.tensor(1.0), torch.tensor(random.choice(SPECIAL))))


def shape(least: int = 0) -> tuple[int, ...]:
    sizes = (1, 1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 64, 65, 100, 255, 256, 257, 300, 513, 700)
    first = random.choice((least, 1, 2, 3, 5, 9, 17))
    return random.choice(((first,), (first, random.choice(sizes)), (first, random.choice((least, 1, 3)), 77)))


def matrix(most: int = 200) -> tuple[int, int]:
    sizes = [n for n in (0, 1, 2, 3, 5, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 129, 190, 200) if n <= most]
    return random.choice(sizes), random.choice(sizes)


# -- cases: a name, what runs, and the tensors that it wrote ----------------------------------------------------------

Case = tuple[str, Callable[[], list[Tensor]]]


def _quantize_blockwise() -> Case:
    x, dtype, block = values(shape()), random.choice(DTYPES), random.choice((32, 64, 256, 4096))
    book = random.choice((*CODEBOOKS, torch.linspace(-1, 1, random.choice((2, 5, 256))), torch.tensor([0.0, 0.1, 1.0])))
    x = x.to(dtype)
    named = book if isinstance(book, str) else f"custom {len(book)}"
    return f"{dtype} {tuple(x.shape)} {named} {block}", lambda: [
        *kernels.quantize_blockwise(protect(x), book if isinstance(book, str) else protect(book), block)
    ]


def _dequantize_blockwise() -> Case:
    block, dtype, size = random.choice((32, 64, 256, 4096)), random.choice(DTYPES), shape()
    codes = torch.randint(256, size, dtype=torch.uint8)
    scales = values(BlockGrid.of(torch.Size(size), block).scales_shape)
    book = random.choice((*CODEBOOKS, torch.linspace(-1, 1, random.choice((2, 5, 256)))))
    named = book if isinstance(book, str) else f"custom {len(book)}"
    return f"{dtype} {size} {named} {block}", lambda: [
        kernels.dequantize_blockwise(protect(codes), protect(scales), book, block, dtype)
    ]


def _quantize_int8(op: str) -> Case:
    x = values(matrix(), random.choice(DTYPES))
    seed = random.choice((None, 0, 1, -1, 2**63, random.getrandbits(64)))
    return f"{x.dtype} {tuple(x.shape)} seed {seed}", lambda: [*getattr(kernels, op)(protect(x), seed)]


def _hadamard() -> Case:
    x, dim = values(matrix(), random.choice(DTYPES)), random.choice((0, 1))
    return f"{x.dtype} {tuple(x.shape)} dim {dim}", lambda: [kernels.hadamard(protect(x), dim)]


def _int8_matmul() -> Case:
    (m, k), n, out = matrix(), matrix()[0], random.choice(DTYPES)
    low = random.choice((-128, -127))
    a, b = (torch.randint(low, 128, (rows, k), dtype=torch.int8) for rows in (m, n))
    if random.random() < 0.2:
        a.fill_(-128)
        b.fill_(random.choice((-128, 127, 0)))
    scales = values((m,)), values((n,))
    bias = random.choice((None, values((n,), random.choice(DTYPES))))
    return f"{m} x {n} x {k} from {low} to {out}, bias {bias is not None}", lambda: [
        kernels.int8_matmul(
            protect(a), protect(b), protect(scales[0]), protect(scales[1]), None if bias is None else protect(bias), out
        )
    ]


def _int8_conv() -> Case:
    """The three products of a convolution whose taps read any pixels, each one at most once, or none."""
    images, results, pixels, taps = (random.choice((1, 2, 3, 7, 20)) for _ in range(4))
    channels, features = (random.choice((1, 3, 16, 17, 33, 64, 65, 100)) for _ in range(2))
    out, low = random.choice(DTYPES), random.choice((-128, -127))
    reads = [torch.randperm(max(results, pixels))[:results] for _ in range(taps)]
    table = torch.stack(reads, 1).where(torch.rand(results, taps) < random.choice((0.0, 0.7, 1.0)), -1)
    table = table.where(table < pixels, -1).int()
    x, w, dy = (
        torch.randint(low, 128, shape, dtype=torch.int8)
        for shape in ((images * pixels, channels), (features, taps, channels), (features, images * results))
    )
    of_pixels, of_results, of_features, of_channels = map(
        values, ((len(x),), (images * results,), (features,), (channels,))
    )
    bias = random.choice((None, values((features,), random.choice(DTYPES))))

    def go() -> list[Tensor]:
        a, b, t, turned = protect(x), protect(w), protect(table), protect(dy.T.contiguous())
        scales = [protect(s) for s in (of_pixels, of_results, of_features, of_channels)]
        shift = None if bias is None else protect(bias)
        return [
            kernels.int8_conv(a, b, scales[0], scales[2], t, images, shift, out),
            kernels.int8_conv_input(turned, b, scales[1], scales[3], t, images, pixels, out),
            kernels.int8_conv_weight(protect(dy), a, scales[2], scales[3], t, images, out),
        ]

    sizes = f"{images} images, {pixels} pixels, {results} results, {taps} taps, {channels} to {features} channels"
    return f"{sizes} from {low} to {out}, bias {bias is not None}", go


def _groups() -> Case:
    """The quantisers and products of matrices whose rows are in groups, some of them empty."""
    (rows, k), n, groups, dtype, out = matrix(), matrix()[0], random.choice((1, 2, 5)), *random.choices(DTYPES, k=2)
    offs = torch.randint(0, rows + 1, (groups,)).sort().values
    x, seed = values((rows, k), dtype), random.choice((None, -1, random.getrandbits(64)))
    b, dy = (torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((groups, n, k), (rows, n)))
    of_n, bias = values((groups, n)), random.choice((None, values((groups, n), out)))

    def go() -> list[Tensor]:
        shift, of_b = None if bias is None else protect(bias), protect(of_n)
        q, scales, columns, of_k = kernels.quantize_groups(protect(x), offs, seed)
        return [
            *(q, scales, columns, of_k, *kernels.quantize_group_columns(protect(x), offs, seed)),
            kernels.int8_grouped_matmul(q, protect(b), scales, of_b, offs, shift, out),
            kernels.int8_grouped_outer(protect(dy), columns, of_b, of_k, offs, out),
        ]

    return f"{offs.tolist()} of {dtype} {rows} x {k}, {n} outputs to {out}, seed {seed}, bias {bias is not None}", go


def _lowbit() -> Case:
    """A weight quantised by its largest magnitudes, dequantised, and looked up in."""
    form, dtype, out = random.choice(LOWBIT), random.choice(DTYPES), random.choice(DTYPES)
    weight = values((random.choice((1, 2, 5, 17)), random.choice((1, 7, 31, 32, 63, 64, 65, 130, 256, 300))), dtype)
    rows, length = weight.shape
    indices = torch.randint(rows, (random.choice((0, 1, 5)),))

    def go() -> list[Tensor]:
        packed, scales = kernels.lowbit_quantize(protect(weight), form, "absmax")
        packed, scales = protect(packed), protect(scales)
        whole = kernels.lowbit_dequantize(packed, scales, form, length, out)
        return [packed, scales, whole, kernels.lowbit_embedding(indices, packed, scales, form, length, out)]

    return f"{form} {dtype} {tuple(weight.shape)} to {out}", go


def _hyper(rule: rules.Rule) -> list[float]:
    usual = {"lr": 0.01, "eps": 1e-8, "weight_decay": 0.01, "alpha": 0.95, "t_alpha": 10.0, "t_beta3": 10.0}
    hostile = random.random() < 0.2
    return [
        random.choice((0.0, 1.0, -1.0, 1e-45, 1e300, float("inf"), float("nan")))
        if hostile and random.random() < 0.3
        else random.choice((0.0, 1.0, usual.get(name, 0.9), usual.get(name, 0.9), usual.get(name, 0.9)))
        for name in rule.hyper
    ]


def _state(state: rules.State, size: tuple[int, ...], bits: int, block: int) -> tuple[Tensor, Tensor]:
    if bits == 32:
        x = values(size)
        return (x.abs() if state.non_negative and random.random() < 0.8 else x), torch.zeros(0)
    scales = values(BlockGrid.of(torch.Size(size), block).scales_shape)
    if state.non_negative and random.random() < 0.8:
        scales = scales.abs()
    return torch.randint(256, size, dtype=torch.uint8), scales


def _step(variants: Sequence[tuple[str, str]]) -> Case:
    name, kind = random.choice(variants)
    rule, narrow = rules.get(name), kind == "any"
    param, grad, block = torch.float32, torch.float32, 256
    if narrow:
        param, grad, block = random.choice(DTYPES), random.choice(DTYPES), random.choice((32, 256, 4096))
    bits = {
        "8": [8 for _ in rule.states],
        "32": [32 for _ in rule.states],
        "mixed": [32 if state.slow else 8 for state in rule.states],
        "any": [random.choice((8, 8, 32)) for _ in rule.states],
    }[kind]
    sizes = [shape(1) for _ in range(random.randint(1, 3))]
    remainder = narrow and param == torch.bfloat16 and random.random() < 0.4
    held = [[_state(state, size, b, block) for size in sizes] for state, b in zip(rule.states, bits, strict=True)]
    settings: dict[str, Any] = {
        **{"hyper": _hyper(rule), "block_size": block, "seed": random.getrandbits(63)},
        **{"ordinals": [random.getrandbits(31) for _ in sizes], "offsets": [random.getrandbits(40) for _ in sizes]},
        **{"maximize": random.random() < 0.3},
        "stochastic_rounding": narrow and param == torch.bfloat16 and not remainder and random.random() < 0.5,
    }
    inputs = [[values(size, dtype) for size in sizes] for dtype in (param, grad)]
    steps = [torch.tensor(random.choice(STEPS) if random.random() < 0.3 else 3.0) for _ in sizes]
    remainders = [torch.randint(-128, 128, size, dtype=torch.int8) for size in sizes] if remainder else []
    factors: dict[str, Tensor | None] = {}
    if random.random() < 0.4:
        factors = {key: scalar() for key in ("lr", "unscale", "clip")}
    factors["skip"] = random.choice(
        (None, None, None, torch.tensor(0.0), torch.tensor(1.0), torch.tensor(float("nan")))
    )
    norms = random.choice((None, values((len(sizes), len(rule.norms))).double().abs()))

    def go() -> list[Tensor]:
        def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
            return [protect(t) for t in tensors]

        guarded_factors: dict[str, Any] = {key: None if x is None else protect(x) for key, x in factors.items()}
        a = StepCase(
            name,
            params=copies(inputs[0]),
            grads=copies(inputs[1]),
            steps=copies(steps),
            states=[copies([state for state, _ in of]) for of in held],
            scales=[copies([scales for _, scales in of]) for of in held],
            remainders=copies(remainders),
            **settings,
            **guarded_factors,
        )
        found = a.norms() if rule.norms else None
        a.step(found if norms is None or found is None else protect(norms))
        written = [*a.params, *a.steps, *(t for s in (*a.states, *a.scales) for t in s), *a.remainders]
        return [*written, *([] if found is None else [found])]

    factors_named = {k: v.item() for k, v in factors.items() if v is not None}
    what = f"{name} {param} {grad} bits {bits} block {block} {sizes} steps {[s.item() for s in steps]} {factors_named}"
    return f"{what} {settings} remainder {remainder}", go


OPS: dict[str, Callable[..., Case]] = {
    "quantize_blockwise": _quantize_blockwise,
    "dequantize_blockwise": _dequantize_blockwise,
    **{op: partial(_quantize_int8, op) for op in QUANTIZERS},
    "hadamard": _hadamard,
    "int8_matmul": _int8_matmul,
    "int8_conv": _int8_conv,
    "quantize_groups": _groups,
    "lowbit_quantize": _lowbit,
    "optimizer_step": _step,
}
"""Ops that have to be equal to the bit, each with those that are run beside it."""


# -- comparison ------------------------------------------------------------------------------------------------------

_BITS = {4: torch.int32, 2: torch.int16, 8: torch.int64, 1: torch.int8}


def difference(ours: list[Tensor], theirs: list[Tensor]) -> str:
    for i, (x, y) in enumerate(zip(ours, theirs, strict=True)):
        if x.dtype != y.dtype or x.shape != y.shape:
            return f"result {i}: {x.dtype} {tuple(x.shape)}, not {y.dtype} {tuple(y.shape)}"
        same = x.view(_BITS[x.dtype.itemsize]) == y.view(_BITS[y.dtype.itemsize])
        if x.is_floating_point():
            same |= x.isnan() & y.isnan()
        if not same.all():
            at = (~same).nonzero()[0].tolist()
            return f"result {i} at {at}: {x[tuple(at)].item()!r} by the CPU, {y[tuple(at)].item()!r} by the reference"
    return ""


@contextmanager
def guarded_cpu() -> Iterator[None]:
    with guards(), kernels.use_backend("cpu"):
        yield


def check(
    seed: int,
    ops: Sequence[str],
    variants: Sequence[tuple[str, str]],
    announce: Callable[[str], None],
    backend: Callable[[], AbstractContextManager[Any]] = guarded_cpu,
) -> str:
    """One case on a backend and on the reference; what differs, or an empty string."""
    random.seed(seed)
    torch.manual_seed(seed)
    op = random.choice(ops)
    name, go = OPS[op](variants) if op == "optimizer_step" else OPS[op]()
    threads = random.choice((1, 1, 3))
    announce(f"seed {seed}: {op} {name}, {threads} threads")
    torch.set_num_threads(threads)
    torch.set_default_dtype(random.choice((torch.float32, torch.bfloat16)))  # as Lightning does in bf16-true
    try:
        with backend():
            ours = go()
    finally:
        torch.set_default_dtype(torch.float32)
    with kernels.use_backend("reference"):
        theirs = go()
    return difference(ours, theirs)


def compile_with(ours: tuple[str, ...]) -> None:
    """From here on compile the CPU backend with the flags ``ours``."""

    def library(text: str, *, flags: tuple[str, ...] = ()) -> ctypes.CDLL:
        return compile.host_library(text, flags=(*ours, *flags))

    for module in (blockwise, int8, int8_conv, int8_product, lowbit, step):
        setattr(module, "host_library", library)  # noqa: B010 (what mypy does not know a module to have)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--count", type=int, default=100_000, help="cases at most")
    parser.add_argument("--seed", type=int, default=0, help="of the first case; to repeat a case, with --count 1")
    parser.add_argument("--ops", nargs="+", default=list(OPS), choices=list(OPS))
    parser.add_argument("--rules", nargs="+", default=list(rules.RULES), choices=list(rules.RULES))
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--flags", default="", help="of the compiler, after the usual ones")
    options = parser.parse_args()
    faulthandler.enable()
    compile_with(tuple(options.flags.split()))
    variants = [(rule, kind) for rule in options.rules for kind in options.kinds]
    end, failures, done, last = time.monotonic() + options.seconds, 0, 0, ""

    def announce(case: str) -> None:
        nonlocal last
        last = case
        print(f"running {case}", file=sys.stderr, flush=True)

    while done < options.count and time.monotonic() < end:
        wrong = check(options.seed + done, options.ops, variants, announce)
        done += 1
        if wrong:
            failures += 1
            print(f"{last}\n    {wrong}")
    print(f"{done} cases, {failures} mismatches")
    return int(bool(failures) or not done)


if __name__ == "__main__":
    sys.exit(main())
