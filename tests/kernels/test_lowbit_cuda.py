"""Low-bit weights on the CUDA backend, executed by the emulator, against the reference.

A text is compiled for each format, dtype and mode, which takes a second: every run of the tests has a few of them,
``make slow`` all.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from emulator.backend import emulated
from torch import Tensor

from lowbit_lightning import kernels
from lowbit_lightning.kernels.cuda import lowbit, lowbit_product
from lowbit_lightning.kernels.reference import lowbit as reference

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
FORMS = ("int8", "nf4", "nf4-dq", "nf4-g4096", "fp4-g32", "int4", "int4-g128", "int3", "int3-g32", "int2", "int2-g256")
MODES: dict[str, dict[str, Any]] = {"": {}, "backward": {"order": "backward"}, "check": {"check": True}}
LENGTHS = (1, 31, 64, 129, 333, 512)


def cases(quick: set[tuple[Any, ...]], forms: tuple[Any, ...], *axes: tuple[Any, ...]) -> list[Any]:
    """Every format with every dtype, the values of other axes in turns: these are slow. And those that are quick."""
    dtypes, *others = axes
    wide = [
        (form, dtype, *(axis[(i + j) % len(axis)] for axis in others))
        for (i, form), (j, dtype) in product(enumerate(forms), enumerate(dtypes))
    ]
    slow = [pytest.param(*case, marks=pytest.mark.slow) for case in wide if case not in quick]
    return [*(pytest.param(*case) for case in sorted(quick, key=str)), *slow]


def weight_of(form: str, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """A weight with a zero row, a block that is zero and one that is not finite."""
    weight = torch.randn(rows, length, generator=torch.Generator().manual_seed(length))
    weight[1] = 0
    weight[2, : min(32, length)] = 0
    weight[3, length // 2] = float("inf")
    with kernels.use_backend("reference"):
        return kernels.lowbit_quantize(weight, form, "absmax")


def weight_rows(weight: Tensor, form: str) -> tuple[Tensor, Tensor]:
    with kernels.use_backend("reference"):
        return kernels.lowbit_quantize(weight, form)


def shifted(x: Tensor) -> Tensor:
    """The same values, contiguous, at an address that no wide access may use."""
    room = torch.empty(x.numel() + 1, dtype=x.dtype)
    room[1:] = x.reshape(-1)
    return room[1:].view(x.shape)


def assert_same_bits(ours: Tensor, theirs: Tensor, where: object) -> None:
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    same = (ours == theirs) | (ours.isnan() & theirs.isnan() if ours.is_floating_point() else ours.isnan())
    bad = (~same).nonzero()
    assert not len(bad), f"{where}: first difference at {bad[0].tolist()}: {ours[~same][0]} against {theirs[~same][0]}"


# -- products --------------------------------------------------------------------------------------------------------

TOLERANCE = {F32: 2e-6, F16: 1e-3, BF16: 8e-3}  # of a bfloat16, half a step is 4e-3
FEW = {
    *{("nf4", BF16, 3, ""), ("int3", F16, 8, "check"), ("int8", BF16, 2, "")},
    ("nf4-dq", F32, 3, "check"),
}
MANY = {("nf4", BF16, 40, "check"), ("int2", F16, 100, ""), ("int8", F32, 9, "")}


def product_case(form: str, dtype: torch.dtype, rows: int, outputs: int, length: int) -> tuple[Tensor, ...]:
    """x, packed, scales, bias, and the weight in float64."""
    generator = torch.Generator().manual_seed(length)
    weight = torch.randn(outputs, length, generator=generator)
    with kernels.use_backend("reference"):
        packed, scales = kernels.lowbit_quantize(weight, form, "absmax")
        stored = kernels.lowbit_dequantize(packed, scales, form, length).double()
    x = torch.randn(rows, length, generator=generator).to(dtype)
    return x, packed, scales, torch.randn(outputs, generator=generator).to(dtype), stored


def error(result: Tensor, expected: Tensor) -> float:
    return float((result.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("form", "dtype", "rows", "mode"), cases(FEW, FORMS, (F32, F16, BF16), (1, 2, 3, 8), tuple(MODES))
)
def test_a_few_rows(form: str, dtype: torch.dtype, rows: int, mode: str) -> None:
    """Several tiles and parts, tails of both; rows that can be copied in packets, and rows that cannot."""
    for outputs, length in ((5, 1), (37, 333), (140, 512), (9, 1000)):
        x, packed, scales, bias, weight = product_case(form, dtype, rows, outputs, length)
        place = packed if mode == "check" or length != 333 else shifted(packed)
        with emulated(**MODES[mode]):
            y = kernels.lowbit_matmul(x, place, scales, bias, form)
        assert y.dtype == dtype
        assert error(y, x.double() @ weight.T + bias.double()) < TOLERANCE[dtype], (outputs, length)


ONE = {("int8", BF16, ""), ("nf4", F16, "backward"), ("int3", BF16, "check"), ("int2", F16, "")}


@pytest.mark.parametrize(("form", "dtype", "mode"), cases(ONE, (*FORMS, "int2-g64"), (F16, BF16), tuple(MODES)))
def test_one_row(form: str, dtype: torch.dtype, mode: str) -> None:
    """Some warps have several turns, others none; one piece is cut short; x is longer than shared memory has place."""
    for outputs, length, aligned in ((5, 1, True), (37, 333, False), (33, 2560, True), (2, 16600, True)):
        if length == 16600 and mode:
            continue
        x, packed, scales, bias, weight = product_case(form, dtype, 1, outputs, length)
        with emulated(**MODES[mode]) as launches:
            y = kernels.lowbit_matmul(x, packed if aligned or mode else shifted(packed), scales, bias, form)
        assert launches[0].kernel == "lowbit_row"
        assert error(y, x.double() @ weight.T + bias.double()) < TOLERANCE[dtype], (outputs, length)


@pytest.mark.slow
def test_bfloat16_without_tensor_cores() -> None:
    """sm_75 has none for bfloat16."""
    x, packed, scales, _, weight = product_case("nf4", BF16, 2, 12, 100)
    with emulated(capability=(7, 5)) as launches:
        y = kernels.lowbit_matmul(x, packed, scales, None, "nf4")
    assert [one.kernel for one in launches] == ["lowbit_gemv_plain"]
    assert error(y, x.double() @ weight.T) < TOLERANCE[BF16]


@pytest.mark.parametrize(("form", "dtype", "mode"), [("nf4", BF16, ""), ("nf4-dq", F32, "check")])
def test_what_is_not_finite_stays_in_its_row(form: str, dtype: torch.dtype, mode: str) -> None:
    """NaN in a row of the weight or of x; and x may be infinite."""
    weight = torch.randn(12, 200)
    weight[2, 150] = float("inf")
    x = torch.randn(3, 200).to(dtype)
    x[1, 7], x[2, 100] = float("nan"), float("inf")
    with emulated(**MODES[mode]):
        y = kernels.lowbit_matmul(x, *weight_rows(weight, form), torch.zeros(12, dtype=dtype), form)
    assert y[:, 2].isnan().all()
    assert y[1].isnan().all()
    assert y[0, [0, 1, 3, 11]].isfinite().all()
    assert not y[2].isfinite().any()


@pytest.mark.parametrize(
    ("form", "dtype", "rows", "mode"), cases(MANY, FORMS, (F32, F16, BF16), (9, 20, 40, 100), tuple(MODES))
)
def test_many_rows_and_gradients(form: str, dtype: torch.dtype, rows: int, mode: str) -> None:
    """Tails of all tiles, and sums that are cut into parts."""
    for outputs, length in (
        ((140, 77), (9, 1100)) if mode == "check" or rows == 100 else ((140, 77), (9, 1100), (130, 264))
    ):
        x, packed, scales, bias, weight = product_case(form, dtype, rows, outputs, length)
        x, dy = x.requires_grad_(), torch.randn(rows, outputs).to(dtype)
        place = packed if mode == "check" else shifted(packed)
        with emulated(**MODES[mode]):
            y = kernels.lowbit_matmul(x, place, scales, bias, form)
            y.backward(dy)
        assert x.grad is not None
        assert x.grad.dtype == y.dtype == dtype
        dx, x = x.grad, x.detach()
        assert error(y.detach(), x.double() @ weight.T + bias.double()) < TOLERANCE[dtype], (outputs, length)
        assert error(dx, dy.double() @ weight) < TOLERANCE[dtype], (outputs, length)


def test_the_engine_is_chosen_by_shape_and_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    engines = "tensor_row", "tensor_gemv", "plain_gemv", "fused_product", "decoded_product", "decoded_product_backward"
    for name in engines:

        def note(x: Tensor, *_: Any, name: str = name, **__: Any) -> Tensor:
            started.append(name)
            return x

        monkeypatch.setattr(lowbit_product, name, note)
    packed = torch.zeros(4, 32, dtype=torch.uint8)
    scales = torch.ones(4, 1)
    asked = [  # capability, dtype, rows
        *(
            ((8, 0), BF16, 1),
            ((8, 0), F32, 8),
            ((7, 5), F16, 8),
            ((7, 5), BF16, 8),
            ((9, 0), F16, 9),
            ((9, 0), BF16, 32),
        ),
        *(((9, 0), BF16, 33), ((9, 0), BF16, 512), ((9, 0), BF16, 513), ((8, 6), F16, 1024), ((7, 5), BF16, 9)),
        *(((9, 0), F32, 9), ((11, 0), BF16, 513)),
    ]
    for capability, dtype, rows in asked:
        with emulated(capability=capability):
            op = lowbit.lowbit_gemv if rows <= 8 else lowbit.lowbit_matmul
            op(torch.zeros(rows, 64, dtype=dtype), packed, scales, None, "nf4")
    assert started == [
        *("tensor_row", "plain_gemv", "tensor_gemv", "plain_gemv", "tensor_gemv", "tensor_gemv"),
        *("fused_product", "fused_product", "decoded_product", "fused_product", "decoded_product"),
        *("decoded_product", "decoded_product"),
    ]


def test_panels_that_are_decoded_count_as_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowbit_product, "_PANEL", 77 * 50)
    x, packed, scales, bias, weight = product_case("int8", F32, 12, 120, 77)
    x.requires_grad_()
    kernels.reset_calls()
    with emulated():
        y = kernels.lowbit_matmul(x, packed, scales, bias, "int8")
        y.sum().backward()
    assert kernels.calls() == {
        ("lowbit_matmul", "cuda"): 1,
        ("lowbit_matmul_backward", "cuda"): 1,
        ("lowbit_dequantize", "cuda"): 6,
    }
    assert error(y.detach(), x.detach().double() @ weight.T + bias.double()) < 2e-6
    assert x.grad is not None
    assert error(x.grad, weight.sum(0).expand_as(x)) < 2e-6


# -- quantise --------------------------------------------------------------------------------------------------------

MADE = {("int3-g32", F32, "check"), ("nf4", F16, "backward")}


@pytest.mark.parametrize(
    ("form", "dtype", "mode"), cases(MADE, (*FORMS[1:], "nf4-g512"), (F32, F16, BF16), tuple(MODES))
)
def test_quantised(form: str, dtype: torch.dtype, mode: str) -> None:
    """By absmax equal to the bit. By least squares with sums in another order: nearly all codes, and the error."""
    for length in LENGTHS:
        weight = torch.randn(5, length, generator=torch.Generator().manual_seed(length))
        weight[1], weight[4, : length // 2] = 0, 1e-30
        weight[2, length // 3], weight[3, length // 2] = float("nan"), float("inf")
        weight = weight.to(dtype)
        for fit in ("absmax", "lsq"):
            if fit == "lsq":  # threads wait for each other hundreds of times, which is slow in the emulator
                weight = weight[4:]
            if length != 129 and (fit == "lsq" or mode == "check"):
                continue
            with kernels.use_backend("reference"):
                packed, scales = kernels.lowbit_quantize(weight, form, fit)
            place = weight if mode == "check" or length % 2 else shifted(weight)
            with emulated(**MODES[mode]):
                ours = kernels.lowbit_quantize(place, form, fit)
            if fit == "absmax":
                assert_same_bits(ours[0], packed, length)
                assert_same_bits(ours[1], scales, length)
                continue
            assert float((ours[0] != packed).float().mean()) < 0.01
            first, second = (
                kernels.lowbit_dequantize(p, s, form, length) - weight for p, s in (ours, (packed, scales))
            )
            assert torch.equal(first.isnan(), second.isnan())
            assert torch.allclose(first.nan_to_num().norm(), second.nan_to_num().norm(), rtol=1e-3)


def test_int8_rows_and_more_dimensions() -> None:
    weight = torch.randn(2, 3, 100)
    for form in ("int8", "nf4"):
        with kernels.use_backend("reference"):
            expected = kernels.lowbit_quantize(weight, form)
        with emulated():
            ours = kernels.lowbit_quantize(weight, form)
            empty = kernels.lowbit_quantize(weight[:, :0], form)
        for x, y in zip(ours, expected, strict=True):
            assert_same_bits(x, y, form)
        assert empty[0].shape[:2] == (2, 0)


# -- decode ----------------------------------------------------------------------------------------------------------

DECODED = {("nf4-dq", BF16, "check"), ("int3", F32, "")}


@pytest.mark.parametrize(("form", "dtype", "mode"), cases(DECODED, FORMS, (F32, F16, BF16), tuple(MODES)))
def test_dequantised_and_looked_up(form: str, dtype: torch.dtype, mode: str) -> None:
    for length in (*LENGTHS, 1088):  # of which a warp decodes 1024 without looking for the end
        packed, scales = weight_of(form, 7, length)
        indices = torch.tensor([[6, 0, 1], [3, 3, 2]])
        with kernels.use_backend("reference"):
            expected = kernels.lowbit_dequantize(packed, scales, form, length, dtype)
        places = [packed] if mode == "check" else [packed, shifted(packed)]
        for place in places:
            with emulated(**MODES[mode]):
                whole = kernels.lowbit_dequantize(place, scales, form, length, dtype)
                rows = [
                    kernels.lowbit_embedding(i, place, scales, form, length, dtype) for i in (indices, indices.int())
                ]
            assert_same_bits(whole, expected, length)
            for found in rows:
                assert_same_bits(found, expected[indices], length)


def test_more_dimensions_and_none() -> None:
    packed, scales = weight_of("nf4", 6, 100)
    with emulated() as launches:
        whole = kernels.lowbit_dequantize(packed.view(2, 3, 50), scales.view(2, 3, 2), "nf4", 100)
        assert len(launches) == 1
        assert kernels.lowbit_dequantize(packed[:0], scales[:0], "nf4", 100).shape == (0, 100)
        assert kernels.lowbit_embedding(torch.zeros(0, 4, dtype=torch.int64), packed, scales, "nf4", 100).numel() == 0
        assert len(launches) == 1
    assert_same_bits(whole, kernels.lowbit_dequantize(packed, scales, "nf4", 100).view(2, 3, 100), "")


@pytest.mark.parametrize("index", [7, -1])
def test_an_index_out_of_range_stops_the_kernel(index: int) -> None:
    packed, scales = weight_of("int8", 7, 64)
    with emulated(), pytest.raises(Exception, match="__trap"):
        kernels.lowbit_embedding(torch.tensor([2, index]), packed, scales, "int8", 64)


# -- LLM.int8() ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "mode"), cases({(BF16, "check"), (F32, "")}, (F32, F16, BF16), tuple(MODES)))
def test_outlier_columns(dtype: torch.dtype, mode: str) -> None:
    """None, some, more than are multiplied at a time, all; NaN is no outlier, an infinity is one."""
    generator = torch.Generator().manual_seed(0)
    packed, scales = weight_rows(torch.randn(70, 1100, generator=generator), "int8")
    x = torch.randn(67, 1100, generator=generator)
    x[5, 9] = float("nan")
    few, many = x.clone(), x.clone()
    few[3, [0, 77, 1023, 1024, 1099]], few[8, 500] = 60.0, -float("inf")
    many[2, 100:400] = -7.0
    for rows, threshold in ((x, 6.0), (few, 6.0), (many, 6.0), (x[:9, :77].contiguous(), 1e-9)):
        there = rows.to(dtype)
        operands = there, packed[:, : rows.shape[1]].contiguous(), scales, threshold
        rest, product = reference.split_outliers(*operands)
        with emulated(**MODES[mode]):
            ours = lowbit.split_outliers(*operands)
        assert_same_bits(ours[0], rest, threshold)
        assert ours[1] is not None
        if product is None:
            assert not ours[1].any()
            continue
        assert torch.equal(ours[1].isnan(), product.isnan())
        assert torch.allclose(ours[1], product, rtol=1e-4, atol=1e-3, equal_nan=True)


@pytest.mark.slow
def test_outliers_in_int8_on_a_gpu() -> None:
    """The whole op, as on a GPU: within 1 % with six columns 60 times larger."""
    x, weight = torch.randn(20, 256), torch.randn(24, 256)
    x[:, [3, 77, 100, 200, 201, 255]] *= 60
    packed, scales = kernels.lowbit_quantize(weight, "int8")
    expected = x.double() @ weight.double().T
    with emulated():
        kept = kernels.int8_outlier_matmul(x, packed, scales)
        lost = kernels.int8_outlier_matmul(x, packed, scales, None, 0.0)
    assert error(kept, expected) < 0.01
    assert error(lost, expected) > error(kept, expected)
