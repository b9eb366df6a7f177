"""The int8 quantisers against plain torch, and against the bandwidth of a copy.

    python benchmarks/int8_quantize.py [--device cuda] [--shapes 2048x4096,...] [--dtypes float32,bfloat16]

What a quantiser must move: each element of x once, one int8 for each form, a float32 scale for each row or column.
``GB/s`` and the share of a copy's bandwidth count that and nothing else. A scale is known only after all of its row or
column was seen, though, so x is read twice. Both forms of a matrix that fits no cache can therefore not pass 60 %
(float32) or 67 % (bfloat16) at a copy's speed; the column-wise form alone can, if a strip of x stays in a cache.

"in place" (CPU only) writes into memory that has been written before, as the copy does; the others allocate their
results, as in training, and pay for the system's pages. Rivals are the same arithmetic in plain torch, as it is and
compiled.

Ours, torch and compiled torch are measured one after the other, three times over, and take turns only among themselves:
each call leaves behind what slows down another's, such as memory to give back, or threads that wait for their next work
at full speed for a while. Ours, being short, get three times as many rounds. A copy takes turns with each of them, and
shares are of that copy. Where the copies' spread is large, the machine was busy and the case says little, most of all
for several threads: they wait for the one that was disturbed.
"""

from __future__ import annotations

import math
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from itertools import chain, cycle

import torch
from _common import HOW_TO_READ, Candidate, Report, measure, parser, skipped
from torch import Tensor

from lowbit_lightning import kernels
from lowbit_lightning.kernels.cpu import int8

SHAPES = {"cpu": "2048x4096,2048x1024,4096x2048,4096x11008", "cuda": "8192x4096,2048x4096,4096x11008"}
SEED = 1234
COPIED = {"cpu": 4 << 20, "cuda": 64 << 20}  # float32 values copied at a time, of
BUFFER = 64 << 20  # more than any cache holds
PASSES = 3
QUIET = 0.5  # seconds, after which threads without work have gone to sleep


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
    row_form: tuple = int8.empty_form(rows, columns) if form != "colwise" else (None, None)
    column_form: tuple = int8.empty_form(columns, rows) if form != "rowwise" else (None, None)
    return lambda: int8.quantize_into(x, None, *row_form, *column_form)


def ours(x: Tensor, form: str) -> list[Candidate]:
    op = getattr(kernels, f"quantize_{form}")
    found = [
        Candidate(form, lambda: lambda: op(x)),
        Candidate(f"{form}, at random", lambda: lambda: op(x, SEED)),
    ]
    if x.device.type == "cpu":
        found.append(Candidate(f"{form}, in place", lambda: in_place(x, form)))
    return found


def plain(x: Tensor, form: str) -> list[Candidate]:
    return [Candidate(f"{form}, torch", lambda: lambda: PLAIN[form](x))]


def compiled(x: Tensor, form: str) -> list[Candidate]:
    build = partial(torch.compile, PLAIN[form], dynamic=False)
    return [Candidate(f"{form}, torch compiled", lambda: partial(build(), x))]


def copy(device: str) -> Candidate:
    def build() -> Callable[[], object]:
        source = torch.ones(BUFFER, device=device).view(-1, COPIED[device])
        target = torch.zeros_like(source)
        pieces = cycle(range(len(source)))

        def run() -> None:
            i = next(pieces)
            target[i].copy_(source[i])

        return run

    return Candidate("copy", build)


def needed_bytes(x: Tensor, form: str) -> int:
    rows, columns = x.shape
    results = {"rowwise": x.numel() + 4 * rows, "colwise": x.numel() + 4 * columns}
    return x.numel() * x.element_size() + (sum(results.values()) if form == "both" else results[form])


def case(report: Report, shape: str, dtype: torch.dtype) -> None:
    rows, columns = map(int, shape.split("x"))
    torch.manual_seed(0)
    torch.compiler.reset()  # so that every shape is compiled as it is
    x = torch.randn(rows, columns, device=report.arguments.device).to(dtype)
    report.add(f"## {shape}, {str(dtype).removeprefix('torch.')}", "")
    device = x.device.type
    phases = [({form: who(x, form) for form in PLAIN}, copy(device)) for who in (plain, compiled, ours)]
    for number in range(3 * PASSES):  # ours first
        forms, copied = phases[2 - number % 3]
        rounds = report.arguments.repeats if number % 3 == 0 else -(-report.arguments.repeats // PASSES)
        measure([*chain(*forms.values()), copied], Namespace(**{**vars(report.arguments), "repeats": rounds}))
        copied.run = None  # its memory is free again
        time.sleep(QUIET)
    table = []
    for form in PLAIN:
        base = phases[0][0][form][0]
        for forms, copied in phases:
            for c in forms[form]:
                if c.seconds:
                    share = needed_bytes(x, form) / c.median / bandwidth(copied, device) if copied.seconds else math.nan
                    table.append(line(c, needed_bytes(x, form), share, base))
    header = ["form, how", "ms", "best", "spread", "GB/s", "of a copy", "against torch"]
    report.table(header, table)
    rates = [f"{bandwidth(c, device) / 1e9:.1f} ({c.spread})" for _, c in phases if c.seconds]
    report.add(f"Copies, read plus written, beside torch, compiled torch, ours: {', '.join(rates)} GB/s (spread).", "")
    report.add(*skipped([c for forms, copied in phases for c in chain(*forms.values(), [copied])]))


def bandwidth(copied: Candidate, device: str) -> float:
    """Bytes per second, read plus written."""
    return 2 * 4 * COPIED[device] / copied.median


def line(c: Candidate, needed: int, share: float, base: Candidate) -> list[str]:
    times = [f"{1e3 * c.median:.2f}", f"{1e3 * c.best:.2f}", c.spread]
    faster = f"{base.median / c.median:.1f}x" if base.seconds else "-"
    return [c.name, *times, f"{needed / c.median / 1e9:.1f}", f"{100 * share:.0f} %", faster]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--shapes", help="rows x columns, comma-separated")
    options.add_argument("--dtypes", default="float32,bfloat16", help="comma-separated")
    arguments = options.parse_args()
    report = Report("int8 quantize", arguments)
    report.add(f"{HOW_TO_READ} Ours, torch and compiled torch take turns among themselves and with a copy.", "")
    kernels.reset_calls()
    for shape in (arguments.shapes or SHAPES[arguments.device]).split(","):
        for dtype in arguments.dtypes.split(","):
            case(report, shape, getattr(torch, dtype))
    calls = [f"{count} {op} on {backend}" for (op, backend), count in sorted(kernels.calls().items())]
    report.add(f"Calls of our kernels in the run: {', '.join(calls)}.")
    report.save()


if __name__ == "__main__":
    main()
