"""Convolutions: fp32, bf16 autocast and int8; forward and backward of those of ResNet-50, and a step of a ResNet-18.

    python benchmarks/int8_conv.py [--device cuda] [--images 16] [--parts layers,step,bytes] [--output docs/benchmarks]

All in channels_last. A pass is the forward, the gradient by the input and that by the weight, under the autocast of its
name; weights are float32, and the input and the incoming gradient have the dtype that the autocast gives. A step is
forward, backward and ``torch.optim.SGD`` with momentum. "bytes" counts the tensors that autograd saves in one forward
of all of ResNet-50's convolutions, weights left out.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable

import torch
from _common import HOW_TO_READ, ROOT, Candidate, Report, measure, parser
from _resnet import Convolution, resnet50
from torch import Tensor, nn

from lowbit_lightning import convert, kernels
from lowbit_lightning.layers import Int8Conv2d

sys.path.insert(0, str(ROOT / "examples"))

from vision_models import ResNet

RIVALS = ("fp32", "bf16 autocast")


def autocast(device: str, on: bool) -> torch.autocast:
    return torch.autocast(device, torch.bfloat16, enabled=on)


def images(n: int, channels: int, size: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(n, channels, size, size, device=device, dtype=dtype)
    return x.to(memory_format=torch.channels_last)


def passes(layer: nn.Module, one: Convolution, count: int, device: str, bf16: bool) -> Callable[[], None]:
    layer = layer.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    dtype = torch.bfloat16 if bf16 else torch.float32
    x = images(count, one.channels, one.size, device, dtype).requires_grad_()
    dy = images(count, one.features, one.size // one.stride, device, dtype)

    def run() -> None:
        x.grad = None
        for p in layer.parameters():
            p.grad = None
        with autocast(device, bf16):
            y = layer(x)
        y.backward(dy)

    return run


def layers(report: Report) -> None:
    arguments, rows, gains = report.arguments, [], []
    for one in resnet50():
        if str(one.kernel) not in arguments.kernels.split(","):
            continue
        torch.manual_seed(0)
        everyone = [
            Candidate(name, lambda int8=int8, bf16=bf16, one=one: passes(  # type: ignore[misc]
                one.layer(Int8Conv2d if int8 else nn.Conv2d), one, arguments.images, arguments.device, bf16
            ))
            for name, int8, bf16 in (("fp32", False, False), ("bf16 autocast", False, True), ("int8", True, True))
        ]  # fmt: skip
        best = {c.name: c.best for c in measure(everyone, arguments)}
        gain = min(best[name] for name in RIVALS) / best["int8"]
        gains += [gain] * one.count
        times = [f"{1e3 * best[name]:.2f}" for name in (*RIVALS, "int8")]
        rows.append([str(one), str(one.count), *times, f"{best['fp32'] / best['int8']:.2f}x", f"{gain:.2f}x"])
    report.add("## Forward and backward of the convolutions of ResNet-50", "")
    header = ["kernel, channels, image", "layers", "fp32 ms", "bf16 ms", "int8 ms", "fp32 / int8", "faster / int8"]
    report.table(header, rows)
    means = {"all layers": gains, "each kind once": [float(row[-1][:-1]) for row in rows]}
    for name, of in means.items():
        mean = math.exp(sum(map(math.log, of)) / len(of))
        report.add(f"Geometric mean over {name}: {mean:.2f}x the faster of fp32 and bf16; lowest {min(of):.2f}x.", "")


def step(report: Report) -> None:
    arguments = report.arguments
    x = images(arguments.images, 3, 224, arguments.device)
    labels = torch.arange(arguments.images, device=arguments.device) % 1000

    def build(int8: bool, bf16: bool) -> Callable[[], None]:
        torch.manual_seed(0)
        model = ResNet(1000).to(arguments.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if int8:
            convert.swap_linears(model)
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

        def run() -> None:
            with autocast(arguments.device, bf16):
                loss = nn.functional.cross_entropy(model(x), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    everyone = [
        Candidate("fp32", lambda: build(False, False)),
        Candidate("bf16 autocast", lambda: build(False, True)),
        Candidate("int8 under bf16 autocast", lambda: build(True, True)),
    ]
    running = measure(everyone, arguments)
    faster = min(c.best for c in running[:2])
    report.add(f"## A training step of ResNet-18, {arguments.images} images of 224 x 224", "")
    rows = [
        [c.name, f"{1e3 * c.median:.0f}", c.spread, f"{1e3 * c.best:.0f}", f"{faster / c.best:.2f}x"] for c in running
    ]
    report.table(["step", "ms", "spread", "best", "faster rival / it"], rows)
    kernels.reset_calls()
    assert running[-1].run is not None
    running[-1].run()
    report.add(f"One step called {kernels.calls()}.", "")


def saved_bytes(report: Report) -> None:
    """What autograd keeps; shapes alone decide, so images are few."""
    totals = {}
    for name, kind in (("bf16 autocast", nn.Conv2d), ("int8", Int8Conv2d)):
        total = 0
        for one in resnet50():
            layer = one.layer(kind).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            saved: dict[int, int] = {}

            def keep(x: Tensor, saved: dict[int, int] = saved) -> Tensor:
                saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
                return x

            x = images(1, one.channels, one.size, "cpu", torch.bfloat16).requires_grad_()
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), autocast("cpu", True):
                layer(x)
                cast = layer.weight.numel() * 2  # autocast's copy of the weight, which isn't an activation
            weights = {layer.weight.untyped_storage().data_ptr()}
            sizes = [size for pointer, size in saved.items() if pointer not in weights]
            if name == "bf16 autocast":
                sizes.remove(cast)
            total += one.count * sum(sizes)
        totals[name] = total
    share = totals["int8"] / totals["bf16 autocast"]
    report.add("## What the backward of ResNet-50's convolutions keeps of one image of 224 x 224", "")
    rows = [[name, f"{total / 2**20:.2f}"] for name, total in totals.items()]
    report.table(["", "MiB"], rows)
    report.add(f"int8 keeps {share:.3f} of the bytes.", "")


PARTS = {"layers": layers, "step": step, "bytes": saved_bytes}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--images", type=int, default=16)
    options.add_argument("--kernels", default="1,3", help="of the layers that are timed")
    options.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    arguments: argparse.Namespace = options.parse_args()
    report = Report("int8 convolutions", arguments)
    report.add(HOW_TO_READ, "")
    for part in arguments.parts.split(","):
        PARTS[part](report)
    report.save()


if __name__ == "__main__":
    main()
