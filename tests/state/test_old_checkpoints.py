"""Checkpoints of before load, and the step after each of them is the one that was computed then, bit for bit."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from support.run_program import ROOT, run

DATA = ROOT / "tests" / "data"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old") / "old_checkpoints"
    shutil.copytree(DATA / "old_checkpoints", folder)
    run(DATA / "old_checkpoints.py", "check", folder, DS_ACCELERATOR="cpu")
    return folder


@pytest.mark.multiprocess
@pytest.mark.skipif(sys.platform != "linux", reason="the ranks are forked, and the deepspeed extra is for Linux")
@pytest.mark.parametrize("name", ["single", "sharded_0", "sharded_1", "deepspeed_0", "deepspeed_1"])
def test_the_next_step_is_the_one_of_then(found: Path, name: str) -> None:
    assert (found / f"{name}.txt").read_text() == ""
