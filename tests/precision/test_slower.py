"""``swap="faster"``: layers that are slower in int8 become plain after the first step, and stay so."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from support.int8_models import counted
from torch import Tensor, nn

from lowbit_lightning import Int8MixedPrecision, kernels
from lowbit_lightning.convert import swap_linears
from lowbit_lightning.layers import Experts, Int8Conv2d, Int8Experts, Int8Linear, Int8MultiheadAttention, speed
from lowbit_lightning.layers.shapes import ENOUGH, ConvShape, MatmulsShape, Shape, shape_of
from lowbit_lightning.layers.speed import Times
from lowbit_lightning.precision import peaks
from lowbit_lightning.precision.slower import Slower

CPU = torch.device("cpu")


class Model(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 1), nn.Conv2d(32, 32, 3, 2))
        self.wide, self.head = nn.Linear(32, 64), nn.Linear(64, 4)
        self.kinds: list[list[str]] = []

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        self.kinds.append([type(m).__name__ for m in (self.net[0], self.net[2], self.net[3], self.wide)])
        return self.head(self.wide(self.net(batch).mean((2, 3)))).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The shapes that were timed. A clock that says that kernels of 1 and matrices of 32 features are slower."""
    shapes: list[Any] = []

    def times(shape: Any, device: torch.device) -> Times:
        shapes.append(shape)
        slow = shape.kernel == (1, 1) if isinstance(shape, ConvShape) else shape.matmuls[0][1].inputs == 32
        return Times(2.0, 1.0) if slow else Times(1.0, 1.5)

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
def test_slower_layers_become_plain_and_a_resumed_run_keeps_the_choice(measured: list[Any], tmp_path: Path) -> None:
    plugin = Int8MixedPrecision(autocast="off")
    model, trainer = fit(plugin, 3, tmp_path)
    int8 = ["Int8Conv2d", "Int8Conv2d", "Int8Conv2d", "Int8Linear"]
    chosen = ["Int8Conv2d", "Conv2d", "Int8Conv2d", "Linear"]
    assert model.kinds == [int8, chosen, chosen]
    convolutions = [shape for shape in measured if isinstance(shape, ConvShape)]
    matrices = [shape for shape in measured if isinstance(shape, MatmulsShape)]
    assert [shape.kernel for shape in convolutions] == [(3, 3), (1, 1), (3, 3)]
    float32 = "torch.float32", "torch.float32", True, True
    assert convolutions[2].seen == (2, (7, 7), False, float32)
    assert [seen for shape in matrices for _, seen in shape.matmuls] == [(2, 32, 64, float32)]
    report = str(plugin.report)
    assert "not wide: slower in int8 on this device (2 rows of 32 to 64 features: 0.50 times as fast" in report
    assert "not net.2: slower in int8 on this device (1 x 1, 32 to 32 channels, 2 images of 7 x 7: 0.50 times" in report
    assert "note: net.3 (3 x 3, stride 2, 32 to 32 channels, 2 images of 7 x 7): 1.50 times as fast in int8" in report

    trainer.save_checkpoint(tmp_path / "run.ckpt")
    measured.clear()
    model, _ = fit(Int8MixedPrecision(autocast="off"), 5, tmp_path, tmp_path / "run.ckpt")
    assert model.kinds == [chosen] * 2
    assert measured == []


def test_all_are_kept_on_request(measured: list[Any], tmp_path: Path) -> None:
    model, _ = fit(Int8MixedPrecision(autocast="off", swap="all"), 2, tmp_path)
    assert model.kinds == [["Int8Conv2d"] * 3 + ["Int8Linear"]] * 2
    assert measured == []
    with pytest.raises(ValueError, match="swap must be 'faster' or 'all', got 'some'"):
        Int8MixedPrecision(swap="some")  # type: ignore[arg-type]


