"""``RunReport``: a page of HTML about a run, in the run's folder.

How it works
    Each optimizer step appends a few numbers to a list; a loss stays a tensor on its device. From time to time the list
    is emptied into curves of bounded size (``lowbit_command.report.series``), with one copy from the device for all of
    it. What concerns the whole run, such as memory by kind and the use of codes, is gathered when training ends.
    ``report.json`` and ``report.html`` are written then, and every ``every_n_seconds`` before, each under another name
    that is then renamed: what lies there is whole at any time, also after ``kill -9``.

    The curves are part of the checkpoint, so that a resumed run continues them, in the same folder or another.

Interactions
    - Only rank 0 keeps and writes anything. No rank waits for another.
    - An exception or Ctrl-C ends the report with what there is and the reason. An error of the report itself is a
      warning and never ends a run.
    - Logged metrics get a curve each, up to ``MOST_CURVES``. Layers' errors are those of ``LowBitMonitor``, if the run
      has one, and of the weights' rounding otherwise.
    - Manual optimization: the loss is what ``training_step`` returns, or a logged metric that is named so.

Limitations
    - ``fast_dev_run`` writes nothing. Throughput counts the first tensor of a batch.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lowbit_command.report.page import page
from lowbit_command.report.record import (
    FAILED,
    FILE,
    FINISHED,
    INTERRUPTED,
    PAGE,
    RUNNING,
    VERSION,
    Record,
    load,
    plain,
)
from lowbit_lightning import kernels
from lowbit_lightning.callbacks import observed

PENDING = 100
"""Steps that are kept before they go into the curves."""
MOST_CURVES = 12
LOSS, SPEED, TOKENS, RATE = "loss", "samples per second", "tokens per second", "learning rate"
_LEFT_OUT = ("int8/", "pages/", "epoch", "step")


class RunReport(Callback):
    """Writes ``report.html`` and ``report.json`` into the run's folder: the logger's, or ``default_root_dir``.

    Args:
        every_n_seconds: how often the files are written while training runs. They are written in any case when it
            ends, fails or is stopped.
        name: of the run. None: the name of the folder that holds the run's folder, as in ``runs/NAME/DATE-TIME``.

    ``record``: the ``lowbit_command.report.Record`` of the run; None on ranks other than 0, and before training.

    Raises:
        ValueError: if ``every_n_seconds`` is not positive.
    """

    def __init__(self, every_n_seconds: float = 60.0, name: str | None = None) -> None:
        if not every_n_seconds > 0:
            raise ValueError(f"every_n_seconds must be positive, got {every_n_seconds!r}")
        self.every_n_seconds, self.name = every_n_seconds, name
        self.record: Record | None = None
        self._folder: Path | None = None
        self._trainer: L.Trainer | None = None  # while it trains
        self._restored: Mapping[str, Any] | None = None
        self._pending: list[tuple[int, float, list[Any], Any, int, int]] = []
        self._losses: list[Any] = []
        self._samples = self._tokens = self._step = self._gradients = 0
        self._start = self._before = self._last = self._written = 0.0
        self._calls: dict[tuple[str, str], int] = {}
        self._metric_step = -1

    # -- the run ------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = trainer.log_dir or trainer.default_root_dir  # asks the other ranks: on all of them
        self.record = self._trainer = None
        if getattr(trainer, "fast_dev_run", False) or not trainer.is_global_zero:
            return
        self._pending, self._losses, self._samples, self._tokens = [], [], 0, 0
        self._gradients, self._step, self._calls = 0, trainer.global_step, kernels.calls()
        try:
            self._begin(trainer, pl_module, Path(folder))
        except OSError as error:
            rank_zero_warn(f"RunReport writes nothing: {folder} cannot be used ({error})")
            self.record = None
        self._start = self._last = self._written = time.perf_counter()
        self._before = self.record.seconds if self.record else 0.0

    def _begin(self, trainer: L.Trainer, module: L.LightningModule, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        record = self._earlier(folder, trainer.global_step)
        place = folder.resolve()
        record.name = self.name or place.parent.name or place.name
        record.folder = "/".join(place.parts[-2:])
        now = _now()
        record.started = record.started or now
        record.status, record.error, record.ended, record.notes = RUNNING, {}, "", []
        record.sessions.append({"step": trainer.global_step, "started": now})
        device = trainer.strategy.root_device
        record.environment = plain(observed.environment(device, trainer.world_size))
        record.config = plain(observed.configuration(trainer, module, folder))
        record.linear = observed.linear(module)
        record.previous = _previous(place)
        self.record, self._folder, self._trainer = record, folder, trainer

    def _earlier(self, folder: Path, step: int) -> Record:
        """The record that is continued: the checkpoint's, or that of this folder; a new one for a new run."""
        found = Record()
        if step and self._restored:
            found = Record.of(self._restored)
        elif step and (folder / FILE).exists():
            try:
                found = load(folder / FILE)
            except ValueError as error:
                rank_zero_warn(f"RunReport begins anew: {error}")
        self._restored = None
        found.series = {name: series.until(step) for name, series in found.series.items()}
        known = [series.seconds[-1] for series in found.series.values() if series.seconds]
        found.seconds = max(known, default=0.0)
        found.sessions = [session for session in found.sessions if session["step"] < step]
        return found

    def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
        if self.record is not None and not self._gradients:
            held = [p.grad for o in trainer.optimizers for group in o.param_groups for p in group["params"]]
            self._gradients = observed.nbytes(grad for grad in held if grad is not None)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.record is None:
            return
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self._losses.append(loss.detach())  # Lightning has divided it by the number of accumulated batches
        samples, tokens = _sizes(batch)
        self._samples += samples
        self._tokens += tokens
        step = trainer.global_step
        if step == self._step:
            return  # more batches to accumulate
        self._step, now = step, time.perf_counter()
        rate = trainer.optimizers[0].param_groups[0].get("lr") if trainer.optimizers else None
        rate = rate.detach().clone() if isinstance(rate, Tensor) else rate
        self._pending.append((step, now, self._losses, rate, self._samples, self._tokens))
        self._losses, self._samples, self._tokens = [], 0, 0
        if len(self._pending) >= PENDING or now - self._written > self.every_n_seconds:
            self._guarded(self._flush, trainer)
            self._guarded(self._metrics, trainer)
            if now - self._written > self.every_n_seconds:
                self._guarded(self._write)

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        if self.record is not None and not trainer.sanity_checking:
            self._guarded(self._flush, trainer)
            self._guarded(self._metrics, trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._finish(trainer, FINISHED)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if self.record is None or self.record.status != RUNNING:
            return
        if isinstance(exception, KeyboardInterrupt):
            self._finish(trainer, INTERRUPTED)
            return
        said = "".join(traceback.format_exception(type(exception), exception, exception.__traceback__))
        text = str(exception).strip() or "(it says nothing)"
        self.record.error = {"type": type(exception).__name__, "message": text[:2000], "traceback": said[-8000:]}
        self._finish(trainer, FAILED)

    # -- curves -------------------------------------------------------------------------------------------------------

    def _flush(self, trainer: L.Trainer) -> None:
        """Empty the list of steps into the curves."""
        assert self.record is not None
        pending, self._pending = self._pending, []
        losses = _numbers([loss for _, _, found, *_ in pending for loss in found])
        parts = trainer.accumulate_grad_batches if trainer.lightning_module.automatic_optimization else 1
        at = 0
        for step, now, found, rate, samples, tokens in pending:
            seconds = self._before + now - self._start
            taken, self._last = now - self._last, now
            if found:
                mean = parts * sum(losses[at : at + len(found)]) / len(found)
                self.record.curve(LOSS).add(step, seconds, mean)
            at += len(found)
            if taken > 0:
                for name, number in ((SPEED, samples), (TOKENS, tokens)):
                    if number:
                        self.record.curve(name).add(step, seconds, number * trainer.world_size / taken)
            if rate is not None:
                self.record.curve(RATE).add(step, seconds, float(rate))
            self.record.steps, self.record.seconds = step, seconds

    def _metrics(self, trainer: L.Trainer) -> None:
        """A point for every metric that was logged. Not where ranks may have parted, at the end: a metric that is
        still to be computed would wait for them."""
        assert self.record is not None
        step = trainer.global_step
        if step == self._metric_step:
            return
        self._metric_step = step
        for name, value in trainer.callback_metrics.items():
            if name.startswith(_LEFT_OUT) or (name == LOSS and LOSS in self.record.series):
                continue
            if name in self.record.series or len(self.record.series) < MOST_CURVES:
                self.record.curve(name).add(step, self.record.seconds, float(value))

    # -- the end ------------------------------------------------------------------------------------------------------

    def _finish(self, trainer: L.Trainer, status: str) -> None:
        record = self.record
        if record is None:
            return
        record.status, record.ended, self._trainer = status, _now(), None
        module, optimizers = trainer.lightning_module, trainer.optimizers
        self._guarded(self._flush, trainer)
        if trainer.world_size == 1:
            self._guarded(self._metrics, trainer)
        for gather in (
            lambda: setattr(record, "ops", observed.ops(self._calls)),  # before the next ones call ops themselves
            lambda: self._memory(trainer, record),
            lambda: setattr(record, "codes", observed.codes(optimizers)),
            lambda: self._layers(trainer, module, record),
        ):
            self._guarded(gather)
        self._guarded(self._write)

    def _memory(self, trainer: L.Trainer, record: Record) -> None:
        rows = observed.memory(trainer.lightning_module, trainer.optimizers, self._gradients)
        record.peak, rest = observed.peak(trainer.strategy.root_device, rows)
        record.memory = rows + rest

    def _layers(self, trainer: L.Trainer, module: L.LightningModule, record: Record) -> None:
        record.layers, record.layers_from = observed.layers(trainer, module)

    def _guarded(self, act: Any, *arguments: Any) -> None:
        """Run a part of the report. It must not end a run; a device that has failed may refuse anything."""
        try:
            with torch.no_grad():
                act(*arguments)
        except Exception as error:
            assert self.record is not None
            note = f"A part of this report is missing: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
            if note not in self.record.notes:
                self.record.notes.append(note)
                rank_zero_warn(f"RunReport: {note}")

    def _write(self) -> None:
        assert self.record is not None
        assert self._folder is not None
        self._written = time.perf_counter()
        for name, text in ((FILE, self.record.text()), (PAGE, page(self.record))):
            temporary = self._folder / f".{name}.writing"
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, self._folder / name)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        if self.record is None:
            return {}
        if self._trainer is not None:
            self._guarded(self._flush, self._trainer)
        kept = ("name", "started", "sessions", "seconds", "steps")
        series = {name: curve.to_dict() for name, curve in self.record.series.items()}
        return {"version": VERSION, **{name: getattr(self.record, name) for name in kept}, "series": series}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict or None


