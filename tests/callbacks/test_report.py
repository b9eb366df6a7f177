"""RunReport beside real runs: what it records, and that nothing it meets ends or changes a run."""

from __future__ import annotations

import importlib.metadata
import json
import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from support.monitored import BATCH, BATCHES, FEATURES, Model, data
from torch import Tensor

from lowbit_command.report.record import FILE, PAGE, Record, load
from lowbit_lightning import optim
from lowbit_lightning.callbacks import LowBitMonitor, RunReport, observed


def run(
    folder: Path,
    module: L.LightningModule,
    *callbacks: Any,
    steps: int = 8,
    checkpoint: str | None = None,
    **options: Any,
) -> None:
    """A training run with its report in a folder."""
    settings: dict[str, Any] = {
        **{"max_steps": steps, "accelerator": "cpu", "logger": False, "default_root_dir": folder},
        **{"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False},
    }
    trainer = L.Trainer(**settings | options, callbacks=[*callbacks])
    trainer.fit(module, data(), ckpt_path=checkpoint)


class Logging(Model):
    """Logs a metric, and fails at a step if it is told to."""

    def __init__(self, at: int = -1, error: BaseException | None = None) -> None:
        super().__init__()
        self.at, self.error = at, error

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if self.global_step == self.at and self.error is not None:
            raise self.error
        loss = super().training_step(batch, batch_idx)
        self.log("accuracy", loss * 0 + 0.25)
        return loss


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Record, str, Model]:
    """The record as it was written, the page and the model of a run in int8 with a monitor."""
    folder, module = tmp_path_factory.mktemp("runs") / "name" / "one", Logging()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LOWBIT_LIGHTNING_BACKEND", raising=False)
        run(folder, module, LowBitMonitor(every_n_steps=4, picture=False), RunReport(), precision="int8-mixed")
    return load(folder), (folder / PAGE).read_text(), module


def test_curves_are_what_was_trained(report: tuple[Record, str, Model]) -> None:
    record, page, module = report
    assert record.status == "finished"
    assert record.steps == 8
    assert record.series["loss"].steps == list(range(1, 9))
    assert record.series["loss"].mean == pytest.approx(module.losses, rel=1e-4)
    assert record.series["learning rate"].mean == [1e-3] * 8
    assert record.series["accuracy"].last() == 0.25
    assert all(v is not None and v > 0 for v in record.series["samples per second"].mean)
    assert 0 < record.series["loss"].seconds[0] < record.seconds < 60
    assert "Loss by step" in page


def test_memory_is_counted_to_the_byte(report: tuple[Record, str, Model]) -> None:
    record, _, module = report
    parameters = sum(p.numel() for p in module.parameters())
    sizes: dict[str, int] = {}
    for row in record.memory:
        sizes[row["kind"]] = sizes.get(row["kind"], 0) + row["bytes"]
    assert sizes["parameters"] == sizes["gradients"] == 4 * parameters
    coded = 2 * 128 * FEATURES  # up and down; rows of 64 and 128 elements have one scale each
    assert sizes["8-bit states"] == 2 * (coded + 4 * (128 + FEATURES))
    assert sizes["32-bit states"] == 2 * 4 * (parameters - coded) + 4 * 6
    assert record.peak["of"] == "process"


def test_low_bit_arithmetic_is_described(report: tuple[Record, str, Model]) -> None:
    record, page, _ = report
    assert record.linear == {"int8": [2, 2 * 128 * FEATURES], "high": [1, 4 * FEATURES]}
    assert set(record.layers) == {"up", "down"}
    assert set(record.layers["down"]) == {"forward", "grad_input", "grad_weight"}
    assert all(30 < snr < 60 for found in record.layers.values() for snr in found.values())
    assert "the LowBitMonitor's sample at step 4" in page
    assert {name: sum(told["counts"]) for name, told in record.codes.items()} == dict.fromkeys(
        ("exp_avg", "exp_avg_sq"), 2 * 128 * FEATURES
    )
    calls = {(op, backend): n for op, backend, n in record.ops}
    assert calls["int8_matmul", "cpu"] == 8 * 5, "three products each, but no gradient for the input of the first"


def test_configuration_and_environment(report: tuple[Record, str, Model]) -> None:
    record, page, _ = report
    assert record.name == "name"
    assert record.config["trainer"]["precision"] == "int8-mixed"
    assert record.config["optimizer"]["lr"] == 1e-3
    assert record.environment["packages"]["torch"] == importlib.metadata.version("torch")
    assert record.previous == {}
    assert not record.notes
    assert "name/one" in page


