"""Products with low-bit weights, out of cache: ours, torch's int4 and int8 kernels, torchao, bitsandbytes.

    python benchmarks/lowbit_linear.py [--device cuda] [--shapes 4096x4096,11008x4096] [--rows 1,8,256]
        [--output docs/benchmarks]

A shape is output features x input features. Every product takes another weight of the shape, as the layers of a model
do, so that none of them is found in the caches: their 4-bit forms take more than 64 MB, on a GPU more than 256 MB. The
floor is what reading a weight's own bytes takes at the bandwidth that threads reach by reading alone, on a GPU at that
of a copy.

Ratios are those of the shortest times: products are short, and anything else that runs on the machine only adds. On a
GPU the products of all weights are captured in a CUDA graph, which is timed: launches from Python would take longer
than they do.

bitsandbytes' rival is ``Linear4bit``; on a CPU as it runs after its first forward in eval mode, when it has repacked
the weight.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from _common import Candidate, Report, copy_bandwidth, measure, parser, rival, seconds, skipped
from torch import Tensor

from lowbit_lightning import kernels
from lowbit_lightning.kernels.cpu.lowbit import library
from lowbit_lightning.kernels.formats import weight_format
from lowbit_lightning.layers import LowBitLinear

CACHE_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}
OURS = [
    *((form, torch.bfloat16) for form in ("nf4", "nf4-dq", "fp4", "int4", "int3", "int2", "int8")),
    *((form, torch.float32) for form in ("nf4", "int4", "int8")),
]
TORCHAO: list[tuple[str, dict[str, Any]]] = [
    ("int4", {"config": "Int4WeightOnlyConfig", "group_size": 64, "int4_packing_format": "tile_packed_to_4d"}),
    ("int8", {"config": "Int8WeightOnlyConfig"}),
]
Product = Callable[[Tensor], Tensor]


def in_turn(products: list[Product], x: Tensor) -> Callable[[], None]:
    """On a CPU one product in each call, on a GPU all of them."""
    turns = itertools.cycle(products)

    def run() -> None:
        with torch.no_grad():
            next(turns)(x)

    if x.device.type == "cpu":
        return run
    with torch.cuda.stream(torch.cuda.Stream()):
        run()  # compiles and allocates
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in products:
            run()
    return graph.replay


def ours(weight: Tensor, count: int, form: str) -> list[Product]:
    forms = copies(count, *kernels.lowbit_quantize(weight, form, "absmax"))
    return [lambda x, p=p, s=s: kernels.lowbit_matmul(x, p, s, None, form) for p, s in forms]  # type: ignore[misc]


def plain(weight: Tensor, count: int, dtype: torch.dtype) -> list[Product]:
    return [partial(torch.nn.functional.linear, weight=w) for (w,) in copies(count, weight.to(dtype))]


def torch_int4(weight: Tensor, count: int, dtype: torch.dtype, group: int = 64) -> list[Product]:
    scales = torch.rand(weight.shape[1] // group, weight.shape[0], 2, device=weight.device).to(dtype)
    if weight.is_cuda:  # its speed does not depend on the codes
        pairs = torch.randint(0, 256, (weight.shape[0], weight.shape[1] // 2), dtype=torch.uint8, device=weight.device)
        packed, op = torch.ops.aten._convert_weight_to_int4pack(pairs, 8), torch.ops.aten._weight_int4pack_mm
    else:
        codes = torch.randint(0, 16, weight.shape, dtype=torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
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
        layers.append(layer.to(weight.device).eval())
        with torch.no_grad():
            layers[-1](torch.zeros(1, inputs, dtype=dtype, device=weight.device))  # on a CPU it repacks the weight now
    return layers


def torchao(weight: Tensor, count: int, dtype: torch.dtype, config: str, **options: Any) -> list[Product]:
    quantize, made = rival("torchao.quantization", "quantize_"), rival("torchao.quantization", config)(**options)
    layers: list[Product] = []
    for _ in range(count):
        outputs, inputs = weight.shape
        layer = torch.nn.Linear(inputs, outputs, bias=False, device=weight.device, dtype=dtype)
        layer.weight.data = weight.to(dtype)
        quantize(layer, made)
        layers.append(layer)
    return layers


def copies(count: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return [tuple(t.clone() for t in tensors) for _ in range(count)]


def count_of(shape: tuple[int, int], device: str) -> int:
    """Weights that products take in turn."""
    return -(-CACHE_BYTES[device] // (shape[0] * shape[1] // 2))


def candidates(shape: tuple[int, int], rows: int, device: str) -> list[Candidate]:
    torch.manual_seed(0)
    count = count_of(shape, device)
    weight, x = torch.randn(shape, device=device), torch.randn(rows, shape[1], device=device)

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
        *(
            Candidate(
                f"torchao {kind} bf16", several(partial(torchao, dtype=torch.bfloat16, **options), torch.bfloat16)
            )
            for kind, options in (TORCHAO if device == "cuda" else [])
        ),
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
    if "torchao int4" in name:
        return 4 + 2 * 16 / 64
    return 8 if "int8" in name else 16 if "bf16" in name else 32


def read_bandwidth(megabytes: int = 256) -> float:
    """Bytes per second of reading alone: the fastest of several sums over int32."""
    data = torch.ones(megabytes << 18, dtype=torch.int32)
    return data.nbytes / min(seconds(lambda: data.max(), "cpu") for _ in range(20))


def case(report: Report, shape: tuple[int, int], rows: int, bandwidth: float) -> None:
    arguments = report.arguments
    outputs, inputs = shape
    report.add(f"## {rows} rows of x, {inputs} to {outputs} features", "")
    everyone = candidates(shape, rows, arguments.device)
    running = measure(everyone, arguments)
    calls = 1 if arguments.device == "cpu" else count_of(shape, arguments.device)
    times = {c.name: c.best / calls for c in running}

    def ratio(name: str, bases: list[str]) -> str:
        found = [times[base] for base in bases if base in times]
        return f"{min(found) / times[name]:.2f}x" if found else "-"

    def rivals(name: str) -> list[str]:
        group = ("int8pack", "torchao int8") if "int8" in name else ("int4pack", "torchao int4", "bitsandbytes")
        return [other for other in times if any(part in other for part in group)]

    table = []
    for c in running:
        own = outputs * inputs * bits_of(c.name, inputs) / 8
        table.append(
            [
                *(c.name, f"{1e3 * times[c.name]:.4f}", f"{1e3 * c.median / calls:.4f}", c.spread),
                *(f"{own / times[c.name] / 1e9:.1f}", f"{100 * own / times[c.name] / bandwidth:.0f} %"),
                ratio(c.name, ["F.linear bf16"]),
                ratio(c.name, ["F.linear bf16", "F.linear fp32"]),
                ratio(c.name, rivals(c.name)) if c.name.startswith("ours") else "-",
            ]
        )
    header = ["product", "ms", "median", "spread", "GB/s", "of reading", "bf16 / it", "F.linear / it", "rival / it"]
    report.table(header, table)
    report.add(*skipped(everyone))


def share_of_python(report: Report, form: str = "nf4", width: int = 2048, count: int = 128) -> None:
    """What a layer takes beside its compiled product: layers of their own weights, called in turn as in a model, each
    of which drives Python's code and data out of the caches."""
    layer = LowBitLinear(width, width, bias=False, dtype=torch.bfloat16, weights=form)
    layers, x = [copy.deepcopy(layer) for _ in range(count)], torch.randn(1, 1, width, dtype=torch.bfloat16)
    compiled: Any = library(weight_format(form).bits)
    product, inside = compiled.lb_lowbit_gemv, 0.0
    beside: list[float] = []

    def timed(*arguments: Any) -> None:
        nonlocal inside
        start = time.perf_counter()
        product(*arguments)
        inside += time.perf_counter() - start

    compiled.lb_lowbit_gemv = timed
    try:
        for _ in range(report.arguments.repeats):
            inside, start = 0.0, time.perf_counter()
            with torch.no_grad():
                for layer in layers:
                    layer(x)
            beside.append((time.perf_counter() - start - inside) / count)
    finally:
        compiled.lb_lowbit_gemv = product
    report.add(
        f"## Python's share of a layer, 1 row of x, {form}",
        "",
        f"{count} layers of {width} to {width} features, called in turn: {1e6 * min(beside):.1f} microseconds a layer"
        f" beside its compiled product, median {1e6 * statistics.median(beside):.1f}.",
        "",
    )


