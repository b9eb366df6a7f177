"""What ``autocast="auto"`` means: other ops than int8 products run in the dtype in which this machine multiplies
faster.

On a GPU this is known: bf16 if the hardware multiplies it. On a CPU it is not known. Instructions for bf16 do not make
it faster: without AMX, some processors take twice as long over a bf16 matmul as over a float32 one. So both are
measured, on the
largest matrices of the model itself, in a fraction of a second. The measurement uses one thread: if threads wait for
each other, other programs on the machine decide how long a matmul takes.

The answer must not change between runs that are compared:

- between runs: measurements are kept beside the compiled kernels, for this processor, version of torch and these
  shapes. Removing the cache (docs/kernels.md) lets the next run measure again.
- between ranks: rank 0 measures, and the others take its answer.
- across a resume: a checkpoint holds it (``Int8MixedPrecision``).
"""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy

from lowbit_lightning.kernels.compile import cache

Shape = tuple[int, int]
"""(out_features, in_features) of a matmul by a weight."""

ROWS, LARGEST, SHAPES, SECONDS = 256, 2048, 3, 0.3
"""A measurement: rows of x, most features either way, how many shapes, and seconds after which no round begins."""

GAIN = 1.1
"""How much faster bf16 must be: casts to it cost something too, and no coin is to be tossed."""


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
    ranks = torch.distributed
    if not (ranks.is_available() and ranks.is_initialized()):
        return _choose_on_cpu(module)
    answer = [_choose_on_cpu(module) if ranks.get_rank() == 0 else None]
    ranks.broadcast_object_list(answer, src=0)
    assert answer[0] is not None
    return answer[0]


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
    """Matrices of linear layers, and of convolutions as matrices; not of embeddings, which are not multiplied."""
    for owner in module.modules():
        for p in owner.parameters(recurse=False):
            if not isinstance(owner, nn.Embedding) and not is_lazy(p) and p.dim() > 1:
                yield p.shape[0], p.shape[1:].numel()


def _largest(shapes: Iterable[Shape]) -> tuple[Shape, ...]:
    capped = {(min(n, LARGEST), min(k, LARGEST)) for n, k in shapes}
    return tuple(sorted(capped, key=lambda shape: (shape[0] * shape[1], shape), reverse=True)[:SHAPES])


@functools.cache
def seconds(shapes: tuple[Shape, ...]) -> tuple[float, float]:
    """How long one matmul of each shape takes in float32 and in bfloat16: kept from an earlier run, or measured."""
    described = json.dumps([1, torch.__version__, _processor(), ROWS, shapes])
    name = f"autocast-{hashlib.sha256(described.encode()).hexdigest()[:32]}.json"
    entry = cache.find(name)
    if entry is not None:
        float32, bfloat16 = json.loads(cache.body(entry))
        return float32, bfloat16
    measured = measure(shapes)
    cache.store(name, json.dumps(measured).encode())
    return measured


def measure(shapes: tuple[Shape, ...]) -> tuple[float, float]:
    """The same, measured now: the shortest of several rounds, in which the two take turns."""
    pairs: dict[torch.dtype, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        # Not random: the run's generators are not ours to draw from.
        pairs[dtype] = [(torch.ones(ROWS, k, dtype=dtype), torch.ones(n, k, dtype=dtype)) for n, k in shapes]
    best = {dtype: [float("inf")] * len(shapes) for dtype in pairs}
    threads, start = torch.get_num_threads(), time.perf_counter()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode(), torch.autocast("cpu", enabled=False):
            for rounds in range(8):
                if rounds >= 2 and time.perf_counter() - start > SECONDS:
                    break
                for dtype, operands in pairs.items():
                    best[dtype] = [min(b, _once(*pair)) for b, pair in zip(best[dtype], operands, strict=True)]
    finally:
        torch.set_num_threads(threads)
    return sum(best[torch.float32]), sum(best[torch.bfloat16])


def _once(x: torch.Tensor, weight: torch.Tensor) -> float:
    start = time.perf_counter()
    F.linear(x, weight)
    return time.perf_counter() - start


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.platform() + platform.processor()
    return "\n".join(line for line in lines if line.startswith(("vendor_id", "cpu family", "model", "flags", "CPU ")))


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
