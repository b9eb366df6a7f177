"""The fused step on every backend of this machine: bit for bit against the reference, and the reference against
float64."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.instruction_sets import require
from support.step_case import StepCase
from torch import Tensor

from lowbit_lightning import kernels
from lowbit_lightning.kernels import rules
from lowbit_lightning.kernels.compile import host_library
from lowbit_lightning.kernels.cpu import blockwise, step
from lowbit_lightning.kernels.formats import MAPS, BlockGrid, dynamic_map
from lowbit_lightning.kernels.reference import blockwise as reference
from lowbit_lightning.kernels.reference.step import join_master, split_master
from lowbit_lightning.kernels.reference.words import random_words
from lowbit_lightning.kernels.rules.rule import fused

HYPER = {
    "lr": 1e-2,
    "beta1": 0.9,
    "beta2": 0.99,
    "eps": 1e-8,
    "weight_decay": 1e-2,
    "momentum": 0.9,
    "dampening": 0.1,
    "alpha": 0.95,
    "variance_floor": 1 / 64,
    "lr_decay": 0.1,
    "trust_coefficient": 1e-2,
    "beta3": 0.999,
    "log_beta1": math.log(0.9),
    "log_beta3": math.log(0.999),
    "t_alpha": 10.0,
    "t_beta3": 10.0,
}
SHAPES = ((7, 700), (300,), (3, 5, 77), (16, 256), (9, 33), (1,))


def fresh(
    rule: str, shapes: tuple[tuple[int, ...], ...], bits: list[int], dtype: torch.dtype, block_size: int, **options: Any
) -> StepCase:
    """Arguments for new parameters; ``bits`` by state."""
    states, scales = [], []
    for state, state_bits in zip(rules.get(rule).states, bits, strict=False):
        zero = dynamic_map(state.codebook).zero_code
        if state_bits == 8:
            states.append([torch.full(s, zero, dtype=torch.uint8) for s in shapes])
            scales.append([torch.zeros(BlockGrid.of(s, block_size).scales_shape) for s in shapes])
        else:
            states.append([torch.zeros(s) for s in shapes])
            scales.append([torch.zeros(0) for _ in shapes])
    return StepCase(
        rule,
        params=[torch.randn(s).to(dtype) for s in shapes],
        grads=[torch.zeros(s) for s in shapes],
        steps=[torch.zeros(()) for _ in shapes],
        states=states,
        scales=scales,
        hyper=[HYPER[name] for name in rules.get(rule).hyper],
        block_size=block_size,
        **options,
    )


def run(arguments: StepCase, backend: str, steps: int, grad_dtype: torch.dtype, seed: int) -> list[Tensor]:
    """All that the steps wrote, from deep copies of the arguments."""

    def copies(tensors: list[Tensor]) -> list[Tensor]:
        return [t.clone() for t in tensors]

    a = replace(
        arguments,
        params=copies(arguments.params),
        steps=copies(arguments.steps),
        states=[copies(s) for s in arguments.states],
        scales=[copies(s) for s in arguments.scales],
        remainders=copies(arguments.remainders),
    )
    generator = torch.Generator().manual_seed(seed)
    norms = None
    with kernels.use_backend(backend):
        for number in range(steps):
            spread = [torch.exp(2 * torch.randn(p.shape, generator=generator)) for p in a.params]
            a.grads = [(torch.randn(s.shape, generator=generator) * s).to(grad_dtype) for s in spread]
            if number == 1:
                a.grads[0].view(-1)[3] = float("nan")
                a.grads[0].view(-1)[-1] = float("inf")
            norms = a.norms() if rules.get(a.rule).norms else None
            a.step(norms)
    states, scales = [t for s in a.states for t in s], [t for s in a.scales for t in s]
    return [*a.params, *a.steps, *states, *scales, *([] if norms is None else [norms]), *a.remainders]


def assert_same_bits(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for i, (x, y) in enumerate(zip(ours, theirs, strict=True)):
        assert x.dtype == y.dtype
        same = (x == y) | (x.isnan() & y.isnan() if x.is_floating_point() else torch.zeros_like(x == y))
        bad = (~same).nonzero()
        assert not len(bad), f"tensor {i}: first difference at {bad[0].tolist()}: {x[~same][0]} against {y[~same][0]}"


DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float32, torch.bfloat16),
]


@pytest.mark.parametrize("rule", rules.RULES)
@pytest.mark.parametrize("bits", [8, 32])
def test_cpu_equals_reference_to_the_bit(rule: str, bits: int) -> None:
    arguments = fresh(rule, SHAPES, [bits] * 3, torch.float32, 256)
    expected = run(arguments, "reference", 3, torch.float32, seed=1)
    assert_same_bits(run(arguments, "cpu", 3, torch.float32, seed=1), expected)


BUILDS = {
    "AVX-512 without VBMI": (("-mno-avx512vbmi",), {"avx512f", "avx512bw", "avx512dq", "avx512vl"}),
    "AVX-512 without BW, DQ": (("-mno-avx512bw", "-mno-avx512dq"), {"avx512f"}),
    "AVX2": (("-march=x86-64-v3",), {"avx2", "fma", "f16c"}),
    "SSE2": (("-march=x86-64",), {"sse2"}),
}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("rule", ["adamw", "lamb"])
def test_many_chunks_of_work_and_several_threads(rule: str, threads: int) -> None:
    shapes = ((700, 1000), (0, 5), (131072,), (3, 5), (0,), (300, 257))
    arguments = fresh(rule, shapes, [8, 8], torch.float32, 256)
    expected = run(arguments, "reference", 2, torch.float32, seed=1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_same_bits(run(arguments, "cpu", 2, torch.float32, seed=1), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", BUILDS)
def test_other_instruction_sets_give_the_same_numbers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flags, needed = BUILDS[name]
    require(name, needed)
    for module in (step, blockwise):
        monkeypatch.setattr(module, "host_library", partial(host_library, flags=(*flags, "-O1")))
        monkeypatch.setattr(module, "library", module.library.__wrapped__)
    for rule, dtype in (("adamw", torch.float32), ("rmsprop_centered_momentum", torch.bfloat16)):
        arguments = fresh(rule, SHAPES, [8] * 3, dtype, 256)
        expected = run(arguments, "reference", 3, dtype, seed=1)
        assert_same_bits(run(arguments, "cpu", 3, dtype, seed=1), expected)
    for codebook in MAPS:
        x = torch.randn(5, 700).exp() * torch.randn(5, 700).sign()
        codes, scales = reference.quantize_blockwise(x, codebook, None, 256)
        assert_same_bits([*blockwise.quantize_blockwise(x, codebook, None, 256)], [codes, scales])
        of = codes, scales, codebook, None, 256, torch.float16
        values = [module.dequantize_blockwise(*of) for module in (blockwise, reference)]
        assert_same_bits(values[:1], values[1:])


@pytest.mark.parametrize(("dtype", "grad_dtype"), DTYPES)
@pytest.mark.parametrize("block_size", [32, 256, 4096])
def test_dtypes_and_block_sizes(dtype: torch.dtype, grad_dtype: torch.dtype, block_size: int) -> None:
    arguments = fresh("adamw", SHAPES, [8, 8], dtype, block_size)
    expected = run(arguments, "reference", 3, grad_dtype, seed=2)
    assert_same_bits(run(arguments, "cpu", 3, grad_dtype, seed=2), expected)


@pytest.mark.parametrize("bits", [[8, 32], [32, 8]])
def test_each_state_has_its_own_bits(bits: list[int]) -> None:
    arguments = fresh("adamw", SHAPES, bits, torch.float32, 256)
    expected = run(arguments, "reference", 3, torch.float32, seed=3)
    assert_same_bits(run(arguments, "cpu", 3, torch.float32, seed=3), expected)


def test_factors_maximize_and_lr_on_the_device() -> None:
    scalars = {name: torch.tensor(value) for name, value in (("lr", 0.013), ("unscale", 0.37), ("clip", 0.9))}
    arguments = fresh("lamb", SHAPES, [8, 8], torch.float32, 256, maximize=True, **scalars)
    expected = run(arguments, "reference", 3, torch.float32, seed=4)
    assert_same_bits(run(arguments, "cpu", 3, torch.float32, seed=4), expected)
    plain = fresh("lamb", SHAPES, [8, 8], torch.float32, 256)
    plain.params = arguments.params
    assert not torch.equal(run(plain, "cpu", 3, torch.float32, seed=4)[0], expected[0])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_skip_changes_nothing(backend: str) -> None:
    arguments = fresh("adamw", SHAPES, [8, 8], torch.float32, 256, skip=torch.ones(()))
    before = [*arguments.params, *arguments.steps, *arguments.states[0], *arguments.scales[1]]
    after = run(arguments, backend, 2, torch.float32, seed=5)
    n = len(SHAPES)
    assert_same_bits(after[: 3 * n], before[: 3 * n])
    arguments.skip = torch.zeros(())
    assert run(arguments, backend, 2, torch.float32, seed=5)[n].item() == 2


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_non_finite_gradient_hurts_nobody_else(backend: str) -> None:
    results = []
    for poison in (False, True):
        a = fresh("adamw", ((2, 512),), [8, 8], torch.float32, 256)
        a.params = [torch.ones(2, 512)]
        with kernels.use_backend(backend):
            for _ in range(3):
                a.grads = [torch.linspace(-1, 1, 1024).view(2, 512).clone()]
                if poison:
                    a.grads[0][1, 7] = float("nan")
                else:
                    a.grads[0][1, 7] = 0.0
                a.step()
        results.append(a)
    clean, poisoned = results
    assert poisoned.params[0][1, 7].isnan()
    assert poisoned.states[0][0][1, 7] == 127
    assert poisoned.states[1][0][1, 7] == 0
    for s in range(2):
        assert torch.equal(clean.states[s][0], poisoned.states[s][0])
        assert torch.equal(clean.scales[s][0], poisoned.scales[s][0])
    others = torch.ones(2, 512, dtype=torch.bool)
    others[1, 7] = False
    assert torch.equal(clean.params[0][others], poisoned.params[0][others])


def test_norms_are_sums_of_squares() -> None:
    arguments = fresh("lamb", SHAPES, [8, 8], torch.float32, 256)
    arguments.grads = [torch.randn(s) for s in SHAPES]
    for backend in ("reference", "cpu"):
        with kernels.use_backend(backend):
            norms = arguments.norms()
        expected = torch.stack([p.double().square().sum() for p in arguments.params])
        torch.testing.assert_close(norms[:, 0], expected, rtol=1e-6, atol=0)


def test_fused_rounds_once() -> None:
    """Against rational arithmetic, near cancellation too: the error of the nearest float32 is half a place at most."""
    a, b, c = (torch.randn(600) * torch.exp(6 * torch.randn(600)) for _ in range(3))
    c[:300] = -(a * b)[:300]
    result = fused(a, b, c)
    above, below = (torch.nextafter(result, torch.tensor(limit)) for limit in (torch.inf, -torch.inf))
    columns = (x.tolist() for x in (a, b, c, result, below, above))
    for x, y, z, got, lower, upper in zip(*columns, strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        assert abs(exact - Fraction(got)) <= min(abs(exact - Fraction(lower)), abs(exact - Fraction(upper)))


# -- random words ----------------------------------------------------------------------------------------------------


def philox_scalar(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python integers, as the paper has it."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def test_philox_known_answers() -> None:
    """The published test vectors of Random123."""
    assert philox_scalar([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 0xFFFFFFFF
    assert philox_scalar([ones] * 4, [ones] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**24), st.integers(0, 2**40))
def test_random_words_are_philox(seed: int, ordinal: int, step: int, offset: int) -> None:
    words = random_words(seed, ordinal, step, offset, 11, torch.device("cpu"))
    for i, word in enumerate(words.tolist()):
        group, index = divmod(offset + i, 8)
        block = philox_scalar([group % 2**32, group >> 32, step, ordinal], [seed % 2**32, seed >> 32])
        assert word == block[index // 2] >> 16 * (index % 2) & 0xFFFF


@pytest.mark.parametrize("offset", [0, 5, 2**33 + 3])
def test_stochastic_rounding_is_equal_on_backends(offset: int) -> None:
    options = {
        "stochastic_rounding": True,
        "seed": 2**63 - 5,
        "offsets": [offset + 1000 * i for i in range(len(SHAPES))],
    }
    arguments = fresh("adamw", SHAPES, [8, 8], torch.bfloat16, 256, **options)
    expected = run(arguments, "reference", 3, torch.bfloat16, seed=6)
    assert_same_bits(run(arguments, "cpu", 3, torch.bfloat16, seed=6), expected)


# -- the 24-bit master copy --------------------------------------------------------------------------------------------


def master_of(p: Tensor, remainder: Tensor) -> Tensor:
    """In float64, from the definition: the remainder counts 256ths of the bfloat16's last place."""
    mantissa, exponent = torch.frexp(p.double())
    unit = torch.ldexp(torch.ones_like(mantissa), exponent.clamp(min=-125) - 8)
    unit = torch.where((mantissa.abs() == 0.5) & (remainder < 0), unit / 2, unit)  # below a power of two
    return p.double() + torch.where(p < 0, -1, 1) * remainder.double() / 256 * unit


