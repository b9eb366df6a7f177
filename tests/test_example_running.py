"""examples/running.py: what is counted as the peak of memory, and the exit status."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest
import running
import torch


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what memory a process has")
def test_the_peak_begins_anew() -> None:
    """Memory that was held before does not hide what is held later."""
    torch.ones(200_000_000, dtype=torch.uint8)
    peak = running.Peak()
    before = peak.bytes()
    torch.ones(80_000_000, dtype=torch.uint8)
    after = peak.bytes()
    assert before is not None
    assert after is not None
    assert 75e6 < after - before < 120e6


def test_results_are_written_and_failures_decide(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "a" / "b"
    running.save(folder, argparse.Namespace(steps=3, output=folder), "a table", "it.md", trained={"fp32": 1})
    assert (folder / "it.md").read_text() == "a table"
    found = json.loads((folder / "results.json").read_text())
    assert found == {"settings": {"steps": "3", "output": str(folder)}, "trained": {"fp32": 1}}
    assert running.status([]) == 0
    assert running.status(["nf4 is worse", "int8 too"]) == 1
    assert capsys.readouterr().err == "FAILED: nf4 is worse\nFAILED: int8 too\n"
