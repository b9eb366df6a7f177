"""The metrics behind LowBitMonitor, against float64 and counting by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lowbit_lightning import kernels
from lowbit_lightning.callbacks import quantization
from lowbit_lightning.callbacks.quantization import QuantizationError, Slot, StateCodes, measure


def by_rows(x: Tensor) -> list[float]:
    return measure(x, *kernels.quantize_rowwise(x), "columns").tolist()


def decibels(x: np.ndarray, axis: int) -> np.ndarray:
    """Signal to noise of each feature in float64, summed along ``axis``; quantised by rows."""
    scale = np.abs(x).max(1, keepdims=True) / 127
    error = x - np.rint(x / scale) * scale
    return 10 * np.log10((x**2).sum(axis) / (error**2).sum(axis))


@pytest.mark.parametrize("chunk", [1, 1000, 2**22])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("magnitude", [1.0, 1e-25, 1e25])
def test_measure_against_float64(
    monkeypatch: pytest.MonkeyPatch, chunk: int, dtype: torch.dtype, magnitude: float
) -> None:
    monkeypatch.setitem(quantization.CHUNK, "cpu", chunk)
    x = (magnitude * torch.randn(37, 65) * torch.rand(37, 1) * torch.rand(65)).to(dtype)
    x[3, 4], x[:, 7] = 0.0, 0.0
    exact = x.double().numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        columns = np.delete(decibels(exact, 0), 7)  # a feature that is all zero doesn't count
        rows = decibels(exact.T, 1)
    scale = np.abs(exact).max(1, keepdims=True) / 127
    q = np.rint(exact / scale)
    expected = [(np.abs(q) == 127).mean(), ((q == 0) & (exact != 0)).sum() / (exact != 0).sum(), 0.0]

    snr, *shares, overflow = by_rows(x)
    assert snr == pytest.approx(np.sort(columns)[31], abs=1e-3)
    assert shares == pytest.approx(expected, rel=1e-5)
    assert overflow == pytest.approx(np.abs(q).sum(1).max() * 127 / (2**31 - 1), rel=1e-5)
    snr = measure(x.T, *kernels.quantize_colwise(x), "rows")[0].item()
    assert snr == pytest.approx(np.sort(np.delete(rows, 7))[31], abs=1e-3)


def test_one_outlier_feature_counts_though_its_energy_would_hide_it() -> None:
    x = torch.randn(512, 256)
    ordinary = by_rows(x)
    x[:, 17] = 100 * torch.randn(512).sign()
    snr, _, underflow, *_ = by_rows(x)
    error = x - kernels.quantize_rowwise(x)[0].float() * 100 / 127
    assert 10 * (x.square().sum() / error.square().sum()).log10() > 28  # the usual ratio
    assert snr == pytest.approx(10 * np.log10(12 * 127**2 / 100**2), abs=0.3)
    assert ordinary[0] > 40
    assert ordinary[2] < 0.02
    assert underflow == pytest.approx(0.306, abs=0.01)  # P(|x| < 50 / 127) of a normal x


def test_non_finite_rows_are_left_out_and_counted() -> None:
    x = torch.randn(20, 64)
    clean = by_rows(x)
    y = torch.cat([x, torch.ones(5, 64)])
    y[20, 3], y[21, 4], y[22:, 5] = torch.inf, -torch.inf, torch.nan
    snr, saturation, underflow, nonfinite, overflow = by_rows(y)
    assert nonfinite == pytest.approx(5 / 25)
    assert [snr, saturation, underflow, overflow] == pytest.approx([*clean[:3], clean[4]], rel=1e-5)


def test_extremes() -> None:
    snr, _, underflow, *_ = by_rows(torch.zeros(3, 4))
    assert np.isnan(snr)
    assert np.isnan(underflow)
    snr, saturation, underflow, _, overflow = by_rows(torch.ones(3, 133_144))
    assert (snr, saturation, underflow) == pytest.approx((100, 1, 0), abs=1e-5)  # no noise: the most it reports
    assert overflow == pytest.approx(1, rel=1e-5)  # the longest sum that int32 holds for sure


def test_two_operands_give_the_error_of_their_product() -> None:
    x, w = torch.randn(256, 512), torch.randn(192, 512) * torch.rand(192, 1)
    xq, wq = kernels.quantize_rowwise(x), kernels.quantize_rowwise(w)
    metric = QuantizationError(2)
    values = torch.stack([measure(x, *xq, "columns"), measure(w, *wq, "columns")])
    metric.update([Slot(1, 0, 0), Slot(1, 0, 1)], values)
    exact = x.double() @ w.double().T
    product = kernels.int8_matmul(xq[0], wq[0], xq[1], wq[1], None, torch.float32)
    # relative to each row of w: that is where the ratio of its features stands
    error = ((product - exact) / w.norm(dim=1)).square().sum() / (exact / w.norm(dim=1)).square().sum()
    computed = metric.compute()
    assert computed["snr"][1, 0].item() == pytest.approx(-10 * np.log10(error.item()), abs=0.3)
    assert computed["snr"].isnan().sum() == 5
    assert computed["operands"][1, 0].tolist() == values[:, 0].tolist()


def test_means_of_what_was_measured_and_the_largest_overflow() -> None:
    metric = QuantizationError(1)
    nan = float("nan")
    metric.update([Slot(0, 2, 1), Slot(0, 2, 0)], torch.tensor([[30, 0.1, 0.2, 0, 0.5], [20, 0.3, 0, 0, 0.4]]))
    metric.update([Slot(0, 2, 1), Slot(0, 2, 1)], torch.tensor([[40, 0.1, 0.4, 0, 0.7], [nan, 0.1, nan, 0.9, 0.1]]))
    metric.update([], torch.zeros(0, 5))
    computed = {name: values[0, 2] for name, values in metric.compute().items()}
    assert computed["operands"].tolist() == [20, 35]
    assert computed["snr"].item() == pytest.approx(-10 * np.log10(10**-2 + 10**-3.5), rel=1e-6)
    shares = [computed[name].item() for name in ("saturation", "underflow", "nonfinite", "overflow")]
    assert shares == pytest.approx([0.3, 0.3, 0.3, 0.4])  # of the worse operand; no sum exceeds the smaller bound


def test_codes_of_states() -> None:
    metric = StateCodes(("exp_avg", "exp_avg_sq"))
    metric.update(
        "exp_avg", torch.tensor([[127, 127, 126, 128], [0, 255, 5, 129]], dtype=torch.uint8), "dynamic_signed"
    )
    metric.update("exp_avg_sq", torch.tensor([0, 1, 1, 255], dtype=torch.uint8), "dynamic_unsigned")
    metric.update("exp_avg_sq", torch.tensor([2, 254, 126, 127], dtype=torch.uint8), "dynamic_unsigned")
    assert metric.compute().tolist() == [[2 / 8, 2 / 8, 2 / 8], [1 / 8, 2 / 8, 1 / 8]]
