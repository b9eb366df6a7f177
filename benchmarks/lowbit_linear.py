"""Products with low-bit weights on the CPU, weights out of cache: ours, torch's int4 and int8 kernels, bitsandbytes.

    python benchmarks/lowbit_linear.py [--shapes 4096x4096,11008x4096] [--rows 1,8,256] [--output docs/benchmarks]

A shape is output features x input features. Every product takes another weight of the shape, as the layers of a model
do, so that none of them is found in the caches: their 4-bit forms take more than 64 MB. The floor is what reading a
weight's own bytes takes at the bandwidth that threads reach by reading alone.

Ratios are those of the shortest times: products are short, and anything else that runs on the machine only adds.

bitsandbytes' rival is ``Linear4bit`` as it runs after its first forward in eval mode, when it has repacked the weight.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from _common import Candidate, Report, measure, parser, rival, seconds, skipped
from torch import Tensor

from lowbit_lightning import kernels
from lowbit_lightning.kernels.formats import weight_format

CACHE_BYTES = 64 << 20
OURS = [
    *((form, torch.bfloat16) for form in ("nf4", "nf4-dq", "fp4", "int4", "int3", "int2", "int8")),
    *((form, torch.float32) for form in ("nf4", "int4", "int8")),
]
Product = Callable[[Tensor], Tensor]


def in_turn(products: list[Product], x: Tensor) -> Callable[[], None]:
    turns = itertools.cycle(products)

    def run() -> None:
        with torch.no_grad():
            next(turns)(x)

    return run


def ours(weight: Tensor, count: int, form: str) -> list[Product]:
    forms = copies(count, *kernels.lowbit_quantize(weight, form, "absmax"))
    return [lambda x, p=p, s=s: kernels.lowbit_matmul(x, p, s, None, form) for p, s in forms]  # type: ignore[misc]


def plain(weight: Tensor, count: int, dtype: torch.dtype) -> list[Product]:
    return [partial(torch.nn.functional.linear, weight=w) for (w,) in copies(count, weight.to(dtype))]


def torch_int4(weight: Tensor, count: int, dtype: torch.dtype, group: int = 64) -> list[Product]:
    codes = torch.randint(0, 16, weight.shape, dtype=torch.int32)  # its speed does not depend on them
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = torch.rand(weight.shape[1] // group, weight.shape[0], 2).to(dtype)
    op = torch.ops.aten._weight_int4pack_mm_for_cpu
    return [lambda x, p=p, s=s: op(x, p, group, s) for p, s in copies(count, packed, scales)]  # type: ignore[misc]


def torch_int8(weight: Tensor, count: int, dtype: torch.dtype) -> list[Product]:
    codes, scales = kernels.quantize_rowwise(weight)
    op = torch.ops.aten._weight_int8pack_mm
    return [lambda x, c=c, s=s: op(x, c, s) for c, s in copies(count, codes, scales.to(dtype))]  # type: ignore[misc]


def bitsandbytes(weight: Tensor, count: int, dtype: torch.dtype) -> list[Product]:
    outputs, inputs = weight.shape
    layers = []
    for _ in range(count):
        layer: Any = rival("bitsandbytes.nn", "Linear4bit")(
            inputs, outputs, bias=False, compute_dtype=dtype, quant_type="nf4", compress_statistics=False
        )
        layer.weight.data = weight
        layers.append(layer.to("cpu").eval())
        with torch.no_grad():
            layers[-1](torch.zeros(1, inputs, dtype=dtype))  # it repacks the weight now
    return layers


def copies(count: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return [tuple(t.clone() for t in tensors) for _ in range(count)]


def candidates(shape: tuple[int, int], rows: int) -> list[Candidate]:
    torch.manual_seed(0)
    count = -(-CACHE_BYTES // (shape[0] * shape[1] // 2))
    weight, x = torch.randn(shape), torch.randn(rows, shape[1])

    def several(make: Callable[..., list[Product]], dtype: torch.dtype) -> Callable[[], Callable[[], None]]:
        return lambda: in_turn(make(weight, count), x.to(dtype))

    def name(dtype: torch.dtype) -> str:
        return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]

    both = (torch.bfloat16, torch.float32)
    return [
        *(Candidate(f"F.linear {name(d)}", several(partial(plain, dtype=d), d)) for d in both),
        *(Candidate(f"torch int4pack {name(d)}", several(partial(torch_int4, dtype=d), d)) for d in both),
        *(Candidate(f"torch int8pack {name(d)}", several(partial(torch_int8, dtype=d), d)) for d in both),
        *(Candidate(f"bitsandbytes nf4 {name(d)}", several(partial(bitsandbytes, dtype=d), d)) for d in both),
        *(Candidate(f"ours {form} {name(d)}", several(partial(ours, form=form), d)) for form, d in OURS),
    ]


def bits_of(name: str, inputs: int) -> float:
    """Bits a weight that a product reads."""
    if name.startswith("ours"):
        return weight_format(name.split()[1]).bits_per_weight(inputs)
    if "int4pack" in name:  # a scale and a zero point for each 64, in x's dtype
        return 4 + 2 * (16 if "bf16" in name else 32) / 64
    if "bitsandbytes" in name:
        return 4 + 16 / 64
    return 8 if "int8pack" in name else 16 if "bf16" in name else 32


def read_bandwidth(megabytes: int = 256) -> float:
    """Bytes per second of reading alone: the fastest of several sums over int32."""
    data = torch.ones(megabytes << 18, dtype=torch.int32)
    return data.nbytes / min(seconds(lambda: data.max(), "cpu") for _ in range(20))


def case(report: Report, shape: tuple[int, int], rows: int, bandwidth: float) -> None:
    arguments = report.arguments
    outputs, inputs = shape
    report.add(f"## {rows} rows of x, {inputs} to {outputs} features", "")
    everyone = candidates(shape, rows)
    running = measure(everyone, arguments)
    times = {c.name: c.best for c in running}

    def ratio(name: str, bases: list[str]) -> str:
        found = [times[base] for base in bases if base in times]
        return f"{min(found) / times[name]:.2f}x" if found else "-"

    def rivals(name: str) -> list[str]:
        group = ("int8pack",) if "int8" in name else ("int4pack", "bitsandbytes")
        return [other for other in times if any(part in other for part in group)]

    table = []
    for c in running:
        own = outputs * inputs * bits_of(c.name, inputs) / 8
        table.append(
            [
                *(c.name, f"{1e3 * c.best:.3f}", f"{1e3 * c.median:.3f}", c.spread),
                *(f"{own / times[c.name] / 1e9:.1f}", f"{100 * own / times[c.name] / bandwidth:.0f} %"),
                ratio(c.name, ["F.linear bf16"]),
                ratio(c.name, ["F.linear bf16", "F.linear fp32"]),
                ratio(c.name, rivals(c.name)) if c.name.startswith("ours") else "-",
            ]
        )
    header = ["product", "ms", "median", "spread", "GB/s", "of reading", "bf16 / it", "F.linear / it", "rival / it"]
    report.table(header, table)
    report.add(*skipped(everyone))


def main() -> None:
    options: argparse.ArgumentParser = parser(__doc__)
    options.add_argument("--shapes", default="4096x4096,11008x4096", help="outputs x inputs, comma-separated")
    options.add_argument("--rows", default="1,8,256", help="rows of x, comma-separated")
    arguments = options.parse_args()
    report = Report("lowbit linear", arguments)
    bandwidth = read_bandwidth()
    report.add(
        f"Reading alone reaches {bandwidth / 1e9:.1f} GB/s. All take turns in every round; ms is the shortest time, and"
        " what the other columns come from. A ratio above 1x means faster than its base. The rivals of a 4-bit format"
        " are torch's int4 kernel and bitsandbytes, that of int8 is torch's int8 kernel; the fastest of them counts.",
        "",
    )
    for shape in arguments.shapes.split(","):
        outputs, inputs = (int(n) for n in shape.split("x"))
        for rows in arguments.rows.split(","):
            case(report, (outputs, inputs), int(rows), bandwidth)
    report.save()


if __name__ == "__main__":
    main()
