"""The quick way of the optimizer step on a GPU gives the same bits: proven for all numbers, on the kernels' own text.

The hardware's approximations are played by every number that is as near as PTX promises (``rcp.approx``: 1 ulp,
``rsqrt.approx``: a relative error of 2^-22.9). A significand stands for all powers of two: in the range that the kernel
checks, no step overflows or becomes subnormal.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from emulator import EmulatorError, Module
from emulator.backend import emulated

from lowbit_lightning import kernels, optim
from lowbit_lightning.kernels import compile, formats
from lowbit_lightning.kernels.compile import source_text
from lowbit_lightning.kernels.sources import StepVariant

sys.path.append(str(Path(__file__).resolve().parent.parent.parent / "benchmarks"))

from roofline import sass

KERNELS = """
#include "gpu.h"
#include "scale.h"
#include "dynamic_tables.h"
#include "dynamic_lines.h"
#include "dynamic_map.h"
#include "over_root_quick.h"

constexpr int MOST = 100;  // numbers that are named
LB_FN float beside(float x, int steps) { return from_bits(to_bits(x) + steps); }
LB_FN bool within_an_ulp(float b, float inverse) {  // 1 <= b < 2, so that 2^-24 is an ulp of what is below 1
    const double error = 1.0 / (double)b - (double)inverse;
    return error <= 0x1p-24 && error >= -0x1p-24;
}

// Roots of the 2^24 numbers from 1 to 4, from each approximation.
extern "C" __global__ void roots(int* wrong, int* count, long long* tried) {
    for (int k = threadIdx.x; k < 1 << 24; k += blockDim.x) {
        const float x = from_bits(0x3f800000 + k), exact = sqrtf(x);
        const double root = sqrt((double)x);
        for (int steps = -3; steps <= 3; ++steps) {
            const float inverse = beside((float)(1.0 / root), steps);
            const double error = (double)inverse * root - 1.0;
            if (error > 0x1.126p-23 || error < -0x1.126p-23) continue;  // 2^-22.9
            ++tried[threadIdx.x];
            if (nearest_root(x, inverse) != exact && *count < MOST) wrong[(*count)++] = to_bits(x);
        }
    }
}

// Reciprocals of the 2^23 numbers from 1 to 2, from each approximation. `open`: divisors for which the argument about
// quotients (test_quotients) leaves something to try.
extern "C" __global__ void reciprocals(int* wrong, int* count, long long* tried, int* open, int* opened) {
    for (int k = threadIdx.x; k < 1 << 23; k += blockDim.x) {
        const float b = from_bits(0x3f800000 + k), exact = 1.0f / b;
        bool left = false;
        for (int steps = -2; steps <= 2; ++steps) {
            const float inverse = beside(exact, steps);
            if (!within_an_ulp(b, inverse)) continue;
            ++tried[threadIdx.x];
            if (nearest_reciprocal(b, inverse) != exact && *count < MOST) wrong[(*count)++] = to_bits(b);
            const double improved = (double)improved_reciprocal(b, inverse), delta = fma((double)b, improved, -1.0);
            left = left || (delta < 0 ? -delta : delta) * (double)b * (1 + 0x1p-21) >= 0x1p-23;
        }
        if (left && *opened < MOST) open[(*opened)++] = to_bits(b);
    }
}

// All quotients of 2^24 dividends from 1 to 4 by a divisor, from the nearest reciprocal.
extern "C" __global__ void quotients(int divisor, long long* wrong) {
    const float b = from_bits(divisor), inverse = 1.0f / b;
    for (int k = threadIdx.x; k < 1 << 24; k += blockDim.x) {
        const float a = from_bits(0x3f800000 + k);
        wrong[threadIdx.x] += nearest_quotient(a, b, inverse) != a / b;
    }
}

// The rules' function, of numbers of any kind: where it is sure, its results are the exact ones.
extern "C" __global__ void over(
    const float* a, const float* x, const float* c, const float* eps, int count, int* sure, int* wrong) {
    for (int k = threadIdx.x; k < count; k += blockDim.x) {
        Quick quick;
        Exact exact;
        const float ours = quick.over(0.7f, a[k], x[k], c[k], eps[k]);
        const float theirs = exact.over(0.7f, a[k], x[k], c[k], eps[k]);
        sure[k] = quick.sure() && Quick::allows(c[k], eps[k]);
        wrong[k] = sure[k] && to_bits(ours) != to_bits(theirs);
    }
}

