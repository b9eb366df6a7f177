"""``lowbit sweep``: which runs it starts, what it keeps of them, and how it goes on."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support.configs import write

from lowbit_lightning import cli
from lowbit_lightning.cli import sweep
from lowbit_lightning.cli.config import ConfigError


@pytest.mark.parametrize(
    ("sets", "paired", "names"),
    [
        (["a.x=1,2", "b.y=u,v"], False, ["x=1,y=u", "x=1,y=v", "x=2,y=u", "x=2,y=v"]),
        (["a.x=1,2", "b.y=u,v"], True, ["x=1,y=u", "x=2,y=v"]),
        (["a.x=1,2", "b.x=3"], False, ["a.x=1,b.x=3", "a.x=2,b.x=3"]),
        (["o.betas=[0.9,0.99],[0.8,0.9]"], False, ["betas=_0.9,0.99_", "betas=_0.8,0.9_"]),
        (["data.text=a/b.txt,'x,y'"], False, ["text=a_b.txt", "text=_x,y_"]),
    ],
)
def test_combinations(sets: list[str], paired: bool, names: list[str]) -> None:
    assert [cell.name for cell in sweep.combinations(sets, paired)] == names


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        (["a.x"], "--set a.x: write key=a,b,c"),
        (["a=1,2", "b=1"], "--paired: each --set needs as many values as the others, got a 2, b 1"),
        (["a=1,1", "b=2,2"], "--set: a=1,b=2 comes twice"),
    ],
)
def test_mistakes(sets: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        sweep.combinations(sets, True)


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The runs that a sweep starts, in place of the runs themselves: a learning rate of 1 fails."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    runs: list[dict[str, Any]] = []

    def instead(told: list[str], stdout: Any, **_: Any) -> Any:
        settings: dict[str, Any] = dict(part.split("=", 1) for part in told if "=" in part)
        settings["resumed"] = "--resume" in told
        runs.append(settings)
        rate = float(settings["optimizer.lr"])
        if rate == 1 and len(runs) < 6:
            stdout.write("much\nlowbit fit: ValueError: too fast\n")
            return subprocess.CompletedProcess(told, 1)
        folder = Path(settings["runs"], settings["name"], f"2026-01-01-00-00-0{len(runs)}")
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text("")
        ended = {"status": "done", "error": None, "steps": 4, "seconds": 1.5, "metrics": {"val_loss": 2 + rate}}
        (folder / "run.json").write_text(json.dumps(ended))
        return subprocess.CompletedProcess(told, 0)

    monkeypatch.setattr(sweep.subprocess, "run", instead)
    return runs


TOLD = ["sweep", "-c", "small.yaml", "--set", "trainer.precision=32-true,int8-mixed", "--set", "optimizer.lr=0.5,1"]


def test_a_grid_with_failures_goes_on_where_it_stopped(
    started: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*TOLD, "trainer.max_steps=3"]) == 1
    assert [(run["trainer.precision"], run["optimizer.lr"]) for run in started] == [
        *(("32-true", "0.5"), ("32-true", "1"), ("int8-mixed", "0.5"), ("int8-mixed", "1")),
    ]
    assert {run["trainer.max_steps"] for run in started} == {"3"}
    out = capsys.readouterr().out
    assert "4 runs, 0 done before" in out
    lines = [line.split() for line in out.splitlines() if line.startswith(("*", " "))]
    assert lines[0] == ["run", "val_loss", "steps", "time", "status"]
    assert lines[1][:3] == ["*", "precision=32-true,lr=0.5", "2.5"]
    assert lines[2] == ["precision=32-true,lr=1", *lines[2][1:4], *lines[2][4:]]
    assert "failed: lowbit fit: ValueError: too fast" in out
    assert cli.main([*TOLD, "trainer.max_steps=3"]) == 1
    assert len(started) == 6
    assert "4 runs, 2 done before" in capsys.readouterr().out
    assert cli.main([*TOLD, "trainer.max_steps=3"]) == 0
    (folder,) = Path("runs", "small").glob("sweep-*")
    kept = json.loads((folder / "sweep.json").read_text())["runs"]
    assert [run["status"] for run in kept] == ["done"] * 4


def test_a_stopped_run_is_resumed(started: list[dict[str, Any]]) -> None:
    assert cli.main([*TOLD, "--metric", "val_loss"]) == 1
    (folder,) = Path("runs", "small").glob("sweep-*")
    cell = folder / "precision=32-true,lr=0.5"
    (ended,) = cell.glob("*/run.json")
    ended.unlink()
    (ended.parent / "checkpoints").mkdir()
    (ended.parent / "checkpoints" / "last.ckpt").touch()
    cli.main(TOLD)
    assert [run["resumed"] for run in started[4:]] == [True, False, False]


def test_every_combination_is_checked_before_the_first_runs(
    started: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*TOLD, "--set", "model.widht=3,4"]) == 2
    assert capsys.readouterr().err.startswith("lowbit sweep: model.init_args.widht (command line): GPT has no argument")
    assert not started


def test_more_is_better_for_an_accuracy() -> None:
    cells = [sweep.Cell(str(i), (), "done", metrics={"val_accuracy": i, "val_loss": i}) for i in (1, 3, 2)]
    assert [cell.name for cell in sweep.ranked(cells, "val_accuracy")] == ["3", "2", "1"]
    assert [cell.name for cell in sweep.ranked(cells, "val_loss")] == ["1", "2", "3"]
