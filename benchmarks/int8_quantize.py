"""The int8 quantisers against plain torch, and against the bandwidth of a copy.

    python benchmarks/int8_quantize.py [--device cuda] [--shapes 2048x4096,...] [--dtypes float32,bfloat16]

What a quantiser must move: each element of x once, one int8 for each form, a float32 scale for each row or column.
``GB/s`` and the share of a copy's bandwidth count that and nothing else. A scale is known only after all of its row or
column was seen, though, so x is read twice. Both forms of a matrix that fits no cache can therefore not pass 60 %
(float32) or 67 % (bfloat16) at a copy's speed; the column-wise form alone can, if a strip of x stays in a cache.

"in place" (CPU only) writes into memory that has been written before, as the copy does; the others allocate their
results, as in training, and pay for the system's pages. Rivals are the same arithmetic in plain torch, as it is and
compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from _common import HOW_TO_READ, Candidate, Report, copy_bandwidth, measure, parser, skipped
from torch import Tensor

from lowbit_lightning import kernels
from lowbit_lightning.kernels import _cpu_int8

SHAPES = {"cpu": "2048x4096,2048x1024,4096x2048,4096x11008", "cuda": "8192x4096,2048x4096,4096x11008"}
SEED = 1234


def rowwise(x: Tensor) -> tuple[Tensor, Tensor]:
    absmax = x.abs().amax(1, keepdim=True).float()
    return (x * (127 / absmax)).round().to(torch.int8), absmax / 127


def colwise(x: Tensor) -> tuple[Tensor, Tensor]:
    absmax = x.abs().amax(0).float()
    return (x * (127 / absmax)).round().to(torch.int8).T.contiguous(), absmax / 127


def both(x: Tensor) -> tuple[Tensor, ...]:
    return *rowwise(x), *colwise(x)


PLAIN: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {"rowwise": rowwise, "colwise": colwise, "both": both}


def in_place(x: Tensor, form: str) -> Callable[[], None]:
    """Our kernel alone, on the CPU: the results lie in memory that is there already."""
    rows, columns = x.shape
    row_form: tuple = _cpu_int8._empty_form(rows, columns) if form != "colwise" else (None, None)
    column_form: tuple = _cpu_int8._empty_form(columns, rows) if form != "rowwise" else (None, None)
    return lambda: _cpu_int8._quantize(x, None, *row_form, *column_form)


def candidates(x: Tensor, form: str) -> list[Candidate]:
    ours, plain = getattr(kernels, f"quantize_{form}"), PLAIN[form]
    found = [
        Candidate(f"{form}, torch", lambda: lambda: plain(x)),
        Candidate(f"{form}, torch compiled", lambda: partial(torch.compile(plain, dynamic=False), x)),
        Candidate(f"{form}", lambda: lambda: ours(x)),
        Candidate(f"{form}, at random", lambda: lambda: ours(x, SEED)),
    ]
    if x.device.type == "cpu":
        found.append(Candidate(f"{form}, in place", lambda: in_place(x, form)))
    return found


def needed_bytes(x: Tensor, form: str) -> int:
    rows, columns = x.shape
    results = {"rowwise": x.numel() + 4 * rows, "colwise": x.numel() + 4 * columns}
    return x.numel() * x.element_size() + (sum(results.values()) if form == "both" else results[form])


def case(report: Report, shape: str, dtype: torch.dtype, bandwidth: float) -> None:
    rows, columns = map(int, shape.split("x"))
    torch.manual_seed(0)
    torch.compiler.reset()  # so that every shape is compiled as it is
    x = torch.randn(rows, columns, device=report.arguments.device).to(dtype)
    report.add(f"## {shape}, {str(dtype).removeprefix('torch.')}", "")
    everyone = {form: candidates(x, form) for form in PLAIN}
    flat = [candidate for group in everyone.values() for candidate in group]
    measure(flat, report.arguments)
    table = []
    for form, group in everyone.items():
        running = {c.name: c for c in group if c.run}
        base = running.get(f"{form}, torch")
        for c in running.values():
            rate = needed_bytes(x, form) / c.median
            faster = f"{base.median / c.median:.1f}x" if base else "-"
            times = [f"{1e3 * c.median:.2f}", f"{1e3 * c.best:.2f}", c.spread]
            table.append([c.name, *times, f"{rate / 1e9:.1f}", f"{100 * rate / bandwidth:.0f} %", faster])
    header = ["form, how", "ms", "best", "spread", "GB/s", "of a copy", "against torch"]
    report.table(header, table)
    report.add(*skipped(flat))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--shapes", help="rows x columns, comma-separated")
    options.add_argument("--dtypes", default="float32,bfloat16", help="comma-separated")
    arguments = options.parse_args()
    report = Report("int8 quantize", arguments)
    bandwidth = copy_bandwidth(arguments)
    report.add(f"A copy moves {bandwidth / 1e9:.1f} GB/s, read plus written. {HOW_TO_READ}", "")
    kernels.reset_calls()
    for shape in (arguments.shapes or SHAPES[arguments.device]).split(","):
        for dtype in arguments.dtypes.split(","):
            case(report, shape, getattr(torch, dtype), bandwidth)
    calls = [f"{count} {op} on {backend}" for (op, backend), count in sorted(kernels.calls().items())]
    report.add(f"Calls of our kernels in the run: {', '.join(calls)}.")
    report.save()


if __name__ == "__main__":
    main()