def trained(layer: nn.Module, *inputs: Any, autocast: bool = False) -> Shape:
    """The shape of a layer that has trained once."""
    assert shape_of(layer) is None  # type: ignore[arg-type]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(*inputs)
    (y[0] if isinstance(y, tuple) else y).float().sum().backward()
    shape = shape_of(layer)  # type: ignore[arg-type]
    assert shape is not None
    return shape


LAYERS: dict[str, Callable[[], Shape]] = {
    "convolution": lambda: trained(Int8Conv2d(16, 16, 3, padding="same"), torch.randn(2, 16, 5, 5)),
    "linear": lambda: trained(Int8Linear(64, 32), torch.randn(2, 3, 64)),
    "attention": lambda: trained(Int8MultiheadAttention(64, 2), *[torch.randn(3, 2, 64)] * 3),
    "bfloat16": lambda: trained(Int8Linear(64, 32), torch.randn(6, 64), autocast=True),
    "frozen": lambda: trained(Int8Linear(64, 32).requires_grad_(False), torch.randn(6, 64, requires_grad=True)),
    "experts": lambda: of_experts(torch.float32),
    "experts in bfloat16": lambda: of_experts(torch.bfloat16),
}


def of_experts(dtype: torch.dtype) -> Shape:
    index = torch.tensor([[0, 1], [2, 3], [0, 3]])
    return trained(Int8Experts(4, 64, 32, dtype=dtype), torch.randn(3, 64, dtype=dtype), index, torch.rand(3, 2))