def main() -> None:
    options: argparse.ArgumentParser = parser(__doc__)
    options.add_argument("--shapes", default="4096x4096,11008x4096", help="outputs x inputs, comma-separated")
    options.add_argument("--rows", default="1,8,256", help="rows of x, comma-separated")
    arguments = options.parse_args()
    report = Report("lowbit linear", arguments)
    on_cpu = arguments.device == "cpu"
    bandwidth = read_bandwidth() if on_cpu else copy_bandwidth(arguments)
    report.add(
        f"{'Reading alone' if on_cpu else 'A copy'} reaches {bandwidth / 1e9:.1f} GB/s. All take turns in every round;"
        " ms is the shortest time, and what the other columns come from. A ratio above 1x means faster than its base."
        " The rivals of a 4-bit format are torch's int4 kernel, torchao and bitsandbytes, those of int8 torch's int8"
        " kernel and torchao; the fastest of them counts.",
        "",
    )
    for shape in arguments.shapes.split(","):
        outputs, inputs = (int(n) for n in shape.split("x"))
        for rows in arguments.rows.split(","):
            case(report, (outputs, inputs), int(rows), bandwidth)
    if on_cpu and "1" in arguments.rows.split(","):
        share_of_python(report)
    report.save()


if __name__ == "__main__":
    main()
