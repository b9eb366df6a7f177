"""The driver of `make gpu`: it goes on after the last finished part, and a part that fails or hangs stops no other."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import gpu_parts
import gpu_predicted
from roofline.devices import DEVICES
from roofline.work import works

ROOT = Path(__file__).resolve().parents[2]


def said(text: str) -> tuple[str, ...]:
    return ("-c", f"print({text!r}, flush=True)")


def test_parts_run_once_and_failures_are_written_down(tmp_path: Path) -> None:
    parts = [
        gpu_parts.Part("good", (said("one"), said("two"))),
        gpu_parts.Part("bad", (("-c", "print('about to fail'); raise SystemExit(3)"), said("never"))),
        gpu_parts.Part("slow", (("-c", "import time; print('waiting', flush=True); time.sleep(60)"),)),
        gpu_parts.Part("last", (said("three"),)),
    ]
    assert gpu_parts.run_all(parts[:1], tmp_path) == 0
    assert gpu_parts.run_all(parts, tmp_path, seconds=4) == 2
    finished = json.loads((tmp_path / "finished.json").read_text())
    assert list(finished) == ["good", "bad", "slow", "last"]
    assert finished["good"] == finished["last"] == "done"
    assert finished["bad"].endswith("exit status 3")
    assert finished["slow"].endswith("not done after 4 s")
    assert "one\ntwo" in (tmp_path / "good.md").read_text()
    assert "waiting" in (tmp_path / "slow.md").read_text()
    bad = (tmp_path / "bad.md").read_text()
    assert "about to fail" in bad
    assert "never" not in bad
    (tmp_path / "last.md").unlink()
    assert gpu_parts.run_all(parts, tmp_path) == 2  # nothing runs again
    assert not (tmp_path / "last.md").exists()


def test_every_part_runs_files_that_exist() -> None:
    for part in gpu_parts.PARTS:
        for command in part.commands:
            files = [word for word in command if word.endswith(".py")]
            assert files
            assert all((ROOT / name).exists() for name in files), part
    kinds = dict.fromkeys(part.name.partition("-")[0] for part in gpu_parts.PARTS)
    assert list(kinds)[:6] == ["correctness", "predictions", "int8", "paging", "graphs", "rivals"]
    tests = {path.name for path in (ROOT / "tests" / "gpu").glob("test_*.py")}
    run = {Path(word).name for part in gpu_parts.PARTS for command in part.commands for word in command}
    assert tests <= run


def test_figures_of_a_gpu_by_its_name() -> None:
    assert gpu_predicted.device_of("NVIDIA H200", "sm_90").name == "H200"
    assert gpu_predicted.device_of("NVIDIA A100-SXM4-80GB", "sm_80").name == "A100"
    assert gpu_predicted.device_of("NVIDIA L4", "sm_89") in DEVICES
    with pytest.raises(LookupError, match="sm_86"):
        gpu_predicted.device_of("NVIDIA RTX A6000", "sm_86")


def test_measured_over_predicted() -> None:
    """By hand: dequantising 1e9 float32 on an H200 moves 5.016 bytes each at nine tenths of 4.8 TB/s."""
    work = next(work for work in works() if work.name == "dequantize fp32")
    limit, binds = gpu_predicted.predicted(work, gpu_predicted.device_of("NVIDIA H200", "sm_90"))
    assert binds == "memory"
    assert 1e9 * limit == pytest.approx(5.015625e9 / 4.32e12 * 1e3)
    assert gpu_predicted.table([("x", 1.5, 1.0, binds)]).splitlines()[-1] == "| x | 1.500 | 1.000 | 1.50 | memory |"
