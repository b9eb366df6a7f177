"""``lowbit fit`` and the other loops: run folders, resuming, and mistakes that show when a run is set up."""

from __future__ import annotations

import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import TQDMProgressBar
from support.configs import CONFIG, write

from lowbit_lightning import cli


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the small config was trained once."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write(folder)
        assert cli.main(["fit", "--config", "small.yaml"]) == 0
    return folder


@pytest.fixture
def folder(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(trained)
    return trained


def run(*arguments: str) -> int:
    return cli.main(["fit", "--config", "small.yaml", *arguments])


def folders(root: Path) -> list[Path]:
    return sorted((root / "runs" / "small").iterdir())


def test_a_run_folder_has_all_of_a_run(folder: Path) -> None:
    found = folders(folder)[0]
    assert (found / "source" / "small.yaml").read_text() == CONFIG
    config = yaml.safe_load((found / "config.yaml").read_text())
    assert config["data"]["init_args"]["batches"] == 4
    assert config["optimizer"]["class_path"] == "lowbit_lightning.optim.family.AdamW"
    assert config["trainer"]["gradient_clip_val"] is None
    packages = json.loads((found / "environment.json").read_text())["packages"]
    assert packages["torch"] == importlib.metadata.version("torch")
    assert "small" in (found / "report.html").read_text()
    ended = json.loads((found / "run.json").read_text())
    assert (ended["status"], ended["steps"], ended["command"]) == ("done", 4, "fit")
    assert ended["metrics"]["train_loss"] > 0
    assert (found / "metrics.csv").read_text().count("\n") > 4
    saved = torch.load(found / "checkpoints" / "last.ckpt", weights_only=True)
    states = saved["optimizer_states"][0]["state"]
    assert {entry.dtype for state in states.values() for name, entry in state.items() if name.endswith("codes")} == {
        torch.uint8
    }


def test_the_saved_config_runs_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = folders(folder)[0] / "config.yaml"
    assert cli.main(["fit", "--config", str(saved), "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(saved.read_text())


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_resume_goes_on_and_the_config_holds(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = folders(folder)[0]
    validation = ["trainer.val_check_interval=5", "data.batches=9"]  # one more step follows the last validation
    assert run("--resume", "trainer.max_steps=6", "optimizer.lr=0.5", "optimizer.weight_decay=0.25", *validation) == 0
    printed = capsys.readouterr()
    assert f"from {first.relative_to(folder) / 'checkpoints' / 'last.ckpt'}" in printed.out
    listed = [line.strip() for line in printed.err.splitlines() if " there, " in line]
    assert "optimizer.init_args.lr: 0.0003 there, 0.5 here" in listed
    assert "trainer.max_steps: 4 there, 6 here" in listed
    second = folders(folder)[-1]
    ended = json.loads((second / "run.json").read_text())
    assert (ended["steps"], ended["status"]) == (6, "done")
    assert first.name in ended["resumed_from"]
    saved = torch.load(second / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 6
    group: Any = saved["optimizer_states"][0]
    assert group["param_groups"][0]["initial_lr"] == 0.5
    assert group["param_groups"][0]["weight_decay"] == 0.25


def test_validate_takes_the_newest_checkpoint(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["validate", "--config", "small.yaml", "--resume"]) == 0
    assert "val_loss" in json.loads((folders(folder)[-1] / "run.json").read_text())["metrics"]
    assert cli.main(["predict", "--config", "small.yaml"]) == 0
    assert "no checkpoint is given" in capsys.readouterr().err
    assert torch.load(folders(folder)[-1] / "predictions.pt")[0].shape == (2, 16)


def test_resuming_a_run_that_is_done_says_so(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainers: list[Any] = []
    monkeypatch.setattr("lightning.Trainer.fit", lambda trainer, *_, **__: trainers.append(trainer))
    first = folders(folder)[0] / "checkpoints" / "last.ckpt"
    run("--ckpt_path", str(first), "trainer.enable_progress_bar=true")
    assert "nothing is left to train: it has done all 4 steps" in capsys.readouterr().err
    assert type(trainers[0].progress_bar_callback) is TQDMProgressBar, "rich's prints Epoch 0/-2"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["--resume", "model.width=64"],
            r"ckpt_path=runs/small/.*/last.ckpt: it holds another model: tokens.weight is \[256, 32\] there, "
            r"\[256, 64\] here \(.*"
            r"model.init_args.width: 32 there, 64 here\)",
        ),
        (
            ["--resume", "trainer.max_steps=3", "data.batches=4"],
            r"trainer.max_steps=3: runs/small/.*/last.ckpt has already done \d steps; give more to go on",
        ),
        (["--resume", "name=other"], r"--resume: no run of runs/other to go on with: it has none; leave --resume out"),
        (["--ckpt_path", "nowhere.ckpt"], r"ckpt_path=nowhere.ckpt: no such file or folder"),
        (["--ckpt_path", "words.txt"], r"ckpt_path=words.txt: "),
        (["runs=words.txt"], r"runs: the run folder words.txt/small/.* cannot be made: Not a directory; runs=FOLDER "),
        (["model.heads=3"], r"model: ValueError: width=32 has to be a multiple of heads=3 \(transformer.py line \d+\)"),
        (
            ["trainer.callbacks.0.every_n_steps=0"],
            r"trainer.callbacks.0: ValueError: every_n_steps must be a positive integer, got 0 \(monitor.py line \d+\)",
        ),
        (["data.text=absent"], r"data: FileNotFoundError: text='absent': no such file or folder"),
        (["trainer.max_epochs=2", "trainer.devices=-7"], r"trainer: .*devices"),
    ],
)
def test_mistakes_that_show_when_it_is_built(
    arguments: list[str], says: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*_: object, **__: object) -> None:
        raise AssertionError("a training has started")

    monkeypatch.setattr("lightning.Trainer.fit", started)
    before = folders(folder)
    assert run(*arguments) == 2
    (said,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("lowbit fit: "))
    assert re.match(f"lowbit fit: {says}", said), said
    assert folders(folder) == before


def test_a_run_that_fails_is_kept_and_says_why(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "broken_model.py").write_text(
        "from lowbit_lightning.experiments import GPT\n\n\nclass Broken(GPT):\n"
        "    def training_step(self, windows, index):\n        return self.nothing\n"
    )
    assert run("model=broken_model.Broken") == 1
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("lowbit fit: AttributeError: 'Broken' object has no attribute 'nothing'")
    assert "broken_model.py" in error
    assert json.loads((folders(folder)[-1] / "run.json").read_text())["status"] == "failed"