@pytest.mark.parametrize("name", LAYERS)
def test_a_measurement(name: str) -> None:
    """It runs both ways, and changes no generator, no number of threads and no count of calls."""
    shape = LAYERS[name]()
    state, threads, calls = torch.get_rng_state(), torch.get_num_threads(), kernels.calls()
    times = speed.measure(shape, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert kernels.calls() == calls
    assert min(times) > 0


def test_what_layers_have_seen() -> None:
    convolution: Any = LAYERS["convolution"]()
    assert convolution.seen.size == (7, 7)
    assert convolution.multiplications == 2 * 25 * 16 * 16 * 9
    assert str(LAYERS["experts"]()) == "4 experts of 64 x 64 and 64 x 32, 6 rows"
    assert LAYERS["experts"]().multiplications == 6 * (64 * 64 + 64 * 32)
    assert str(LAYERS["attention"]()) == "6 rows of 64 to 192 features, 6 rows of 64 to 64 features"
    assert LAYERS["attention"]().multiplications == 6 * 64 * (192 + 64)
    cross: Any = trained(Int8MultiheadAttention(64, 2), torch.randn(5, 2, 64), *[torch.randn(3, 2, 64)] * 2)
    assert [seen[:3] for _, seen in cross.matmuls] == [(10, 64, 64), (6, 64, 128), (10, 64, 64)]


def test_a_layer_is_timed_as_it_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """In int8 without the product that a frozen weight doesn't need, and without that of an input that needs no
    gradient; under autocast from a weight in float32; a large one on fewer rows."""
    frozen = LAYERS["frozen"]()
    shape: Any = LAYERS["bfloat16"]()
    assert shape.terms == ("torch.bfloat16", "torch.float32", False, True)
    ((products, seen),) = shape.matmuls
    monkeypatch.setitem(ENOUGH, "cpu", 1e6)
    large = MatmulsShape(((products, seen._replace(rows=10**9)),))
    for each in (frozen, shape, large):
        with counted(2):
            speed.runner(each, CPU, high=False)()
    with pytest.raises(RuntimeError, match="dtype"):
        shape.runner(CPU, high=True)()  # not under autocast, which unites the dtypes


def test_slower_experts_become_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential()
    model.add_module("experts", Experts(4, 64, 32))
    report = swap_linears(model, output_layer=None)
    index = torch.tensor([[0, 1], [2, 3], [0, 3]])
    model.experts(torch.randn(3, 64), index, torch.rand(3, 2)).sum().backward()  # type: ignore[operator]
    monkeypatch.setattr(speed, "times", lambda *_: Times(2.0, 1.0))
    slower = Slower()
    with pytest.warns(UserWarning, match="not faster on this cpu device for 1 of 1 layers .* 0 % of the multiplic"):
        slower.find(model, report)
    report = slower.apply(model, report)
    assert type(model.experts) is Experts
    assert "not experts: slower in int8 on this device (4 experts of 64 x 64 and 64 x 32, 6 rows: 0.50" in str(report)


def test_an_attention_becomes_plain_with_its_output_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a wide layer, which has most of the multiplications, stays in int8: no warning."""
    model: Any = nn.Sequential(nn.TransformerEncoderLayer(64, 2, 2048, batch_first=True))
    report = swap_linears(model, output_layer=None)
    model(torch.randn(2, 3, 64)).sum().backward()
    shapes = []

    def times(shape: Any, device: torch.device) -> Times:
        shapes.append(shape)
        return Times(2.0, 1.0) if len(shape.matmuls) > 1 else Times(1.0, 2.0)

    monkeypatch.setattr(speed, "times", times)
    slower = Slower()
    slower.find(model, report)
    report = slower.apply(model, report)
    assert len(shapes) == 3, "the attention, and two linear layers"
    assert report.swapped == ("0.linear1", "0.linear2")
    attention = model[0].self_attn
    assert (type(attention).__name__, type(attention.out_proj).__name__) == (
        "MultiheadAttention", "NonDynamicallyQuantizableLinear",
    )  # fmt: skip
    model(torch.randn(2, 3, 64)).sum().backward()


def test_the_choice_outlasts_batches_of_other_sizes(measured: list[Any]) -> None:
    """Layers are timed after the first step, and never again."""
    plugin, model = Int8MixedPrecision(autocast="off", output_layer=None), nn.Sequential(nn.Linear(64, 64))
    plugin.convert_module(model)
    for rows in (3, 5):
        model(torch.randn(rows, 64)).sum().backward()
        plugin.leave_slower_layers()
    assert [shape.matmuls[0][1].rows for shape in measured if isinstance(shape, MatmulsShape)] == [3]
    assert type(model[0]) is Int8Linear


def test_layers_that_cannot_be_timed_stay_and_are_named(measured: list[Any]) -> None:
    plugin = Int8MixedPrecision(autocast="off", output_layer=None)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(32, 64))
    plugin.convert_module(model)
    model[0](torch.randn(3, 64)).sum().backward()
    plugin.leave_slower_layers()
    assert "note: 1: in int8 without having been timed, because they did not run" in str(plugin.report)
    assert len(measured) == 1


def test_layers_that_were_built_in_int8_stay(measured: list[Any]) -> None:
    plugin = Int8MixedPrecision(autocast="off", output_layer=None)
    model = nn.Sequential(Int8Linear(32, 64), nn.Linear(64, 64))
    plugin.convert_module(model)
    model(torch.randn(3, 32)).sum().backward()
    plugin.leave_slower_layers()
    assert type(model[0]) is Int8Linear
    assert len(measured) == 1


@pytest.mark.parametrize(("capability", "weak"), [((9, 0), False), ((10, 3), True)])
def test_a_gpu_whose_int8_is_weaker_than_fp8_is_named_once(
    capability: tuple[int, int], weak: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    peaks.weakness.cache_clear()
    plugin, model = Int8MixedPrecision(autocast="off", output_layer=None), nn.Sequential(nn.Linear(64, 64))
    plugin.device_type = "cuda"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        plugin.convert_module(model)
        plugin.convert_module(model)
    peaks.weakness.cache_clear()
    texts = [str(w.message) for w in said]
    assert len(texts) == weak
    assert all("compute capability 10.3 (B300): 0.15 POP/s, but 4.5 in fp8" in text for text in texts)