def test_master_copy_keeps_24_bits() -> None:
    x = torch.randn(3, 700) * torch.exp(8 * torch.randn(3, 700))
    p, remainder = torch.empty(3, 700, dtype=torch.bfloat16), torch.empty(3, 700, dtype=torch.int8)
    split_master(x, p, remainder)
    assert ((p.float() - x).abs() <= x.abs() * 2**-8).all()
    torch.testing.assert_close(master_of(p, remainder), x.double(), rtol=2**-16, atol=0)
    assert torch.equal(join_master(p, remainder).double(), master_of(p, remainder))
    again = torch.empty_like(p), torch.empty_like(remainder)
    split_master(join_master(p, remainder), *again)
    assert torch.equal(again[0], p)
    assert torch.equal(again[1], remainder)


@pytest.mark.parametrize("rule", ["adamw", "lamb"])
def test_master_copy_is_equal_on_backends(rule: str) -> None:
    arguments = fresh(rule, SHAPES, [8, 8], torch.bfloat16, 256)
    arguments.remainders = [torch.randint(-128, 128, s, dtype=torch.int8) for s in SHAPES]
    expected = run(arguments, "reference", 3, torch.bfloat16, seed=9)
    assert_same_bits(run(arguments, "cpu", 3, torch.bfloat16, seed=9), expected)


