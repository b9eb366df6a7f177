"""What Lightning's own ModelSummary and ThroughputMonitor, and torch's FLOP counter, say of "int8-mixed"."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities import throughput
from lightning.fabric.utilities.throughput import measure_flops
from lightning.pytorch.callbacks import ThroughputMonitor, throughput_monitor
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.model_summary import ModelSummary
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lowbit_lightning import Int8MixedPrecision, convert
from lowbit_lightning.precision import register

STEPS = 4


class Model(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.Linear(64, 4))
        self.flops_per_batch = 1000

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).float().square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-2)


def fit(model: Model, folder: Path, *callbacks: Any, precision: Any = "int8-mixed", **settings: Any) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu",
        precision=precision,
        max_steps=STEPS,
        log_every_n_steps=1,
        callbacks=list(callbacks),
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        **{"logger": False, **settings},
    )
    trainer.fit(model, DataLoader(TensorDataset(torch.randn(STEPS * 8, 64)), 8))
    return trainer


# -- ModelSummary ----------------------------------------------------------------------------------------------------


class Summary(L.Callback):
    """Reads the size as ``fit``'s own summary computes it, under the Trainer's precision."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.size = ModelSummary(pl_module).model_size


@pytest.mark.parametrize("layers_in_bf16", [0, 1, 3])
def test_a_summary_gives_the_size_of_the_parameters(tmp_path: Path, layers_in_bf16: int) -> None:
    model, summary = Model(), Summary()
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    for linear in linears[:layers_in_bf16]:
        linear.to(torch.bfloat16)
    # Warnings are errors: nothing is said of an unknown precision.
    model.trainer = L.Trainer(accelerator="cpu", precision="int8-mixed", logger=False)  # type: ignore[arg-type]
    exact = sum(p.nbytes for p in model.parameters()) * 1e-6
    assert ModelSummary(model).model_size == pytest.approx(exact, rel=1e-9)
    if not layers_in_bf16:
        fit(Model(), tmp_path, summary, enable_model_summary=True)
        assert summary.size == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "16-true", "bf16-mixed", "64-true", None])
@pytest.mark.filterwarnings("ignore:Precision .* is not supported by the model summary")
def test_other_precisions_are_lightnings(precision: Any) -> None:
    """Lightning 2.5 takes all but "64", "32", "16" and "bf16" for 32 bits; 2.6 warns of those that it does not know."""
    model = Model()
    if precision is not None:
        model.trainer = L.Trainer(accelerator="cpu", precision=precision, logger=False)
    theirs = ModelSummary.__init__.__wrapped__  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelSummary, "__init__", theirs)
        expected = ModelSummary(model).model_size
    assert ModelSummary(model).model_size == expected > 0


# -- ThroughputMonitor -----------------------------------------------------------------------------------------------

PEAKS = {"NVIDIA A100-SXM4-80GB": 624e12, "NVIDIA H100 80GB HBM3": 1978.9e12, "NVIDIA GeForce RTX 4090": 660.6e12}


def on(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let Lightning look up its own table as if it ran on this GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    table = throughput.get_available_flops
    for module in (throughput, throughput_monitor):
        monkeypatch.setattr(module, "get_available_flops", lambda device, dtype: table(torch.device("cuda"), dtype))


def logged(logger: CSVLogger) -> list[dict[str, float]]:
    """The rows with a rate of operations."""
    with open(Path(logger.log_dir, "metrics.csv"), newline="") as file:
        rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    return [row for row in rows if "train/device/flops_per_sec" in row]


@pytest.mark.parametrize("name", PEAKS)
def test_utilisation_is_of_the_int8_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    on(monkeypatch, name)
    monitor, logger = ThroughputMonitor(lambda batch: len(batch[0]), window_size=2), CSVLogger(tmp_path)
    fit(Model(), tmp_path, monitor, logger=logger, enable_model_summary=False)
    assert monitor.available_flops == PEAKS[name]
    metrics = logged(logger)
    assert metrics
    for row in metrics:
        assert row["train/device/mfu"] == pytest.approx(row["train/device/flops_per_sec"] / PEAKS[name])

    fabric = L.Fabric(accelerator="cpu", precision="int8-mixed")  # type: ignore[arg-type]
    fabric.launch()
    assert throughput.ThroughputMonitor(fabric).available_flops == PEAKS[name]


def test_a_gpu_without_int8_has_no_utilisation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "Tesla V100-SXM2-16GB")
    monitor = ThroughputMonitor(lambda batch: len(batch[0]))
    with pytest.warns(UserWarning, match="does not support torch.int8"):
        fit(Model(), tmp_path, monitor, enable_model_summary=False)
    assert monitor.available_flops is None


def test_a_cpu_has_no_utilisation(tmp_path: Path) -> None:
    monitor, logger = ThroughputMonitor(lambda batch: len(batch[0]), window_size=2), CSVLogger(tmp_path)
    fit(Model(), tmp_path, monitor, logger=logger, enable_model_summary=False)
    keys = {key for row in logged(logger) for key in row}
    assert monitor.available_flops is None
    assert "train/device/flops_per_sec" in keys
    assert not any("mfu" in key for key in keys)


def test_other_plugins_keep_their_dtype() -> None:
    for precision, dtype in (("32-true", torch.float32), ("bf16-mixed", torch.bfloat16), ("64-true", torch.float64)):
        trainer = L.Trainer(accelerator="cpu", precision=precision, logger=False)  # type: ignore[arg-type]
        assert throughput_monitor._plugin_to_compute_dtype(trainer.precision_plugin) is dtype
    assert throughput_monitor._plugin_to_compute_dtype(Int8MixedPrecision()) is torch.int8


def test_registering_twice_wraps_once() -> None:
    before = ModelSummary.__init__, throughput._plugin_to_compute_dtype
    register()
    assert (ModelSummary.__init__, throughput._plugin_to_compute_dtype) == before


# -- counted operations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"save_inputs": "high"},
        {"forward": "high"},
        {"grad_input": "high"},
        {"grad_weight": "high"},
        {"grad_input": "high", "grad_weight": "high"},
    ],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_int8_products_count_like_the_matmuls_they_replace(settings: dict[str, Any], frozen: bool) -> None:
    def counted(model: nn.Module) -> int:
        model[0].weight.requires_grad_(not frozen)  # type: ignore[index]
        return measure_flops(model, lambda: model(torch.randn(8, 64)), torch.sum)

    plain, int8 = (nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 40)) for _ in range(2))
    convert.swap_linears(int8, output_layer=None, **settings)
    # the forward of both, both gradients of the second, and, unless it is frozen, the weight's of the first
    first, second = 2 * 8 * 64 * 48, 2 * 8 * 48 * 40
    assert counted(int8) == counted(plain) == (2 - frozen) * first + 3 * second
