"""What measures and plans knows convolutions in int8: LowBitMonitor's samples, FLOPs, ``memory.plan``."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lowbit_lightning import convert, memory
from lowbit_lightning.callbacks.sample import Sample
from lowbit_lightning.layers import Int8Conv2d, windows
from lowbit_lightning.precision.accounting import patch_accounting


def test_the_monitor_sees_the_operands_of_the_products() -> None:
    """Features of normal data have 40 dB or more; a pixel that is 100 times larger costs dw, and no other product."""
    torch.manual_seed(0)
    layer = Int8Conv2d(32, 24, 3, padding=1)
    x = torch.randn(2, 32, 8, 8).requires_grad_()
    with torch.no_grad():
        x[0, :, 3, 3] *= 100
    sample = Sample({"conv": layer})
    layer(x).backward(torch.randn(2, 24, 8, 8))
    slots, values = sample.result()
    sample.remove()
    snr = {(slot.product, slot.side): value.item() for slot, value in zip(slots, values[:, 0], strict=True)}
    assert sorted(snr) == [(product, side) for product in range(3) for side in range(2)]
    assert snr.pop((2, 1)) < 36
    assert all(38 < value < 50 for value in snr.values())


@pytest.mark.parametrize("kernel", [1, 3])
def test_flops_are_those_of_the_plain_convolution(kernel: int) -> None:
    patch_accounting()
    found = []
    for kind in (nn.Conv2d, Int8Conv2d):
        layer = kind(16, 24, kernel, padding=kernel // 2)
        with FlopCounterMode(display=False) as counter:
            layer(torch.randn(2, 16, 6, 6, requires_grad=True)).sum().backward()
        found.append(counter.get_total_flops())
    assert found[0] == found[1] == 3 * 2 * 2 * 36 * 16 * 24 * kernel**2


def test_a_plan_counts_saved_images_as_bytes() -> None:
    model = nn.Sequential(*(nn.Conv2d(32, 32, 3, padding=1) for _ in range(8)), nn.Flatten(), nn.Linear(2048, 4))
    batch = torch.empty(16, 32, 8, 8)

    def step(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return m(x).sum()

    plans = {p: memory.plan(model, precision=p, batch=batch, step=step) for p in ("32-true", "int8-mixed")}
    image = 16 * 32 * 64
    saved = plans["32-true"].activations - plans["int8-mixed"].activations  # type: ignore[operator]
    assert 8 * 3 * image * 0.7 < saved < 8 * 3 * image * 1.3
    assert type(model[0]) is nn.Conv2d
    assert convert.restore(model) == ()


def test_images_of_many_sizes_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every size has a table of the pixels that windows see; those that were used last are kept."""
    monkeypatch.setattr(windows, "KEPT", 4000)
    kept: OrderedDict[Any, torch.Tensor] = OrderedDict()
    monkeypatch.setattr(windows, "_tables", kept)
    geometry = [windows.Windows((n, n), (3, 3), (1, 1), (1, 1), (1, 1)) for n in range(3, 30)]
    for one in geometry:
        assert one.table(torch.device("cpu")).shape == (one.size[0] ** 2, 9)
        assert geometry[5].table(torch.device("cpu")) is geometry[5].table(torch.device("cpu"))
        assert len(kept) == 1 or sum(table.numel() for table in kept.values()) <= 4000
