"""Where LowBitMonitor's findings go: every logger, and a picture."""

from __future__ import annotations

import csv
import importlib.util
import logging
import re
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from support.monitored import Model, fit, quiet

from lowbit_lightning.callbacks import LowBitMonitor, picture
from lowbit_lightning.callbacks.quantization import PRODUCTS


def test_every_logger_gets_it(tmp_path: Path) -> None:
    loggers = [CSVLogger(tmp_path, "csv"), TensorBoardLogger(tmp_path, "board")]
    monitor = quiet(3, per_layer=True)
    best = ModelCheckpoint(tmp_path / "best", monitor="int8/forward/snr_min", every_n_train_steps=3)
    trainer = fit(Model(), tmp_path, monitor, best, logger=loggers, enable_checkpointing=True)
    loggers[0].save()
    with open(Path(str(loggers[0].log_dir), "metrics.csv"), newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("int8/forward/snr_min")]
    assert [int(row["step"]) for row in rows] == [0, 3]
    assert float(rows[-1]["int8/forward/snr_min"]) == pytest.approx(monitor.metrics["int8/forward/snr_min"].item())
    assert {"int8/grad_weight/snr/down", "int8/grad_input/underflow_max", "int8/forward/overflow_max"} <= set(rows[0])
    assert list(Path(str(loggers[1].log_dir)).glob("events*"))
    assert "int8/forward/snr_min" in trainer.callback_metrics
    assert "int8/forward/snr/up" not in trainer.callback_metrics
    assert Path(best.best_model_path).exists()


def test_a_picture_at_the_end(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, "csv")
    fit(Model(), tmp_path, LowBitMonitor(1), logger=logger)
    picture = Path(logger.log_dir, "int8_snr.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000
    assert not (tmp_path / "int8_snr.png").exists()
    fit(Model(), tmp_path, quiet())
    assert not (tmp_path / "int8_snr.png").exists()


def test_a_picture_of_a_run_that_failed(tmp_path: Path) -> None:
    class Fail(Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 3:
                raise RuntimeError("planted")

    model = Model()
    with pytest.raises(RuntimeError, match="planted"):
        fit(model, tmp_path, LowBitMonitor(1), Fail())
    assert (tmp_path / "int8_snr.png").read_bytes().startswith(b"\x89PNG")
    assert not model.up._forward_hooks
    assert not model.up._forward_pre_hooks


@pytest.mark.parametrize(("steps", "layers"), [(1, 1), (1, 3), (200, 150)])
def test_pictures_of_any_size_anywhere(steps: int, layers: int) -> None:
    snr = np.random.default_rng(0).uniform(10, 40, (steps, layers, 3))
    snr[0], snr[:, 0, 1] = np.nan, np.nan  # nothing measured in a step, nor of a product
    names = [f"blocks.{i}.mlp.down" for i in range(layers)]
    picture.draw("memory://pictures", range(steps), names, PRODUCTS, snr, None)
    with get_filesystem("memory://").open(f"memory://pictures/{picture.FILE}", "rb") as file:
        assert file.read().startswith(b"\x89PNG")


def test_a_picture_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.warns(UserWarning, match="could not write a picture into .*file"):
        fit(Model(), blocked, LowBitMonitor(1))


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One line says so, and the run goes on; who asked for a picture gets an error."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with caplog.at_level(logging.INFO):
        monitor = LowBitMonitor(1)
    said = [record.message for record in caplog.records if "LowBitMonitor" in record.message]
    assert len(said) == 1
    assert re.fullmatch(r"LowBitMonitor draws no picture: .*`pip install matplotlib`.*picture=False", said[0])
    with pytest.raises(ModuleNotFoundError, match=r"pip install matplotlib.*picture=False"):
        LowBitMonitor(picture=True)
    assert LowBitMonitor(picture=False).picture is False
    monkeypatch.undo()
    fit(Model(), tmp_path, monitor)
    assert monitor.metrics
    assert not (tmp_path / "int8_snr.png").exists()
