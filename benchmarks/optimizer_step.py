"""One step of 8-bit optimizers: ours against torch's fused and foreach AdamW, bitsandbytes and torchao.

    python benchmarks/optimizer_step.py [--device cuda] [--cases big,model] [--millions 64] [--output docs/benchmarks]

Parameters and gradients are float32 and the same tensors for everyone; each optimizer has states of its own. Everyone
gets warm-up steps, in which torchao compiles. A step must move, per parameter: the parameter in and out, its gradient
in, and each state in and out; ``GB/s`` and the share of a copy's bandwidth count that and nothing else, so that an
optimizer that reads memory twice shows a smaller share (LAMB has to: its norms come before its step).

Cases: ``big``, one square matrix of ``--millions`` parameters; ``model``, the 148 tensors of a GPT-2 of 124 million;
``small``, 2000 matrices of 16 K parameters, where the cost per tensor decides.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from _common import HOW_TO_READ, Candidate, Report, copy_bandwidth, measure, parser, rival, skipped
from torch import nn

from lowbit_lightning import kernels, optim

FLOAT_BYTES = 4 + 4 + 4  # the parameter in and out, the gradient in
STATE_BYTES = {8: 2 * (1 + 4 / 256), 32: 2 * 4}  # one state in and out; 8 bits with a float32 scale for 256


@dataclass(frozen=True)
class Contender:
    """An optimizer to measure: what makes it, and how many states of how many bits it keeps."""

    name: str
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    states: int
    bits: int

    @property
    def bytes(self) -> float:
        return FLOAT_BYTES + self.states * STATE_BYTES[self.bits]


def contenders() -> list[Contender]:
    def other(module: str, **options: Any) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
        return lambda params: rival(module, "AdamW8bit")(params, lr=1e-4, **options)  # type: ignore[return-value]

    def torchs(**options: Any) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
        return lambda params: torch.optim.AdamW(params, lr=1e-4, **options)

    return [
        Contender("torch AdamW fused", torchs(fused=True), 2, 32),
        Contender("torch AdamW foreach", torchs(foreach=True), 2, 32),
        Contender("bitsandbytes AdamW8bit", other("bitsandbytes.optim"), 2, 8),
        Contender("torchao AdamW8bit", other("torchao.optim"), 2, 8),
        Contender("AdamW 8 bits", lambda params: optim.AdamW(params, lr=1e-4), 2, 8),
        Contender("AdamW 32 bits", lambda params: optim.AdamW(params, lr=1e-4, bits=32), 2, 32),
        Contender("SGD with momentum 8 bits", lambda params: optim.SGD(params, lr=1e-4, momentum=0.9), 1, 8),
        Contender("LAMB 8 bits", lambda params: optim.LAMB(params, lr=1e-4), 2, 8),
    ]


def shapes(case: str, millions: float) -> list[tuple[int, ...]]:
    if case == "big":
        side = math.isqrt(int(millions * 2**20))
        return [(side, side)]
    if case == "small":
        return [(128, 128)] * 2000
    width, layers = 768, 12
    norm = [(width,), (width,)]
    block = [
        *norm,
        *((3 * width, width), (3 * width,), (width, width), (width,)),
        *norm,
        *((4 * width, width), (4 * width,), (width, 4 * width), (width,)),
    ]
    return [(50257, width), (1024, width), *(block * layers), *norm]


def case(report: Report, name: str, millions: float, bandwidth: float) -> None:
    arguments = report.arguments
    gc.collect()  # the states of the case before
    torch.manual_seed(0)
    params = [nn.Parameter(0.02 * torch.randn(shape, device=arguments.device)) for shape in shapes(name, millions)]
    for p in params:
        p.grad = 1e-3 * torch.randn_like(p)
    count = sum(p.numel() for p in params)
    report.add(f"## {name}: {len(params)} tensors, {count / 1e6:.1f} M parameters", "")

    everyone = contenders()
    candidates = [Candidate(c.name, lambda make=c.make: make(params).step) for c in everyone]  # type: ignore[misc]
    running = measure(candidates, arguments)
    medians = {c.name: c.median for c in running}
    moved = {c.name: c.bytes * count for c in everyone}

    def ratio(candidate: Candidate, base: str) -> str:
        return f"{medians[base] / candidate.median:.2f}x" if base in medians else "-"

    rows = []
    for c in running:
        speed = moved[c.name] / c.median
        times = f"{1e3 * c.median:.2f}", c.spread, f"{1e3 * c.best:.2f}", f"{count / c.median / 1e6:.0f}"
        ratios = ratio(c, "torch AdamW fused"), ratio(c, "bitsandbytes AdamW8bit")
        rows.append([c.name, *times, f"{speed / 1e9:.1f}", f"{100 * speed / bandwidth:.0f} %", *ratios])
    header = ["one step", "ms", "spread", "best", "Mparam/s", "GB/s", "of a copy", "fused / it", "bitsandbytes / it"]
    report.table(header, rows)
    report.add(*skipped(candidates))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--cases", default="big,model,small", help="which of big, model, small")
    options.add_argument("--millions", type=float, default=64, help="size of the case big")
    arguments = options.parse_args()
    unknown = set(arguments.cases.split(",")) - {"big", "model", "small"}
    if unknown:
        options.error(f"--cases must be of big, model, small; got {sorted(unknown)}")
    report = Report("optimizer step", arguments)
    bandwidth = copy_bandwidth(arguments)
    report.add(f"A copy moves {bandwidth / 1e9:.1f} GB/s, read plus written. {HOW_TO_READ}", "")
    kernels.reset_calls()
    for name in arguments.cases.split(","):
        case(report, name, arguments.millions, bandwidth)
    steps = [f"{count} {op} on {backend}" for (op, backend), count in sorted(kernels.calls().items())]
    report.add(f"Calls of our kernels in the run: {', '.join(steps)}.")
    report.save()


if __name__ == "__main__":
    main()