def test_a_run_is_the_same_with_and_without(tmp_path: Path) -> None:
    torch.manual_seed(3)
    plain, watched = Model(), Model()
    run(tmp_path / "a", plain)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    run(tmp_path / "b", watched, RunReport())
    assert watched.losses == plain.losses
    assert len(state) == len(torch.get_rng_state())


def test_differences_to_the_previous_run_and_weights_without_a_monitor(tmp_path: Path) -> None:
    class Faster(Model):
        def configure_optimizers(self) -> Any:
            return optim.AdamW(self.parameters(), lr=3e-3, min_size=1024)

    run(tmp_path / "1", Model(), RunReport(), steps=2)
    run(tmp_path / "2", Faster(), RunReport(name="faster"), steps=2, precision="int8-mixed")
    record = load(tmp_path / "2")
    assert record.name == "faster"
    assert record.previous["folder"].endswith("/1")
    assert record.layers_from.startswith("of the weights' rounding")
    assert all(30 < found["weight"] < 60 for found in record.layers.values())
    page = (tmp_path / "2" / PAGE).read_text()
    for words in ("optimizer.lr", "0.001", "0.003", "trainer.precision", "int8-mixed"):
        assert words in page.partition("Configuration</summary>")[0], words


def test_paged_states_are_a_kind_of_their_own(tmp_path: Path) -> None:
    class Paged(Model):
        def configure_optimizers(self) -> Any:
            return optim.AdamW(self.parameters(), lr=1e-3, min_size=1024, paged="disk")

    run(tmp_path, Paged(), RunReport(), steps=2)
    record = load(tmp_path)
    assert not record.notes
    assert sum(row["bytes"] for row in record.memory if row["kind"] == "paged states") >= 2 * 2 * 128 * FEATURES
    assert "paged states" in (tmp_path / PAGE).read_text()


def test_the_saved_config_of_a_run_is_used(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("trainer: {max_steps: 2}\nvars: {width: 64}\n")
    run(tmp_path, Model(), RunReport(), steps=2)
    assert load(tmp_path).config == {"trainer": {"max_steps": 2}, "vars": {"width": 64}}


@pytest.mark.parametrize(("error", "status", "words"), [
    (ValueError("wrong <shape>"), "failed", "ValueError</b> after step 5: wrong &lt;shape&gt;"),
    (KeyboardInterrupt(), "interrupted", "Stopped by hand</b> after step 5"),
])  # fmt: skip
def test_a_run_that_ends_early_has_its_report(tmp_path: Path, error: BaseException, status: str, words: str) -> None:
    with pytest.raises((ValueError, SystemExit, KeyboardInterrupt)):
        run(tmp_path, Logging(5, error), RunReport())
    record = load(tmp_path)
    assert record.status == status
    assert record.series["loss"].steps == [1, 2, 3, 4, 5]
    assert record.memory
    page = (tmp_path / PAGE).read_text()
    assert words in page
    assert ("Traceback" in page) == (status == "failed")


@pytest.mark.parametrize("same_folder", [True, False])
def test_a_resumed_run_goes_on(tmp_path: Path, same_folder: bool) -> None:
    first, second = tmp_path / "1", tmp_path / ("1" if same_folder else "2")
    keep: dict[str, Any] = {"every_n_train_steps": 6, "save_top_k": -1, "filename": "at-{step}"}
    run(first, Model(), RunReport(), ModelCheckpoint(tmp_path / "kept", **keep), enable_checkpointing=True)
    before, module = load(first), Model()
    (kept,) = (tmp_path / "kept").iterdir()
    checkpoint = str(kept.rename(tmp_path / "step-6.ckpt"))  # Lightning warns of a folder that is not empty
    again = ModelCheckpoint(tmp_path / "kept", **keep)
    run(second, module, RunReport(), again, steps=12, checkpoint=checkpoint, enable_checkpointing=True)
    record = load(second)
    assert record.series["loss"].steps == list(range(1, 13)), "steps 7 and 8 of the first run are not of this one"
    assert record.series["loss"].mean[:6] == before.series["loss"].mean[:6]
    assert record.series["loss"].mean[6:] == pytest.approx(module.losses, rel=1e-4)
    assert [session["step"] for session in record.sessions] == [0, 6]
    assert record.series["loss"].seconds == sorted(record.series["loss"].seconds)


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    module = Model()
    run(tmp_path, module, RunReport(), steps=3, accumulate_grad_batches=2)
    found = load(tmp_path).series["loss"]
    assert found.steps == [1, 2, 3]
    assert found.mean == pytest.approx([sum(module.losses[i : i + 2]) / 2 for i in (0, 2, 4)], rel=1e-4)


def test_manual_optimization(tmp_path: Path) -> None:
    class Manual(Model):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
            optimizer = self.optimizers()
            assert not isinstance(optimizer, list)
            loss = super().training_step(batch, batch_idx)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.log("loss", loss)

    run(tmp_path, Manual(), RunReport(), steps=3)
    record = load(tmp_path)
    assert record.status == "finished"
    assert record.series["loss"].steps == [3], "what was logged last"


def test_what_fails_inside_never_ends_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(observed, "memory", refuse)
    with pytest.warns(UserWarning, match="A part of this report is missing: RuntimeError: CUDA error"):
        run(tmp_path, Model(), RunReport(), steps=2)
    record = load(tmp_path)
    assert record.status == "finished"
    assert record.codes
    assert "CUDA error" in record.notes[0]


def test_an_unusable_folder_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    module = Model()
    with pytest.warns(UserWarning, match="RunReport writes nothing"):
        run(tmp_path / "file", module, RunReport(), steps=2)
    assert len(module.losses) == 2


def test_nothing_is_written_by_other_ranks_or_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, Model(), RunReport(), fast_dev_run=True)
    monkeypatch.setattr(L.Trainer, "is_global_zero", False)
    other = RunReport()
    run(tmp_path, Model(), other, steps=2)
    assert other.record is None
    assert other.state_dict() == {}
    assert not [*tmp_path.glob("report*")]


