"""The quality benchmark runs, small, and writes what it says it writes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from support.run_program import run

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "optimizer_quality.py"


def test_quick_writes_a_table_and_pictures(tmp_path: Path) -> None:
    told = ["--quick", "--threads", 1, "--device", "cpu", "--tasks", "gpt", "--only", "adamw,nesterov", "--seeds", 2]
    run(SCRIPT, *told, "--output", tmp_path)
    (report,) = tmp_path.glob("*-optimizer-quality-gpt-quick-cpu.md")
    rows = {line.split("|")[1].strip(): line.split("|") for line in report.read_text().splitlines() if "±" in line}
    assert set(rows) == {"SGD, Nesterov", "AdamW"}
    full, low = (float(rows["AdamW"][i].split("±")[0]) for i in (3, 4))
    assert 2 < full < 3.5  # of 5.5 at the start
    assert abs(low / full - 1) < 0.02
    assert abs(float(rows["AdamW"][5].split("±")[0]) - 100 * (low / full - 1)) < 0.02  # the mean of pairs, rounded
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert [name.rsplit("-", 1)[1] for name in pictures] == ["differences.png", "gpt.png"]
    assert all(f"({name})" in report.read_text() for name in pictures)


def test_what_matches_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(SCRIPT.parent), *sys.path])
    spec = importlib.util.spec_from_file_location("optimizer_quality", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "optimizer_quality", benchmark)
    spec.loader.exec_module(benchmark)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--quick", "--device", "cpu", "--only", "adadelta"])
    with pytest.raises(SystemExit, match="--only adadelta matches none of"):
        benchmark.main()
