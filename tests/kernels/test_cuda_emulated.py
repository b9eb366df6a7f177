"""The CUDA kernels and their launches, executed by the emulator: bit for bit against the reference.

What runs is the backend's own code: geometry, argument blocks, specialisation. Every kernel runs in three orders of its
threads, and in the mode that finds races and accesses out of bounds.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from emulator.backend import emulated
from support.step_case import StepCase
from torch import Tensor

from lowbit_lightning import kernels
from lowbit_lightning.kernels import formats, rules
from lowbit_lightning.kernels.cuda import launch, table
from lowbit_lightning.kernels.formats import BlockGrid
from lowbit_lightning.kernels.reference import blockwise
from lowbit_lightning.kernels.reference import step as reference
from lowbit_lightning.kernels.sources import StepVariant

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
MODES: list[dict[str, Any]] = [
    {},
    {"order": "backward"},
    {"order": "random", "seed": 1},
    {"check": True},
]


def assert_same_bits(ours: list[Tensor], theirs: list[Tensor], where: object = "") -> None:
    for i, (x, y) in enumerate(zip(ours, theirs, strict=True)):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        same = (x == y) | (x.isnan() & y.isnan() if x.is_floating_point() else torch.zeros_like(x == y))
        bad = (~same).nonzero()
        assert not len(bad), (
            f"{where} tensor {i}: first difference at {bad[0].tolist()}: {x[~same][0]} against {y[~same][0]}"
        )


def shifted(x: Tensor) -> Tensor:
    """The same values, contiguous, at an address that no wide access may use."""
    room = torch.empty(x.numel() + 1, dtype=x.dtype)
    room[1:] = x.reshape(-1)
    return room[1:].view(x.shape)


# ---------------------------------------------------------------------------------------------------------------------
# Block-wise quantisation


def awkward(*shape: int) -> Tensor:
    """Values of many magnitudes, with what is special: zeros of both signs, subnormals, infinities, NaN, a tie."""
    x = torch.randn(shape) * torch.exp(4 * torch.randn(shape))
    special = [0.0, -0.0, 1e-42, -1e-40, float("inf"), float("-inf"), float("nan"), -1e30, 1e30, 0.5, -0.5, 3e38]
    flat = x.view(-1)
    if x.numel() >= 300:
        flat[torch.randperm(x.numel())[: len(special)]] = torch.tensor(special)
    return x


SHAPES = [(), (0, 3), (2, 0), (5,), (1000,), (3, 256), (2, 5, 77), (1, 4096), (2, 4200)]
RANDOM_BOOK = torch.tensor([-0.75, -0.3, -0.01, 0.0, 0.002, 0.4, 0.41, 1.0])


@pytest.mark.parametrize(
    ("codebook", "dtype", "block_size", "modes"),
    [
        ("dynamic_signed", F32, 256, MODES),
        ("dynamic_unsigned", F32, 32, MODES),
        ("dynamic_signed", BF16, 4096, MODES),
        ("dynamic_unsigned", F16, 512, MODES[:3]),
        ("linear", F32, 64, MODES),
        ("linear_unsigned", BF16, 256, MODES[:3]),
        ("nf4", F16, 1024, MODES[:3]),
        (RANDOM_BOOK, F32, 128, MODES[:3]),
    ],
    ids=lambda value: str(value)[:20],
)
def test_blockwise(codebook: str | Tensor, dtype: torch.dtype, block_size: int, modes: list[dict[str, Any]]) -> None:
    inputs = [awkward(*shape).to(dtype) for shape in SHAPES]
    inputs += [torch.zeros(2, 300).to(dtype), shifted(inputs[4]), shifted(inputs[5])]
    for mode in modes:
        for x in inputs if "check" not in mode else inputs[-3:] + inputs[6:7]:
            with kernels.use_backend("reference"):
                codes, scales = kernels.quantize_blockwise(x, codebook, block_size)
                decoded = kernels.dequantize_blockwise(codes, scales, codebook, block_size, dtype)
            with emulated(**mode):
                ours = [*kernels.quantize_blockwise(x, codebook, block_size)]
                ours += [kernels.dequantize_blockwise(codes, scales, codebook, block_size, dtype)]
            assert_same_bits(ours, [codes, scales, decoded], (mode, x.shape))


@pytest.mark.parametrize(("dtype", "block_size"), [(F32, 256), (F32, 32), (BF16, 4096)])
def test_blocks_of_which_some_are_special(dtype: torch.dtype, block_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The quick way and the careful one, in several turns, the last of them not full."""
    monkeypatch.setattr(launch, "_FILL", 1)
    x = torch.randn(37, 2, block_size, generator=torch.Generator().manual_seed(0))
    x[1, 0, 5], x[2, 0, 5], x[3, 1, 9] = float("nan"), float("inf"), 3e38
    x[4], x[5, 0], x[6] = 0.0, 0.25, x[6] * 1e-38
    x[7, 0, :2], x[8, 0, :2] = torch.tensor([9.0, -9.0]), torch.tensor([-9.0, 8.99])
    x = x.to(dtype).view(37, 2 * block_size)
    with kernels.use_backend("reference"):
        codes, scales = kernels.quantize_blockwise(x, block_size=block_size)
        decoded = kernels.dequantize_blockwise(codes, scales, block_size=block_size, dtype=dtype)
    for mode in MODES[:2]:
        with emulated(**mode) as launches:
            ours = [*kernels.quantize_blockwise(x, block_size=block_size)]
            ours += [kernels.dequantize_blockwise(codes, scales, block_size=block_size, dtype=dtype)]
        turns = [next(a.value for a in reversed(one.arguments) if isinstance(a, ctypes.c_int)) for one in launches]
        assert turns == [min(8, 74 // max(1, 2048 // block_size))] * 2
        assert_same_bits(ours, [codes, scales, decoded], mode)


@pytest.mark.parametrize("codebook", formats.MAPS)
def test_all_codes_decode_and_encode_to_themselves(codebook: str) -> None:
    codes = torch.arange(256).to(torch.uint8).view(1, 256)
    values = formats.codebook(codebook).view(1, 256)
    with emulated():
        decoded = kernels.dequantize_blockwise(codes, torch.ones(1, 1), codebook)
        again, scales = kernels.quantize_blockwise(values, codebook)
    assert_same_bits([decoded, again, scales], [values, codes, torch.ones(1, 1)])


@pytest.mark.parametrize("codebook", formats.MAPS)
def test_every_binade_and_both_sides_of_every_threshold(codebook: str) -> None:
    """The tables on the GPU are indexed by exponents; the reference searches. A block's scale is its 1.0."""
    bounds = torch.from_numpy(formats.dynamic_map(codebook).thresholds)
    powers = torch.tensor([2.0**-e for e in range(40)])
    values = torch.cat([bounds, powers])
    values = torch.cat([values, torch.nextafter(values, torch.tensor(2.0)), torch.nextafter(values, torch.tensor(0.0))])
    x = torch.cat([values, -values, torch.ones(1)])
    blocks = torch.cat([x.view(1, -1), -x.view(1, -1)]).clamp(-1, 1)
    with kernels.use_backend("reference"):
        expected = kernels.quantize_blockwise(blocks, codebook, 512)
    with emulated():
        ours = kernels.quantize_blockwise(blocks, codebook, 512)
    assert_same_bits(list(ours), list(expected))


# ---------------------------------------------------------------------------------------------------------------------
# The optimizer step

HYPER = {"lr": 0.02, "eps": 1e-6, "weight_decay": 0.05, "momentum": 0.9, "alpha": 0.95, "beta1": 0.9, "beta2": 0.99}
HYPER |= {"dampening": 0.1, "lr_decay": 0.1, "variance_floor": 1 / 64, "trust_coefficient": 0.01}
HYPER |= {"log_beta1": -0.1, "log_beta3": -0.001, "t_alpha": 5.0, "t_beta3": 5.0, "beta3": 0.999}
PARAMETERS = ((3, 700), (300,), (3, 5, 77), (2, 512), (5, 33), (1,))


def arguments_of(
    rule: str, dtype: torch.dtype, grad_dtype: torch.dtype, coded: int, block_size: int, **options: Any
) -> StepCase:
    """Arguments in mid-training: bit s of ``coded`` says that state s is 8-bit codes."""
    states: list[list[Tensor]] = []
    scales: list[list[Tensor]] = []
    for s, state in enumerate(rules.get(rule).states):
        values = [torch.randn(p).abs() if state.non_negative else torch.randn(p) for p in PARAMETERS]
        pairs = [blockwise.quantize_blockwise(v, state.codebook, None, block_size) for v in values]
        states.append([q for q, _ in pairs] if coded >> s & 1 else values)
        scales.append([c for _, c in pairs])
    grads = [torch.randn(p) * torch.exp(2 * torch.randn(p)) for p in PARAMETERS]
    grads[0].view(-1)[3], grads[1].view(-1)[-1], grads[4].view(-1)[0] = float("nan"), float("inf"), float("-inf")
    return StepCase(
        rule,
        params=[torch.randn(p).to(dtype) for p in PARAMETERS],
        grads=[g.to(grad_dtype) for g in grads],
        steps=[torch.tensor(float(i)) for i in range(len(PARAMETERS))],
        states=states,
        scales=scales,
        hyper=[HYPER[name] for name in rules.get(rule).hyper],
        block_size=block_size,
        seed=0x123456789ABCDEF,
        **options,
    )


def copy_of(a: StepCase, place: Callable[[Tensor], Tensor] = Tensor.clone) -> StepCase:
    def places(tensors: list[Tensor]) -> list[Tensor]:
        return [place(t) for t in tensors]

    a = replace(a, params=places(a.params), grads=places(a.grads), steps=places(a.steps))
    a = replace(a, remainders=places(a.remainders))
    return replace(a, states=[places(s) for s in a.states], scales=[places(s) for s in a.scales])


def step(a: StepCase) -> list[Tensor]:
    """All that one step writes, and the norms that it used."""
    norms = a.norms() if rules.get(a.rule).norms else None
    a.step(norms)
    written = [*a.params, *a.remainders, *a.steps, *(t for s in (*a.states, *a.scales) for t in s)]
    return written if norms is None else [*written, norms]


def assert_step_equals_reference(
    a: StepCase, modes: list[dict[str, Any]], place: Callable[[Tensor], Tensor] = Tensor.clone
) -> None:
    with kernels.use_backend("reference"):
        expected = step(copy_of(a))
    for mode in modes:
        with emulated(**mode):
            assert_same_bits(step(copy_of(a, place)), expected, mode)


@pytest.mark.parametrize("rule", rules.RULES)
def test_every_rule(rule: str) -> None:
    assert_step_equals_reference(arguments_of(rule, F32, F32, 0b111, 256), MODES[:3])


@pytest.mark.parametrize(
    ("rule", "dtype", "grad_dtype", "coded", "block_size", "modes"),
    [
        ("adamw", F32, F32, 0b11, 256, MODES),
        ("adamw", BF16, BF16, 0b11, 32, MODES),
        ("adamw", F16, F32, 0b11, 4096, MODES),
        ("adamw", BF16, F32, 0b01, 512, MODES[:3]),
        ("adamw", F32, BF16, 0b10, 64, MODES[:3]),
        ("adamw", F32, F32, 0b00, 256, MODES[2:]),
        ("sgd_momentum", F32, F16, 0b1, 128, MODES[2:]),
        ("sgd", BF16, BF16, 0, 2048, MODES[:3]),
        ("lamb", F32, F32, 0b11, 32, MODES[:3]),
        ("lamb", BF16, BF16, 0b11, 4096, MODES),
        ("lars", F16, F16, 0b0, 256, MODES[2:3]),
    ],
    ids=lambda value: str(value).removeprefix("torch.") if not isinstance(value, list) else "",
)
def test_types_block_sizes_and_which_states_are_coded(
    rule: str,
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    coded: int,
    block_size: int,
    modes: list[dict[str, Any]],
) -> None:
    assert_step_equals_reference(arguments_of(rule, dtype, grad_dtype, coded, block_size), modes)


def test_addresses_that_are_not_aligned() -> None:
    a = arguments_of("adamw", BF16, F32, 0b01, 512)
    assert_step_equals_reference(a, [MODES[3]], place=shifted)
    kinds = {t.data_ptr(): kind for kind, t in enumerate((a.params[3], a.grads[3], a.states[0][3], a.states[1][3]))}
    for odd in range(len(kinds)):  # one alone decides, for a parameter whose blocks are all full

        def place(t: Tensor, odd: int = odd) -> Tensor:
            return shifted(t) if kinds.get(t.data_ptr()) == odd else t.clone()

        assert_step_equals_reference(a, MODES[:1], place)


@pytest.mark.parametrize("grad_dtype", [BF16, F32])
def test_stochastic_rounding(grad_dtype: torch.dtype) -> None:
    offsets = [0, 3, 8, 2**33 + 5, 2**40, 7]  # of shards, also inside a group of eight random words
    options = {"stochastic_rounding": True, "offsets": offsets, "ordinals": [5, 4, 3, 2, 1, 2**31]}
    a = arguments_of("adamw", BF16, grad_dtype, 0b11, 256, **options)
    modes = [MODES[1], MODES[3]] if grad_dtype == BF16 else MODES[:1]
    assert_step_equals_reference(a, modes)
    assert_step_equals_reference(a, modes[:1], place=shifted)


@pytest.mark.parametrize("rule", ["adamw", "lamb"])
def test_remainders_of_bfloat16_parameters(rule: str) -> None:
    a = arguments_of(rule, BF16, F32, 0b11, 256)
    a.remainders = [torch.randint(-128, 128, p.shape, dtype=torch.int8) for p in a.params]
    modes = MODES[2:] if rule == "adamw" else MODES[:1]
    assert_step_equals_reference(a, modes)
    assert_step_equals_reference(a, modes[:1], place=shifted)


def test_learning_rate_unscale_clip_and_maximize_on_the_device() -> None:
    scalars = {"lr": torch.tensor(0.3), "unscale": torch.tensor(1 / 1024), "clip": torch.tensor(0.37)}
    a = arguments_of("sgd_momentum", F32, F16, 0b1, 128, maximize=True, skip=torch.zeros(()), **scalars)
    assert_step_equals_reference(a, [MODES[2], MODES[3]])
    assert_step_equals_reference(replace(a, clip=None, maximize=False), MODES[:1])


def test_skip_changes_nothing() -> None:
    a = arguments_of("adamw", F32, F32, 0b11, 256, skip=torch.ones(()))
    with emulated(check=True):
        assert_same_bits(step(copy_of(a)), [*a.params, *a.steps, *(t for s in (*a.states, *a.scales) for t in s)])


def test_several_turns_per_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_FILL", 1)
    a = arguments_of("lamb", F32, F32, 0b11, 32)
    assert_step_equals_reference(a, MODES[:2])
    assert_step_equals_reference(arguments_of("lamb", BF16, BF16, 0b11, 4096), MODES[3:])
    with emulated() as launches:
        step(copy_of(a))
    turns = {one.kernel: one.arguments[3].value for one in launches if one.kernel in ("step", "norm_blocks")}
    assert turns == {"step": 2, "norm_blocks": 2}


def test_a_parameter_without_elements_counts_its_step_and_has_norm_zero() -> None:
    a = arguments_of("lamb", F32, F32, 0b11, 256)
    empty, place = torch.zeros(0, 5), len(a.params) - 1
    a.params[place], a.grads[place] = empty, empty.clone()
    for states, scales in zip(a.states, a.scales, strict=True):
        states[place], scales[place] = torch.zeros(0, 5, dtype=torch.uint8), torch.zeros(0, 1)
    assert_step_equals_reference(a, MODES[:1])
    with kernels.use_backend("reference"):
        assert a.norms()[place].tolist() == [0, 0]


def test_more_parameters_than_one_launch_can_tell_and_a_table_that_is_kept() -> None:
    count = 100
    a = StepCase(
        "sgd",
        params=[torch.randn(1 + i % 3, 40 + i) for i in range(count)],
        grads=[torch.randn(1 + i % 3, 40 + i) for i in range(count)],
        steps=[torch.zeros(()) for _ in range(count)],
        states=[],
        scales=[],
        hyper=[0.1, 0.01],
    )
    expected = copy_of(a)
    for _ in range(3):
        reference.optimizer_step(expected.arguments, expected.grads, expected.scalars, None)
    with emulated() as launches:
        a.step()
        a.step()
        sent = [one.kernel for one in launches].count("write_words")
        a.grads[7] = a.grads[7].clone()
        a.step()
    words = (count + 1) * 11
    assert sent == -(-words // table._WORDS), "the second step finds its table on the device"
    assert [one.kernel for one in launches].count("write_words") == 2 * sent, "another address is another table"
    assert_same_bits([*a.params, *a.steps], [*expected.params, *expected.steps])


@pytest.mark.parametrize("count", [1, 2, 255, 256, 257, 65536, 70000])
def test_the_order_in_which_block_sums_are_folded(count: int) -> None:
    """Folds of up to three levels, for a parameter of more blocks than an emulated step could have."""
    sums = torch.randn(1, count + 7, dtype=torch.float64).exp()
    expected = sums[0, 7:].clone()
    while expected.numel() > 1:
        groups = torch.nn.functional.pad(expected, (0, -expected.numel() % 256)).view(-1, 256)
        expected = reference._fold_halves(groups)
    text = StepVariant("lars", F16, F16, 0, 256).text("optimizer_norms.cu")
    rows = torch.zeros(3, 11, dtype=torch.int64)
    rows[1, 10], rows[2, 10] = 7, count + 7
    out = torch.zeros(2, 2, dtype=torch.float64)
    kept = sums.repeat(2, 1)
    fold = rows, ctypes.c_int64(count + 7), kept, torch.zeros_like(kept), out
    with emulated(order="random"):
        launch.run(launch.Launch(text, "norm_fold", (2, 2, 1), 256, fold))
    assert out[1].tolist() == [float(expected)] * 2


# ---------------------------------------------------------------------------------------------------------------------
# int8


def quantised(x: Tensor, seed: int | None) -> list[Tensor]:
    return [
        *(*kernels.quantize_rowwise(x, seed), *kernels.quantize_colwise(x, seed)),
        *kernels.quantize_both(x, seed),
        *kernels.quantize_both(x, seed, nearest_rows=True),
        *kernels.quantize_image(x, seed),
        *([] if seed else [kernels.hadamard(x, dim) for dim in (0, 1)]),
    ]


@pytest.mark.parametrize("seed", [None, 2**64 - 77])
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_int8_quantisers(dtype: torch.dtype, seed: int | None) -> None:
    shapes = [(1, 1), (0, 5), (5, 0), (3, 7), (16, 1030), (64, 64), (130, 67), (300, 9)]
    for mode in MODES if dtype != F16 else MODES[:3]:
        for shape in shapes[3:] if "check" in mode else shapes:
            x = torch.randn(shape) * torch.exp(2 * torch.randn(shape))
            if shape == (16, 1030):
                x[2], x[4], x[5, 9], x[9, 5] = 0, 1e-38, float("inf"), float("nan")
            variants = [x.to(dtype)] if "check" in mode else [x.to(dtype), shifted(x.to(dtype))]
            for values in variants:
                with kernels.use_backend("reference"):
                    expected = quantised(values, seed)
                with emulated(**mode):
                    ours = quantised(values, seed)
                assert_same_bits(ours, expected, (mode, shape))


def test_more_rows_than_a_launch_spreads_over() -> None:
    """The second dimension of these launches is bounded; the kernels stride over the rest."""
    x = torch.randn(64 * 64 + 70, 5)
    with kernels.use_backend("reference"):
        expected = [*kernels.quantize_colwise(x)]
    with emulated():
        ours = [*kernels.quantize_colwise(x)]
    assert_same_bits(ours, expected)


def test_blocks_are_found_whatever_the_grid() -> None:
    """The grid of the launches is the smallest that holds all blocks: one more block means one more CUDA block."""
    with emulated() as launches:
        for blocks in (8, 9):
            kernels.quantize_blockwise(torch.randn(blocks, 256))
    assert [one.grid[0] for one in launches] == [1, 2]
    assert BlockGrid.of((9, 256)).scales_shape == (9, 1)