def test_files_are_written_while_training_runs(tmp_path: Path) -> None:
    class Looks(Model):
        seen: Record | None = None

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            if (tmp_path / FILE).exists():
                self.seen = load(tmp_path)
            return super().training_step(batch, batch_idx)

    module = Looks()
    run(tmp_path, module, RunReport(every_n_seconds=1e-6), steps=3)
    assert module.seen is not None
    assert module.seen.status == "running"
    assert module.seen.steps == 2
    assert not [*tmp_path.glob(".*")], "no temporary file is left"


def test_a_step_costs_microseconds() -> None:
    """Of processor time, in the loop that appends and the flush that empties: 2000 steps."""
    callback = RunReport(every_n_seconds=1e9)
    callback.record = Record()
    trainer: Any = SimpleNamespace(
        global_step=0,
        world_size=1,
        callback_metrics={},
        accumulate_grad_batches=1,
        lightning_module=SimpleNamespace(automatic_optimization=True),
        optimizers=[SimpleNamespace(param_groups=[{"lr": 0.1}])],
    )
    outputs, batch = {"loss": torch.tensor(1.5)}, [torch.zeros(BATCH, FEATURES)]
    start = time.process_time()
    for step in range(2000):
        trainer.global_step = step + 1
        callback.on_train_batch_end(trainer, None, outputs, batch, step)  # type: ignore[arg-type]
    cost = (time.process_time() - start) / 2000
    assert callback.record.series["loss"].steps[-1] == 2000
    assert cost < 200e-6, f"{1e6 * cost:.0f} microseconds"


def test_arguments_are_checked() -> None:
    for bad in (0, -1, math.nan):
        with pytest.raises(ValueError, match="every_n_seconds must be positive, got"):
            RunReport(every_n_seconds=bad)


def test_batches_of_all_kinds_are_counted() -> None:
    from lowbit_lightning.callbacks.report import _sizes

    tokens, x = torch.zeros(4, 7, dtype=torch.long), torch.zeros(3, 2)
    assert _sizes({"input_ids": tokens, "mask": x}) == (4, 28)
    assert _sizes([(x, tokens)]) == (3, 0)
    assert _sizes(["text"]) == _sizes([]) == _sizes(None) == _sizes(torch.tensor(1)) == (0, 0)


def test_the_record_is_json_of_plain_values(tmp_path: Path) -> None:
    class Diverges(Model):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * (math.nan if batch_idx == 2 else 1)

    run(tmp_path, Diverges(), RunReport(), steps=4)
    told = json.loads((tmp_path / FILE).read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert told["series"]["loss"]["nonfinite"] == [3, 4]
    assert "not finite first at step 3" in (tmp_path / PAGE).read_text()
    assert BATCHES > 4
