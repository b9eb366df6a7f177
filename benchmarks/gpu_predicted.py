"""Measured over predicted, on the GPU that is here: each kernel in a large size, beside the roofline's limit for it.

    python benchmarks/gpu_predicted.py [--only adamw,int8]

The prediction is the largest of bytes over the bandwidth of a copy, slots over the issue rate and tensor operations
over their rate (``cuda_roofline.py``). A ratio of 1.1 means that the kernel takes 10 % longer than its limit; one below
1 means that the model is wrong. Times are medians of 20 launches between events. If the GPU has no published figures in
``roofline/devices.py``, those of one with the same architecture stand in, and the first line says so.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product

import cuda_roofline
import torch
from roofline.describe import BF16, F16, F32, NAMES, Work
from roofline.devices import DEVICES, Device
from roofline.work import OPTIMIZERS, works

from lowbit_lightning import kernels
from lowbit_lightning.kernels.cuda.int8_product import fused_product

Case = tuple[str, int, Callable[[], object]]
"""A name of ``works``, how many of its units a call does, and the call."""
REPEATS = 20


def cases() -> Iterator[Case]:
    """Made one by one: each has the GPU's memory for itself."""
    for rule, dtype in product(OPTIMIZERS, (F32, BF16)):
        parameter = torch.nn.Parameter(torch.randn(16384, 8192, device="cuda").to(dtype))
        parameter.grad = torch.randn_like(parameter)
        optimizer = OPTIMIZERS[rule]([parameter], lr=1e-3)
        yield f"{rule} {NAMES[dtype]}", parameter.numel(), optimizer.step
    for dtype in (F32, BF16):
        x = torch.randn(16384, 8192, device="cuda").to(dtype)
        codes, scales = kernels.quantize_blockwise(x)
        name, count = NAMES[dtype], x.numel()
        yield f"quantize {name}", count, partial(kernels.quantize_blockwise, x)
        yield f"dequantize {name}", count, partial(kernels.dequantize_blockwise, codes, scales, dtype=dtype)
        yield f"int8 rows {name}", count, partial(kernels.quantize_rowwise, x)
        yield f"int8 rows and columns {name}", count, partial(kernels.quantize_both, x)
    weight, row = torch.randn(8192, 8192, device="cuda", dtype=F16), torch.randn(1, 8192, device="cuda", dtype=F16)
    for form in ("nf4", "int4"):
        made, count = kernels.lowbit_quantize(weight, form, "absmax"), weight.numel()
        yield f"{form} quantize fp16", count, partial(kernels.lowbit_quantize, weight, form, "absmax")
        yield f"{form} dequantize fp16", count, partial(kernels.lowbit_dequantize, *made, form, 8192, F16)
        yield f"{form} gemv fp16, one row", count, partial(kernels.lowbit_matmul, row, *made, None, form)
    a = torch.randint(-127, 128, (8192, 4096), dtype=torch.int8, device="cuda")
    b = torch.randint(-127, 128, (4096, 4096), dtype=torch.int8, device="cuda")
    ones = torch.ones(8192, device="cuda")
    call = partial(fused_product, a, b, ones, ones[:4096], None, BF16)
    yield "int8 product, tiles of 128 x 256", 8192 * 4096 * 4096, call


def milliseconds(call: Callable[[], object]) -> float:
    """Of a call, by the GPU's clock."""
    for _ in range(3):
        call()
    times = []
    for _ in range(REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def device_of(name: str, architecture: str) -> Device:
    """The figures of a GPU by its name, or of another with its architecture.

    Raises:
        LookupError: if there are none.
    """
    alike = [device for device in DEVICES if device.architecture == architecture]
    named = [device for device in alike if device.name in name]
    if not alike:
        raise LookupError(f"no figures of {architecture} in roofline/devices.py, which has {[d.name for d in DEVICES]}")
    return (named or alike)[0]


def predicted(work: Work, device: Device) -> tuple[float, str]:
    """Milliseconds of a unit, and which limit binds."""
    bound = cuda_roofline.bounds(cuda_roofline.count(work, device.architecture), device)
    return 1e3 * bound.seconds, bound.binds


def table(rows: Sequence[tuple[str, float, float, str]]) -> str:
    """Markdown: a kernel, its milliseconds as measured and as predicted, and the limit that binds."""
    heads = ("kernel", "measured ms", "predicted ms", "measured / predicted", "binds")
    lines = [f"| {' | '.join(heads)} |", "| --- | ---: | ---: | ---: | --- |"]
    for name, measured, limit, binds in rows:
        lines.append(f"| {name} | {measured:.3f} | {limit:.3f} | {measured / limit:.2f} | {binds} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="comma-separated parts of kernels' names")
    args = parser.parse_args(arguments)
    major, minor = torch.cuda.get_device_capability()
    device = device_of(torch.cuda.get_device_name(), f"sm_{major}{minor}")
    print(f"{torch.cuda.get_device_name()}, predicted with the figures of {device.name} ({device.architecture})\n")
    by_name, rows = {work.name: work for work in works()}, []
    for name, units, call in cases():
        if any(part in name for part in args.only.split(",")):
            limit, binds = predicted(by_name[name], device)
            rows.append((name, milliseconds(call), units * limit, binds))
            print(f"{name}: {rows[-1][1]:.3f} ms, predicted {rows[-1][2]:.3f}", flush=True)
    print("\n" + table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
