"""``swap="faster"``: convolutions that are slower in int8 become plain after the first step, and stay so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lowbit_lightning import Int8MixedPrecision
from lowbit_lightning.convert import swap_linears
from lowbit_lightning.layers import Experts, Int8Conv2d, Int8Experts, speed
from lowbit_lightning.layers.speed import ConvShape, Times
from lowbit_lightning.precision.slower import Slower


class Model(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 1), nn.Conv2d(32, 32, 3, 2))
        self.head = nn.Linear(32, 4)
        self.kinds: list[list[str]] = []

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        self.kinds.append([type(m).__name__ for m in self.net if m is not self.net[1]])
        return self.head(self.net(batch).mean((2, 3))).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[ConvShape]:
    """The shapes that were timed; kernels of 1 are said to be slower in int8."""
    shapes: list[ConvShape] = []

    def times(shape: ConvShape, device: torch.device) -> Times:
        shapes.append(shape)
        return Times(2.0, 1.0) if shape.kernel == (1, 1) else Times(1.0, 1.5)

    monkeypatch.setattr(speed, "times", times)
    return shapes


def fit(plugin: Int8MixedPrecision, steps: int, path: Path, resume: Path | None = None) -> tuple[Model, L.Trainer]:
    torch.manual_seed(0)
    model = Model()
    trainer = L.Trainer(
        max_steps=steps, plugins=[plugin], accelerator="cpu", logger=False, default_root_dir=path,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    images: Any = list(torch.randn(8, 16, 9, 9))
    trainer.fit(model, torch.utils.data.DataLoader(images, 2), ckpt_path=resume)
    return model, trainer


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_slower_layers_become_plain_and_a_resumed_run_keeps_the_choice(
    measured: list[ConvShape], tmp_path: Path
) -> None:
    plugin = Int8MixedPrecision(autocast="off")
    model, trainer = fit(plugin, 3, tmp_path)
    int8, chosen = ["Int8Conv2d"] * 3, ["Int8Conv2d", "Conv2d", "Int8Conv2d"]
    assert model.kinds == [int8, chosen, chosen]
    assert [shape.kernel for shape in measured] == [(3, 3), (1, 1), (3, 3)]
    assert measured[2].seen == (2, (7, 7), "torch.float32", False)
    report = str(plugin.report)
    assert "not net.2: slower in int8 on this device (1 x 1, 32 to 32 channels, 2 images of 7 x 7: 0.50 times" in report
    assert "note: net.3 (3 x 3, stride 2, 32 to 32 channels, 2 images of 7 x 7): 1.50 times as fast in int8" in report

    trainer.save_checkpoint(tmp_path / "run.ckpt")
    measured.clear()
    model, _ = fit(Int8MixedPrecision(autocast="off"), 5, tmp_path, tmp_path / "run.ckpt")
    assert model.kinds == [chosen] * 2
    assert measured == []


def test_all_are_kept_on_request(measured: list[ConvShape], tmp_path: Path) -> None:
    model, _ = fit(Int8MixedPrecision(autocast="off", swap="all"), 2, tmp_path)
    assert model.kinds == [["Int8Conv2d"] * 3] * 2
    assert measured == []
    with pytest.raises(ValueError, match="swap must be 'faster' or 'all', got 'some'"):
        Int8MixedPrecision(swap="some")  # type: ignore[arg-type]


def test_a_measurement() -> None:
    """It runs both ways, changes no generator and no number of threads, and uses the sizes that the layer has seen."""
    layer = Int8Conv2d(16, 16, 3, padding="same", forward="high")
    assert ConvShape.of(layer) is None
    layer(torch.randn(2, 16, 5, 5)).sum().backward()
    shape = ConvShape.of(layer)
    assert shape is not None
    assert shape.seen.size == (7, 7)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    times = speed.measure(shape, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert min(times) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts_are_timed_at_the_rows_that_they_had(dtype: torch.dtype) -> None:
    experts = Int8Experts(4, 64, 32, dtype=dtype)
    assert speed.shape_of(experts) is None
    index = torch.tensor([[0, 1], [2, 3], [0, 3]])
    experts(torch.randn(3, 64, dtype=dtype), index, torch.rand(3, 2)).sum().backward()
    shape = speed.shape_of(experts)
    assert str(shape) == "4 experts of 64 x 64 and 64 x 32, 6 rows"
    assert shape is not None
    assert min(speed.measure(shape, torch.device("cpu"))) > 0


def test_slower_experts_become_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential()
    model.add_module("experts", Experts(4, 64, 32))
    report = swap_linears(model, output_layer=None)
    index = torch.tensor([[0, 1], [2, 3], [0, 3]])
    model.experts(torch.randn(3, 64), index, torch.rand(3, 2)).sum().backward()  # type: ignore[operator]
    monkeypatch.setattr(speed, "times", lambda *_: Times(2.0, 1.0))
    slower = Slower()
    slower.find(model)
    report = slower.apply(model, report)
    assert type(model.experts) is Experts
    assert "not experts: slower in int8 on this device (4 experts of 64 x 64 and 64 x 32, 6 rows: 0.50" in str(report)