# -- bad arguments ---------------------------------------------------------------------------------------------------


def test_bad_arguments_are_named_before_anything_changes() -> None:
    good = fresh("adamw", ((3, 70),), [8, 8], torch.float32, 256)

    def bad(**changes: Any) -> StepCase:
        return replace(good, **changes)

    def two(**changes: Any) -> StepCase:
        return replace(fresh("adamw", ((3, 70), (3, 70)), [8, 8], torch.float32, 256), **changes)

    sparse = torch.zeros(3, 70).to_sparse()
    cases: list[tuple[StepCase, type[Exception], str]] = [
        (bad(rule="adamx"), ValueError, "rule must be one of .* got 'adamx'"),
        (bad(block_size=7), ValueError, "block_size .* got 7"),
        (bad(hyper=[1.0]), ValueError, "hyper must hold"),
        (bad(grads=[]), ValueError, "grads must have one entry"),
        (bad(grads=[torch.zeros(70, 3)]), ValueError, r"grads\[0\] must have the parameter's shape \(3, 70\)"),
        (bad(grads=[sparse]), ValueError, "sparse gradients are not supported"),
        (bad(params=[torch.zeros(3, 70, dtype=torch.float64)]), TypeError, "got torch.float64"),
        (bad(states=good.states[:1]), ValueError, "states and scales must hold"),
        (bad(scales=[[torch.zeros(3, 2)], good.scales[1]]), ValueError, r"scales of exp_avg\[0\] must be float32 of"),
        (bad(states=[[torch.zeros(3, 70).half()], good.states[1]]), TypeError, "must be uint8 codes or float32"),
        (bad(lr=torch.zeros(2)), ValueError, "lr must be one float32 value"),
        (
            bad(params=[torch.zeros(3, 70).half()], stochastic_rounding=True),
            TypeError,
            "stochastic_rounding serves bfloat16",
        ),
        (bad(params=[]), ValueError, "params must hold one parameter or more"),
        (two(params=[good.params[0], good.params[0].half()]), TypeError, "params must have one dtype"),
        (two(grads=[good.grads[0], good.grads[0].half()]), TypeError, "grads must have one dtype"),
        (two(states=[[good.states[0][0], torch.zeros(3, 70)], two().states[1]]), TypeError, "exp_avg must be codes of"),
        (
            bad(grads=[torch.zeros(3, 70, dtype=torch.float64)]),
            TypeError,
            "grads must be float32, .* got torch.float64",
        ),
        (bad(rule="lamb"), ValueError, r"norms must be float64 of shape \(1, 2\)"),
        (bad(states=[[torch.zeros(70, 3, dtype=torch.uint8).t()], good.states[1]]), ValueError, "must be contiguous"),
        (bad(grads=[torch.zeros(3, 70, device="meta")]), ValueError, "is on meta"),
        (
            bad(remainders=[torch.zeros(3, 70, dtype=torch.int8)]),
            TypeError,
            r"remainders\[0\] must be int8 of a bfloat16",
        ),
    ]
    before = good.params[0].clone()
    for arguments, error, message in cases:
        with pytest.raises(error, match=message):
            arguments.step()
    assert torch.equal(good.params[0], before)
    assert good.steps[0] == 0
