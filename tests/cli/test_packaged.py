"""The packaged configs: each is complete, and trains. Tiny ones here; all of them, in processes of their own, with
``make slow``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lowbit_command.configs import NAMES, folder
from lowbit_lightning import cli

ROOT = Path(__file__).resolve().parents[2]
TINY = ["model.width=64", "model.layers=1", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false"]
TINY += ["trainer.log_every_n_steps=1"]
TEXT = ["vars.context=32", "vars.steps=4", "trainer.val_check_interval=2", "data.batch=2", "data.text=words.txt"]
CASES = {
    "gpt.yaml": [*TINY, *TEXT],
    "bert.yaml": [*TINY, *TEXT],
    "vision.yaml": [*TINY, "vars.epochs=1", "trainer.limit_train_batches=4"],
    "qlora.yaml": [*TINY, *TEXT],
    "sharded.yaml": [*TINY, *TEXT, "data.batches=8"],
    "deepspeed.yaml": [*TINY, *TEXT, "data.batches=8"],
}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.txt").write_bytes(b"the quick brown fox jumps over the lazy dog. " * 40)


def ended(name: str) -> dict:
    (found,) = Path("runs", name.removesuffix(".yaml")).iterdir()
    assert (found / "report.html").is_file()
    return json.loads((found / "run.json").read_text())


def test_list_show_copy(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["configs", "list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(NAMES)
    assert {path.name for path in folder().iterdir()} == set(NAMES) == set(CASES)
    assert cli.main(["configs", "show", "gpt"]) == 0
    assert capsys.readouterr().out == (folder() / "gpt.yaml").read_text()
    assert cli.main(["configs", "copy", "gpt.yaml"]) == 0
    assert Path("gpt.yaml").read_text() == (folder() / "gpt.yaml").read_text()
    assert capsys.readouterr().out == "gpt.yaml: lowbit fit --config gpt.yaml\n"
    assert cli.main(["configs", "copy", "gpt.yaml"]) == 2
    assert cli.main(["configs", "show", "gtp"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "lowbit configs: gpt.yaml exists: name another file, or remove it",
        f"lowbit configs: no packaged config 'gtp'; did you mean gpt.yaml? There are {', '.join(NAMES)}",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_each_is_whole(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["configs", "copy", name]) == 0
    assert cli.main(["fit", "--config", name, *CASES[name], "--print_config"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("name", ["qlora.yaml", "bert.yaml"])
def test_it_trains(name: str) -> None:
    assert cli.main(["fit", "--config", str(folder() / name), *CASES[name]]) == 0
    assert (ended(name)["status"], ended(name)["steps"]) == ("done", 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_it_trains_as_a_program(name: str) -> None:
    ranks = ["-m", "torch.distributed.run", "--nproc-per-node", "2"] if name == "sharded.yaml" else []
    told = [sys.executable, *ranks, "-m", "lowbit_command", "fit", "--config", str(folder() / name), *CASES[name]]
    done = subprocess.run(
        told, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = ended(name)
    assert (found["status"], found["steps"]) == ("done", 4)
    assert done.stdout.strip().splitlines()[-1].endswith("report.html")
