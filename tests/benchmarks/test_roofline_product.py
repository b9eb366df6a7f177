"""The predicted time of the int8 product on Hopper, from machine code."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import cuda_roofline  # noqa: F401 - so that the emulator is found
from roofline import product as predicted
from roofline.devices import DEVICES

H200 = next(device for device in DEVICES if device.name == "H200")
SHAPE = (8192, 4096, 4096)


@pytest.fixture(scope="module")
def wgmma() -> predicted.Engine:
    return next(engine for engine in predicted.engines() if engine.name == "wgmma 128 x 256")


def test_wgmma_keeps_three_quarters_of_the_tensor_units_busy(wgmma: predicted.Engine) -> None:
    """As far as machine code and published rates decide; L2 may bind before."""
    in_step, outside = predicted.slots(wgmma)
    assert in_step <= 180
    assert outside > 0
    assert predicted.utilisation(wgmma, H200, SHAPE, with_l2=False) >= 0.75
    assert predicted.utilisation(wgmma, H200, SHAPE, with_l2=True) >= 0.45


def test_by_hand(wgmma: predicted.Engine) -> None:
    """128 x 256 x 128 multiplications in a step, at 1979e12 / 2 a second on 132 multiprocessors."""
    step = predicted.step_of(wgmma, H200)
    assert step.tensor == pytest.approx(128 * 256 * 128 * 2 * 132 / 1979e12)
    assert step.l2 == pytest.approx((128 + 256) * 128 / (28 * 1.755e9))
    assert step.shared == pytest.approx(((128 + 256) * 128 + 2 * (64 + 256) * 128) / (128 * 1.755e9))
    one, two = (predicted.seconds(wgmma, H200, (128 * 132 * waves, 256, 1 << 16), False) for waves in (1, 2))
    assert two == pytest.approx(2 * one)


def test_more_instructions_show(wgmma: predicted.Engine) -> None:
    slow = wgmma.text.replace("order_sums();\n", "order_sums(); " + 10 * "share_with_products(); " + "\n")
    assert slow != wgmma.text
    fenced = replace(wgmma, text=slow)
    assert predicted.slots(fenced)[0] >= predicted.slots(wgmma)[0] + 20
    assert predicted.step_of(fenced, H200).issue > predicted.step_of(wgmma, H200).issue
