"""An unmodified LightningCLI takes "int8-mixed", and finds by short names what it found before our import."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.plugins import CheckpointIO, Precision
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lowbit_lightning import Int8MixedPrecision, optim
from lowbit_lightning.callbacks import DeterministicResume, LowBitMonitor
from lowbit_lightning.precision import FabricInt8MixedPrecision

# Lightning's CLI calls jsonargparse by older names.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

QUIET = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_checkpointing=false"]
QUIET += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.max_steps=1"]


class Model(L.LightningModule):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, width), nn.Linear(width, 4))

    def training_step(self, x: Tensor, index: int) -> Tensor:
        return self.net(x).float().square().mean()

    def train_dataloader(self) -> Any:
        return DataLoader(torch.ones(4, 32), batch_size=4)  # type: ignore[arg-type]


class OwnTrainer(L.Trainer):
    """A subclass as people write them."""

    def __init__(self, extra: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)


@pytest.fixture(autouse=True)
def _command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    if foreign := sys.modules.get("bitsandbytes.optim.optimizer"):  # another test's: its names are those of torch
        monkeypatch.setattr(foreign.Optimizer8bit, "__subclasses__", classmethod(lambda cls: []), raising=False)
    monkeypatch.setattr("sys.argv", ["program"])  # LightningCLI warns where pytest's own arguments stand beside ours


def cli(*arguments: str, **settings: Any) -> LightningCLI:
    settings = {"run": False, "save_config_callback": None, "seed_everything_default": False, **settings}
    return LightningCLI(Model, args=[*QUIET, *arguments], **settings)


@pytest.mark.parametrize("trainer_class", [L.Trainer, OwnTrainer])
@pytest.mark.parametrize("mode", ["yaml", "omegaconf", "omegaconf+"])
@pytest.mark.parametrize("in_file", [False, True])
def test_the_string(tmp_path: Path, trainer_class: type, mode: str, in_file: bool) -> None:
    arguments = ["--trainer.precision=int8-mixed"]
    if in_file:
        (tmp_path / "config.yaml").write_text("trainer:\n  precision: int8-mixed\n")
        arguments = [f"--config={tmp_path / 'config.yaml'}"]
    made = cli(*arguments, trainer_class=trainer_class, parser_kwargs={"parser_mode": mode})
    assert type(made.trainer.precision_plugin) is Int8MixedPrecision


def test_other_values(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("--trainer.precision=bf16-mixed").trainer.precision == "bf16-mixed"
    assert cli("--trainer.precision=64").trainer.precision == "64-true"
    with pytest.raises(SystemExit):
        cli("--trainer.precision=int8-mixe")
    assert "int8-mixed" in capsys.readouterr().err  # among the values that are allowed


def test_fabric_as_a_class_in_a_config() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(L.Fabric, "fabric")
    made = parser.instantiate_classes(parser.parse_args(["--fabric.precision=int8-mixed", "--fabric.accelerator=cpu"]))
    assert isinstance(made.fabric._precision, FabricInt8MixedPrecision)
    with pytest.raises(ArgumentError, match="int8-mixed"):
        parser.parse_args(["--fabric.precision=int8-mixe"])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("AdamW", torch.optim.AdamW),
        ("torch.optim.AdamW", torch.optim.AdamW),
        ("lowbit_lightning.optim.AdamW", optim.AdamW),
        ("Lion", optim.Lion),
    ],
)
@pytest.mark.parametrize("in_file", [False, True])
def test_an_optimizer_by_name(tmp_path: Path, name: str, kind: type, in_file: bool) -> None:
    arguments = [f"--optimizer={name}", "--optimizer.lr=0.01"]
    if in_file:
        (tmp_path / "config.yaml").write_text(f"optimizer:\n  class_path: {name}\n  init_args:\n    lr: 0.01\n")
        arguments = [f"--config={tmp_path / 'config.yaml'}"]
    made = cli("--trainer.precision=int8-mixed", *arguments)
    made.trainer.fit(made.model)
    optimizer = made.trainer.optimizers[0]
    assert type(optimizer) is kind
    assert optimizer.param_groups[0]["lr"] == 0.01
    plugin: Any = made.trainer.precision_plugin
    assert plugin.report.swapped


def test_our_options_of_an_optimizer() -> None:
    made = cli("--optimizer=lowbit_lightning.optim.AdamW", "--optimizer.min_size=64", "--optimizer.bits=32")
    assert made.config["optimizer"]["init_args"]["bits"] == 32


def test_callbacks_in_a_file_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find(name, *a))
    (tmp_path / "config.yaml").write_text(
        "trainer:\n  callbacks:\n    - class_path: LowBitMonitor\n      init_args: {every_n_steps: 10}\n"
        "    - class_path: DeterministicResume\n"
    )
    callbacks = cli(f"--config={tmp_path / 'config.yaml'}").trainer.callbacks  # type: ignore[attr-defined]
    assert [c.picture for c in callbacks if isinstance(c, LowBitMonitor)] == [False]
    assert any(isinstance(c, DeterministicResume) for c in callbacks)


def subclasses(base: type) -> Iterator[type]:
    found: list[type] = type.__subclasses__(base)
    for cls in found:
        yield cls
        yield from subclasses(cls)


@pytest.mark.parametrize("base", [torch.optim.Optimizer, Precision, Strategy, CheckpointIO, Callback, nn.Module])
def test_short_names_are_no_more_ambiguous_than_before(base: type) -> None:
    """Of all kinds of classes that a config names: what others of the same name as ours were found by."""
    known = list(subclasses(base))
    ours = {cls.__name__ for cls in known if cls.__module__.startswith("lowbit_lightning.")}
    theirs = {cls.__name__ for cls in known if cls.__module__.startswith(("torch.", "lightning."))}
    assert ours
    if base in (torch.optim.Optimizer, Precision, Strategy):
        assert ours & theirs, "there are such names"
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(base, "it", required=False)
    ambiguous = []
    for name in sorted(ours & theirs):
        try:
            parser.parse_args([f"--it={name}"])
        except ArgumentError as error:  # of any kind: some need arguments
            if "Multiple subclasses" in str(error):
                ambiguous.append(str(error))
    assert not ambiguous
