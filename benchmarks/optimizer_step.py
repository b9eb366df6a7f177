"""One step of 8-bit optimizers: ours against torch's fused and foreach AdamW, bitsandbytes and torchao.

    python benchmarks/optimizer_step.py [--device cuda] [--cases big,model] [--millions 64] [--output docs/benchmarks]

Parameters and gradients are the same tensors for everyone; each optimizer has states of its own. Everyone
gets warm-up steps, in which torchao compiles. A step must move, per parameter: the parameter in and out, its gradient
in, and each state in and out; ``GB/s`` and the share of a copy's bandwidth count that and nothing else, so that an
optimizer that reads memory twice shows a smaller share (LAMB has to: its norms come before its step).

Cases: ``big``, one square matrix of ``--millions`` parameters; ``bf16``, the same in bfloat16 (torch then keeps its
states in bfloat16 too); ``model``, the 148 tensors of a GPT-2 of 124 million; ``small``, 2000 matrices of 16 K
parameters, where the cost per tensor decides. All but ``bf16`` are in float32.
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

CODED = 1 + 4 / 256  # bytes of a state in 8 bits, with a float32 scale for 256
CASES = ("big", "bf16", "model", "small")


@dataclass(frozen=True)
class Contender:
    """An optimizer to measure: what makes it, and how many bytes an element of its states has, together.

    ``states`` of None: two, in the parameter's dtype.
    """

    name: str
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    states: float | None

    def bytes(self, dtype: torch.dtype) -> float:
        """What a step must move for a parameter: it and its states in and out, its gradient in."""
        states = 2 * dtype.itemsize if self.states is None else self.states
        return 3 * dtype.itemsize + 2 * states


def contenders() -> list[Contender]:
    def other(module: str, **options: Any) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
        return lambda params: rival(module, "AdamW8bit")(params, lr=1e-4, **options)  # type: ignore[return-value]

    def torchs(**options: Any) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
        return lambda params: torch.optim.AdamW(params, lr=1e-4, **options)

    return [
        Contender("torch AdamW fused", torchs(fused=True), None),
        Contender("torch AdamW foreach", torchs(foreach=True), None),
        Contender("bitsandbytes AdamW8bit", other("bitsandbytes.optim"), 2 * CODED),
        Contender("torchao AdamW8bit", other("torchao.optim"), 2 * CODED),
        Contender("AdamW 8 bits", lambda params: optim.AdamW(params, lr=1e-4), 2 * CODED),
        Contender("AdamW 32 bits", lambda params: optim.AdamW(params, lr=1e-4, bits=32), 8),
        Contender("Adam 8 bits", lambda params: optim.Adam(params, lr=1e-4), 2 * CODED),
        Contender("SGD with momentum 8 bits", lambda params: optim.SGD(params, lr=1e-4, momentum=0.9), CODED),
        Contender("Lion 8 bits", lambda params: optim.Lion(params, lr=1e-4), CODED),
        Contender("RMSprop 8 bits", lambda params: optim.RMSprop(params, lr=1e-4), CODED),
        Contender("Adagrad 8 bits", lambda params: optim.Adagrad(params, lr=1e-4), CODED),
        Contender("LAMB 8 bits", lambda params: optim.LAMB(params, lr=1e-4), 2 * CODED),
        Contender("LARS 8 bits", lambda params: optim.LARS(params, lr=1e-4), CODED),
        Contender("AdEMAMix 8 bits", lambda params: optim.AdEMAMix(params, lr=1e-4), 2 * CODED + 4),
    ]


def shapes(case: str, millions: float) -> list[tuple[int, ...]]:
    if case in ("big", "bf16"):
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
    dtype = torch.bfloat16 if name == "bf16" else torch.float32
    values = (0.02 * torch.randn(shape, device=arguments.device) for shape in shapes(name, millions))
    params = [nn.Parameter(value.to(dtype)) for value in values]
    for p in params:
        p.grad = 1e-3 * torch.randn_like(p)
    count = sum(p.numel() for p in params)
    report.add(f"## {name}: {len(params)} tensors, {count / 1e6:.1f} M parameters", "")

    everyone = contenders()
    candidates = [Candidate(c.name, lambda make=c.make: make(params).step) for c in everyone]  # type: ignore[misc]
    running = measure(candidates, arguments)
    medians = {c.name: c.median for c in running}
    moved = {c.name: c.bytes(dtype) * count for c in everyone}

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
    options.add_argument("--cases", default=",".join(CASES), help=f"which of {', '.join(CASES)}")
    options.add_argument("--millions", type=float, default=64, help="size of the case big")
    arguments = options.parse_args()
    unknown = set(arguments.cases.split(",")) - set(CASES)
    if unknown:
        options.error(f"--cases must be of {', '.join(CASES)}; got {sorted(unknown)}")
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