// As the map's definition has it, without tables.
template <class C> LB_FN uint32_t f_of(float x) {
    const float magnitude = x > C::low ? x : C::low;
    int line = 0;
    for (int k = 0; k < C::lines - 1; ++k) line += magnitude > C::thresholds[k];
    const float u = fmaf(magnitude, C::encode_slope[line], C::encode_offset);
    return (uint32_t)(to_bits(u < C::encode_top ? u : C::encode_top) >> C::encode_shift[line]) & 255;
}
// Codes of the numbers with these bits, every `stride`-th, of both signs. A negative number of f = 128 has none.
extern "C" __global__ void codes(int first, int count, int stride, long long* wrong) {
    typedef DynamicSignedConstants S;
    typedef DynamicUnsignedConstants U;
    const uint32_t place = prepare_tables(true, true);
    for (int k = threadIdx.x; k < count; k += blockDim.x) {
        const float x = from_bits(first + k * stride), four[4] = {x, -x, x, -x};
        const int f = (int)f_of<S>(x);
        const uint32_t ours = signed_codes(encode_bytes<S>(four, 1.0f, place), f < 128 ? sign_bytes(four) : 0);
        const uint32_t low = (uint32_t)(f < 128 ? 127 - f : 255), high = (uint32_t)(127 + f);
        wrong[threadIdx.x] += ours != (high | low << 8 | high << 16 | low << 24);
        const uint32_t code = (f_of<U>(x) - 1) & 255;
        wrong[threadIdx.x] += unsigned_codes(encode_bytes<U>(four, 1.0f, place)) != code * 0x01010101u;
    }
}
"""
THREADS = 32


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Module:
    *includes, body = KERNELS.split("\n\n", 1)
    names = [line.split('"')[1] for line in includes[0].splitlines() if line]
    return Module(source_text(*names, generated={"dynamic_tables.h": formats.cpp_tables()}) + body)


def counts(number: int = 1) -> list[torch.Tensor]:
    return [torch.zeros(THREADS, dtype=torch.int64) for _ in range(number)]


def named() -> list[torch.Tensor]:
    return [torch.zeros(100, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)]


def test_roots(module: Module) -> None:
    """Two numbers have one approximation each from which the root is not the nearest. No GPU returns it: CUDA's own
    root would be wrong too (``test_cudas_own``)."""
    wrong, count = named()
    (tried,) = counts()
    module.launch("roots", 1, THREADS, [wrong, count, tried])
    assert tried.sum() > 3 * 2**24
    assert sorted(wrong[: int(count)].tolist()) == [0x3FFC114A, 0x406E9372]


def test_reciprocals_and_quotients(module: Module) -> None:
    """Let Q = a / b, B the integer significand of b, y the improved reciprocal and d = b y - 1.

    The first correction leaves a quotient q1 within 0.5 + 2^-22 ulp of Q, so its remainder is exact, and the second
    rounds Q + (Q - q1) d, once. That differs from Q rounded only if a midpoint lies between; but no quotient is nearer
    to one than 2^-24 / B from 1 to 2 (2^-25 / B below 1), since their numerators differ by 1 at least. So
    |d| B (1 + 2^-21) < 1 suffices. One divisor misses it, the last before 2: its reciprocal is not improved if it
    starts from 0.5. As above, no GPU does. All quotients by it are tried from the other."""
    wrong, count = named()
    divisors, opened = named()
    (tried,) = counts()
    module.launch("reciprocals", 1, THREADS, [wrong, count, tried, divisors, opened])
    assert tried.sum() >= 2 * 2**23
    assert wrong[: int(count)].tolist() == [0x3FFFFFFF]
    assert set(divisors[: int(opened)].tolist()) == {0x3FFFFFFF}
    (wrong,) = counts()
    module.launch("quotients", 1, THREADS, [0x3FFFFFFF, wrong])
    assert wrong.sum() == 0


OWN = """
extern "C" __global__ void root(float* x) { x[0] = sqrtf(x[1]); }
extern "C" __global__ void quotient(float* x) { x[0] = x[1] / x[2]; }
extern "C" __global__ void reciprocal(float* x) { x[0] = 1.0f / x[1]; }
"""


@pytest.mark.parametrize(
    "architecture", ["sm_90", *(pytest.param(f"sm_{n}", marks=pytest.mark.slow) for n in (75, 80, 89, 100, 120))]
)
def test_cudas_own(architecture: str) -> None:
    """The compiler's roots, quotients and reciprocals, whose results NVIDIA promises to be the nearest, are made of the
    same instructions; quotients and reciprocals are here corrected once more."""
    code = sass.disassemble(compile.cubin(OWN, architecture).code)
    arithmetic = {}
    for name, blocks in code.items():
        found = [i for block in blocks for i in block.instructions if i.kind in ("float", "special")]
        arithmetic[name] = [i.opcode.removesuffix(".FTZ") for i in found]
    assert arithmetic["root"][:5] == ["MUFU.RSQ", "FMUL", "FMUL", "FFMA", "FFMA"]
    for name in ("quotient", "reciprocal"):
        begins = [opcode for opcode in arithmetic[name] if opcode not in ("FCHK", "FADD")][:3]
        assert begins == ["MUFU.RCP", "FFMA", "FFMA"]


def test_numbers_of_all_sizes(module: Module) -> None:
    """Also subnormal, infinite and NaN, with what the range allows, and does not."""
    count = 1 << 18
    random = torch.Generator().manual_seed(0)

    def numbers(low: float, high: float) -> torch.Tensor:
        exponents = torch.rand(count, generator=random) * (high - low) + low
        return (torch.rand(count, generator=random) + 1) * torch.exp2(exponents.floor())

    def checked(a: torch.Tensor, x: torch.Tensor, c: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        sure, wrong = torch.zeros(2, count, dtype=torch.int32)
        module.launch("over", 1, THREADS, [a, x, c, eps, count, sure, wrong])
        assert not wrong.any()
        return sure.float().mean()

    sign = torch.randint(0, 2, (count,), generator=random) * 2.0 - 1
    assert checked(sign * numbers(-60, -40), numbers(-100, -60), numbers(0, 5), numbers(-27, -20)) > 0.9
    special = torch.tensor([0.0, -0.0, float("inf"), float("nan"), -1.0, 1e-45, 3e38, 1.0])
    everything = torch.randint(-(2**31), 2**31 - 1, (4, count), generator=random, dtype=torch.int32).view(torch.float32)
    for row in everything:
        row[torch.randperm(count, generator=random)[: count // 4]] = special.repeat(count // 32)
    assert checked(*everything) < 0.1
    assert checked(sign * numbers(-140, 40), numbers(-110, 70), numbers(-10, 25), numbers(-45, 25)) > 0.05


@pytest.mark.parametrize("stride", [997, pytest.param(1, marks=pytest.mark.slow)])
def test_codes(module: Module, stride: int) -> None:
    """Of every ``stride``-th number from 0 to 1, and of all that are near a number where the code changes."""
    top = 0x3F800000
    (wrong,) = counts()
    for name in formats.MAPS:
        values = formats.codebook(name)
        steps = torch.cat([(values[1:] + values[:-1]) / 2, torch.from_numpy(formats.dynamic_map(name).thresholds)])
        for bits in steps[steps > 0].view(torch.int32).tolist():
            module.launch("codes", 1, THREADS, [bits - 64, 128, 1, wrong])
    for first in range(0, top, 1 << 28):
        module.launch("codes", 1, THREADS, [first, -(-min(1 << 28, top + 1 - first) // stride), stride, wrong])
    assert wrong.sum() == 0


# ---------------------------------------------------------------------------------------------------------------------
# The step's kernel

CAREFUL = "careful_turn(walk, turn, f, told.seed, place);"


def weights(rows: int = 8) -> torch.Tensor:
    return torch.randn(rows, 512, generator=torch.Generator().manual_seed(1))


def stepped(backend: Any, change: Callable[[torch.Tensor], object], steps: int = 3) -> list[torch.Tensor]:
    """A parameter and its AdamW states after a few steps; ``change`` may make gradients special."""
    parameter = torch.nn.Parameter(weights())
    optimizer = optim.AdamW([parameter], lr=1e-3)
    with backend:
        for step in range(steps):
            parameter.grad = 1e-3 * torch.randn(8, 512, generator=torch.Generator().manual_seed(step + 2))
            change(parameter.grad)
            optimizer.step()
    return [parameter.detach(), *optimizer.state[parameter].values()]


def special(grad: torch.Tensor) -> None:
    """Blocks of zeros, of one value, with extremes of both signs that are equal or nearly, of subnormal scales, of huge
    numbers, with one zero, one infinity; the last is usual."""
    grad[0, :256] = 0.0
    grad[0, 256:] = 0.25
    grad[1, 3], grad[1, 70] = 0.5, -0.5
    grad[1, 300], grad[1, 301] = -0.5, 0.499
    grad[2, 3], grad[2, 70] = -0.5, -0.5
    grad[3] *= 1e-37
    grad[4] *= 1e22
    grad[5, 100], grad[5, 300] = 0.0, -0.0
    grad[6, 9], grad[6, 500] = float("inf"), float("nan")


@pytest.mark.parametrize("change", [special, lambda grad: None], ids=["special", "usual"])
def test_the_step_equals_the_reference(change: Callable[[torch.Tensor], None]) -> None:
    ours, theirs = stepped(emulated(), change), stepped(kernels.use_backend("reference"), change)
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def test_usual_numbers_take_the_quick_way_and_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    text = StepVariant.text
    monkeypatch.setattr(StepVariant, "text", lambda self, source: text(self, source).replace(CAREFUL, "__trap();"))
    # Not the first step, whose states are zero only before it: what counts are the new ones.
    stepped(emulated(), lambda grad: None)
    for row, column, value in ((0, 0, 0.0), (3, 511, 1e30), (7, 300, float("nan"))):
        with pytest.raises(EmulatorError, match="trap"):
            stepped(emulated(), lambda grad: grad[row].__setitem__(column, value), steps=1)  # noqa: B023
