"""Forward and backward of one linear layer: fp32, bf16 autocast, Int8Linear, and torchao's int8 training.

    python benchmarks/int8_linear.py [--device cuda] [--shapes 2048x1024x4096,...] [--output docs/benchmarks]

A shape is tokens x input features x output features. A pass is the forward, the gradient of the input and that of the
weight: three products. Input, weight and gradients are float32; "bf16" is under torch's bf16 autocast, as in training
with "bf16-mixed". torchao's layer ignores autocast, so there its "bf16" has input, weight and gradients in bfloat16,
which moves fewer bytes than the others.

An optimizer has stepped our layer's weights once, as in training: so a pass makes both int8 forms of x, of the weight
and of the incoming gradient by one op each. What is kept of the weight is thrown away before each pass, as by a step.

torchao is measured with ``module_swap=True``, since by default it runs no int8 product, and both as it is and compiled,
on which it relies for speed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from _common import HOW_TO_READ, Candidate, Report, copy_bandwidth, measure, parser, rival, seconds, skipped
from torch import Tensor, nn

from lowbit_lightning import kernels
from lowbit_lightning.layers import Int8Linear

SHAPES = {"cpu": "2048x1024x4096,4096x2048x2048", "cuda": "8192x4096x4096,2048x1024x4096"}
PASS = {"quantize_both": 2, "quantize_rowwise": 1, "quantize_colwise": 1, "int8_matmul": 3}
"""What Int8Linear calls in one pass: x and dy give both forms at once, w gives one in each direction."""

PASS_ROTATED = {"hadamard": 6, "quantize_rowwise": 3, "quantize_colwise": 3, "int8_matmul": 3}
PASS_HIGH = {"quantize_both": 1, "quantize_rowwise": 2, "quantize_colwise": 2, "int8_matmul": 3}  # keeping x itself


def passes(layer: Any, x: Tensor, autocast: bool = False) -> Callable[[], None]:
    """A function that runs forward and backward once, and leaves no gradient behind."""
    x = x.detach().requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        dy = torch.randn_like(layer(x))

    def run() -> None:
        x.grad = None
        for p in layer.parameters():
            p.grad = None
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            y = layer(x)
        y.backward(dy)

    return run


def candidates(tokens: int, inputs: int, outputs: int, device: str) -> list[Candidate]:
    torch.manual_seed(0)
    x = torch.randn(tokens, inputs, device=device)
    plain = nn.Linear(inputs, outputs, device=device)

    def ours(autocast: bool, **settings: Any) -> Callable[[], None]:
        return passes(Int8Linear(inputs, outputs, device=device, **settings), x, autocast)

    def torchao(compiled: bool, dtype: torch.dtype) -> Callable[[], None]:
        config = rival("torchao.prototype.quantized_training", "Int8MixedPrecisionTrainingConfig")
        layer = nn.Sequential(nn.Linear(inputs, outputs, device=device, dtype=dtype))
        rival("torchao.quantization", "quantize_")(layer, config(module_swap=True))
        return passes(torch.compile(layer) if compiled else layer, x.to(dtype))

    return [
        Candidate("fp32", lambda: passes(plain, x)),
        Candidate("bf16 autocast", lambda: passes(plain, x, autocast=True)),
        Candidate("Int8Linear fp32", lambda: ours(False)),
        Candidate("Int8Linear bf16", lambda: ours(True)),
        Candidate("Int8Linear bf16, save_inputs=high", lambda: ours(True, save_inputs="high")),
        Candidate("Int8Linear fp32, rotated", lambda: ours(False, rotation="hadamard")),
        Candidate("Int8Linear bf16, rotated", lambda: ours(True, rotation="hadamard")),
        Candidate("torchao int8 fp32", lambda: torchao(False, torch.float32)),
        Candidate("torchao int8 fp32 compiled", lambda: torchao(True, torch.float32)),
        Candidate("torchao int8 bf16 compiled", lambda: torchao(True, torch.bfloat16)),
    ]


def proof(candidate: Candidate) -> str:
    """What one pass called, by the ops' own count. Raises if that is not what a pass should call."""
    assert candidate.run is not None
    kernels.reset_calls()
    candidate.run()
    calls = kernels.calls()
    counts = {op: count for (op, _), count in calls.items()}
    expected = PASS_HIGH if "high" in candidate.name else PASS_ROTATED if "rotated" in candidate.name else PASS
    if counts != expected or len(calls) != len(expected):
        raise RuntimeError(f"{candidate.name} should call {expected} in a pass, but called {calls}")
    return ", ".join(f"{count} {op} on {backend}" for (op, backend), count in sorted(calls.items()))


