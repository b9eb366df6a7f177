"""The quality benchmark of int8 products runs, small, and says what is wrong where something is."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.run_program import run

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "int8_quality.py"
SMALL = """
    --width 64 --layers 2 --heads 2 --context 32 --batch 4 --warmup 4 --validation-batches 2
"""


def load(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("int8_quality", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_small_run_writes_a_table(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(b"the quick brown fox jumps over the lazy dog. " * 200)
    told = ["--text", text, "--steps", 20, "--seeds", 2, "--threads", 1, "--only", "switchback", "--output", tmp_path]
    run(SCRIPT, *SMALL.split(), *told)
    (report,) = tmp_path.glob("*-int8-quality-*.md")
    rows = {line.split("|")[1].strip(): line.split("|") for line in report.read_text().splitlines() if "±" in line}
    assert set(rows) == {"bf16-mixed", "int8-mixed", "int8-mixed, SwitchBack"}
    layers, passes = 2 * 4, 2 * 20
    assert int(rows["int8-mixed"][5].replace(",", "")) == layers * (3 * passes + 2 * 2)
    assert int(rows["int8-mixed, SwitchBack"][5].replace(",", "")) == layers * (2 * passes + 2 * 2)


def runs(*losses: float, ran: int = 8, predicted: int = 8) -> list[dict[str, Any]]:
    return [{"val_loss": loss, "int8_matmuls": ran, "int8_matmuls_predicted": predicted} for loss in losses]


@pytest.mark.parametrize(
    ("name", "outcome", "said"),
    [
        ("int8-mixed", runs(2.01, 2.01, 2.02), None),
        ("int8-mixed", runs(2.03, 2.03, 2.02), "int8-mixed is +1.33 % from bf16-mixed"),
        ("int8-mixed", runs(1.97, 1.97, 1.97), "int8-mixed is -1.50 %"),
        ("int8-mixed", runs(float("nan"), 2.0, 2.0), "nan"),
        ("int8-mixed", runs(2.0, 2.0, 2.0, ran=7), "21 int8 matmuls ran, 24 predicted"),
        ("int8-mixed", runs(2.0, 2.0, 2.0, ran=0, predicted=0), "0 int8 matmuls ran"),
        ("int8-mixed, SwitchBack", runs(2.01, 2.011, 2.01), "SwitchBack is +0.52 % worse"),
        ("int8-mixed, SwitchBack", runs(1.99, 2.02, 2.0), None),
    ],
)
def test_complaints(monkeypatch: pytest.MonkeyPatch, name: str, outcome: Any, said: str | None) -> None:
    benchmark = load(monkeypatch)
    results = {"bf16-mixed": runs(2.0, 2.0, 2.0, ran=0, predicted=0), "int8-mixed": runs(2.0, 2.0, 2.0), name: outcome}
    found = benchmark.complaints(results)
    assert [said in text for text in found] == ([True] if said else []), found
