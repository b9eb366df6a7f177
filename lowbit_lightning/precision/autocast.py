"""What ``autocast="auto"`` means: ops other than int8 products run in the dtype that this machine multiplies faster.

On a GPU this is known: bf16 if the hardware multiplies it. On a CPU it is not known. Instructions for bf16 do not make
it faster: without AMX, some processors take twice as long over a bf16 matmul as over a float32 one. So both are
measured, on the largest matrices of the model itself, in a fraction of a second.

The answer must not change between runs that are compared:

- between runs: measurements are kept beside the compiled kernels, for this processor, version of torch and these
  shapes. Removing the cache (docs/kernels.md) lets the next run measure again.
- between ranks: rank 0 measures, and the others take its answer.
- across a resume: a checkpoint holds it (``Int8MixedPrecision``).
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from lowbit_lightning.kernels.compile import processor
from lowbit_lightning.layers.timing import agreed, remembered, shortest

Shape = tuple[int, int]
"""(out_features, in_features) of a matmul by a weight."""

ROWS, LARGEST, SHAPES, ROUNDS, SECONDS = 256, 2048, 3, 8, 0.3
"""A measurement: rows of x, most features either way, how many shapes; rounds, and seconds after which none begins."""

GAIN = 1.1
"""bf16 must be faster by this factor: casts to it take time too, and noise must not decide."""


@dataclass(frozen=True)
class Choice:
    """Whether other ops run under bf16 autocast; ``str(choice)`` says so, and why."""

    bf16: bool
    reason: str

    def __str__(self) -> str:
        return f"other ops run in {'bfloat16 (autocast)' if self.bf16 else 'float32'}: {self.reason}"


def choose(module: nn.Module, device_type: str) -> Choice:
    """The faster choice for the module's own matmuls. On a CPU all ranks call it together and get the same answer."""
    if device_type != "cpu":
        fast = computes_in_bf16(device_type)
        return Choice(fast, f"the hardware {'multiplies' if fast else 'does not multiply'} bfloat16")
    return agreed(lambda: _choose_on_cpu(module))


def _choose_on_cpu(module: nn.Module) -> Choice:
    if not computes_in_bf16("cpu"):
        return Choice(False, "the processor has no instructions for bfloat16")
    shapes = _largest(_matrices(module))
    if not shapes:
        return Choice(False, "the model has no matrix to measure")
    float32, bfloat16 = seconds(shapes)
    measured = ", ".join(f"{inputs} to {outputs}" for outputs, inputs in shapes)
    took = f"matmuls of {measured} features take {1e3 * float32:.3g} ms in float32, {1e3 * bfloat16:.3g} in bfloat16"
    return Choice(float32 > GAIN * bfloat16, f"{took} on this processor")


def _matrices(module: nn.Module) -> Iterator[Shape]:
    """Matrices of linear layers, of each expert, and of convolutions as matrices; not of embeddings, which are not
    multiplied."""
    for owner in module.modules():
        for p in owner.parameters(recurse=False):
            if isinstance(owner, nn.Embedding) or is_lazy(p) or p.dim() < 2:
                continue
            outputs, *inputs = p.shape if isinstance(owner, _ConvNd) else p.shape[-2:]
            yield outputs, prod(inputs)


def _largest(shapes: Iterable[Shape]) -> tuple[Shape, ...]:
    capped = {(min(n, LARGEST), min(k, LARGEST)) for n, k in shapes}
    return tuple(sorted(capped, key=lambda shape: (shape[0] * shape[1], shape), reverse=True)[:SHAPES])


@functools.cache
def seconds(shapes: tuple[Shape, ...]) -> tuple[float, float]:
    """How long one matmul of each shape takes in float32 and in bfloat16: kept from an earlier run, or measured."""
    float32, bfloat16 = remembered("autocast", processor(), ROWS, shapes, measure=lambda: measure(shapes))
    return float32, bfloat16


def measure(shapes: tuple[Shape, ...]) -> tuple[float, float]:
    """``seconds``, measured now."""
    matmuls = []
    for dtype in (torch.float32, torch.bfloat16):
        # Not random: the run's generators are not ours to draw from.
        pairs = [(torch.ones(ROWS, k, dtype=dtype), torch.ones(n, k, dtype=dtype)) for n, k in shapes]
        matmuls += [functools.partial(F.linear, *pair) for pair in pairs]
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        best = shortest(matmuls, torch.device("cpu"), ROUNDS, SECONDS)
    return sum(best[: len(shapes)]), sum(best[len(shapes) :])


@functools.cache
def computes_in_bf16(device_type: str) -> bool:
    """Whether the hardware multiplies bf16 itself: on others autocast would convert back and forth for nothing."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type != "cpu":
        return False
    if platform.machine() in ("x86_64", "AMD64"):
        tests = (getattr(torch.cpu, name, bool) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
        return any(test() for test in tests)
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