def linear(report: Report, shape: str) -> None:
    arguments = report.arguments
    tokens, inputs, outputs = (int(n) for n in shape.split("x"))
    report.add(f"## {tokens} tokens, {inputs} to {outputs} features", "")
    everyone = candidates(tokens, inputs, outputs, arguments.device)
    running = measure(everyone, arguments)
    medians = {c.name: c.median for c in running}

    def ratio(candidate: Candidate, base: str) -> str:
        return f"{medians[base] / candidate.median:.2f}x" if base in medians else "-"

    products = 3 * 2 * tokens * inputs * outputs
    rows = [
        [
            *(c.name, f"{1e3 * c.median:.2f}", c.spread, f"{1e3 * c.best:.2f}", f"{products / c.median / 1e12:.3g}"),
            *(ratio(c, "fp32"), ratio(c, "bf16 autocast")),
        ]
        for c in running
    ]
    report.table(["forward + backward", "ms", "spread", "best", "TOP/s", "fp32 / it", "bf16 / it"], rows)
    report.add(*skipped(everyone))
    for candidate in running:
        if candidate.name.startswith("Int8Linear"):
            report.add(f"- one pass of {candidate.name} called {proof(candidate)}")
    report.add("")


def parts(report: Report, shape: str, bandwidth: float) -> None:
    """The kernels one by one: what the quantisers reach of the memory's speed, the product of the processor's."""
    arguments = report.arguments
    tokens, inputs, outputs = (int(n) for n in shape.split("x"))
    torch.manual_seed(0)
    tensors = {"x": (tokens, inputs), "weight": (outputs, inputs), "dy": (tokens, outputs)}
    rows = []
    for name, size in tensors.items():
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(size, device=arguments.device).to(dtype)
            for op in (kernels.quantize_rowwise, kernels.quantize_colwise, kernels.quantize_both):
                moved = x.numel() * (x.element_size() + (2 if op is kernels.quantize_both else 1))
                time = _median(lambda op=op, x=x: op(x), arguments)  # type: ignore[misc]
                speed = moved / time
                label = f"{op.__name__} of {name}, {str(dtype).removeprefix('torch.')}"
                rows.append([label, f"{1e3 * time:.3f}", f"{speed / 1e9:.1f} GB/s", f"{100 * speed / bandwidth:.0f} %"])
    for m, n, k in ((tokens, outputs, inputs), (tokens, inputs, outputs), (outputs, inputs, tokens)):
        a, b = (torch.randint(-127, 128, (r, k), dtype=torch.int8, device=arguments.device) for r in (m, n))
        scales = torch.rand(m, device=arguments.device), torch.rand(n, device=arguments.device)
        runs = {
            f"{name} {m} x {n} x {k} to {str(kind).removeprefix('torch.')}": partial(op, a, b, *scales, None, kind)
            for kind in (torch.float32, torch.bfloat16)
            for name, op in products(arguments.device).items()
        }
        runs[f"bfloat16 matmul {m} x {n} x {k}"] = partial(torch.matmul, a.bfloat16(), b.bfloat16().t())
        for label, run in runs.items():
            time = _median(run, arguments)
            rows.append([label, f"{1e3 * time:.3f}", f"{2 * m * n * k / time / 1e12:.3g} TOP/s", "-"])
    report.add("The kernels of a pass, one after the other, each a median of its own loop:", "")
    report.table(["kernel", "ms", "speed", "of a copy's bandwidth"], rows)


def products(device: str) -> dict[str, Callable[..., Tensor]]:
    """The int8 product as it is chosen, and on a GPU the engines that it is chosen from."""
    if device == "cpu":
        return {"int8_matmul": kernels.int8_matmul}
    from lowbit_lightning.kernels.cuda import int8_product, int8_wgmma

    wgmma = int8_wgmma.engines() if int8_wgmma.exists(torch.device(device, 0)) else {}
    ours = {"mma.sync": int8_product.fused_product, "cuBLASLt": int8_product.cublaslt_product, **wgmma}
    return {"int8_matmul": kernels.int8_matmul, **{f"- {name}": engine for name, engine in ours.items()}}


def _median(run: Callable[[], object], arguments: argparse.Namespace) -> float:
    times = sorted(seconds(run, arguments.device) for _ in range(arguments.repeats + 2))
    return times[len(times) // 2]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--shapes", help="tokens x inputs x outputs, comma-separated")
    arguments = options.parse_args()
    report = Report("int8 linear", arguments)
    bandwidth = copy_bandwidth(arguments)
    report.add(f"A copy moves {bandwidth / 1e9:.1f} GB/s, read plus written. {HOW_TO_READ}", "")
    shapes = (arguments.shapes or SHAPES[arguments.device]).split(",")
    for shape in shapes:
        linear(report, shape)
        parts(report, shape, bandwidth)
    report.save()


if __name__ == "__main__":
    main()