def _now() -> str:
    return datetime.now().isoformat(timespec="seconds")


def _numbers(tensors: list[Tensor]) -> list[float]:
    """The tensors' values, with one copy from each device."""
    if not tensors:
        return []
    if len({t.device for t in tensors}) == 1:
        return torch.stack([t.reshape(()).double() for t in tensors]).tolist()
    return [float(t) for t in tensors]


def _sizes(batch: Any) -> tuple[int, int]:
    """Samples of a batch, and tokens where its first tensor is a matrix of integers."""
    for _ in range(4):
        if isinstance(batch, Mapping):
            batch = next(iter(batch.values()), None)
        elif isinstance(batch, (list, tuple)):
            batch = batch[0] if batch else None
        else:
            break
    if not isinstance(batch, Tensor) or batch.ndim == 0:
        return 0, 0
    tokens = batch.numel() if batch.ndim == 2 and batch.dtype in (torch.int64, torch.int32) else 0
    return batch.shape[0], tokens


def _previous(folder: Path) -> dict[str, Any]:
    """Folder and configuration of the last run that lies beside this one."""
    found = []
    for path in folder.parent.glob(f"*/{FILE}"):
        if path.parent != folder:
            try:
                found.append((path.stat().st_mtime, path))
            except OSError:
                continue
    if not found:
        return {}
    path = max(found)[1]
    try:
        record = load(path)
    except ValueError:
        return {}
    return {"folder": "/".join(path.parent.parts[-2:]), "config": record.config}
