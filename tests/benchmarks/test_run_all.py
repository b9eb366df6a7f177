"""The runner of all benchmarks: every benchmark has a part, and a part that fails or hangs does not stop the others."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TABLE = """# a title, cpu, today

- processor: x

## a case

| step      |  ms | ratio |
|-----------|----:|------:|
| torch's   | 2.5 | 1.00x |
| ours      | 1.5 | 1.67x |
"""


@pytest.fixture(scope="module")
def runner() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        spec = importlib.util.spec_from_file_location("run_all", BENCHMARKS / "run_all.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "run_all", module)
        spec.loader.exec_module(module)
        yield module


def test_every_benchmark_has_a_place_and_all_take_a_quarter_of_an_hour(runner: Any) -> None:
    found = {path.name for path in BENCHMARKS.glob("[!_]*.py")} - {"run_all.py"}
    assert {part.script for part in runner.PARTS} | set(runner.ALONE) == found
    assert sum(part.seconds for part in runner.PARTS) <= 15 * 60  # limits; none takes all of its own


def test_parts_that_fail_or_hang_are_named_and_the_others_reported(
    runner: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripts = {
        "good.py": f"import sys; open(sys.argv[-1], 'w').write({TABLE!r})",
        "bad.py": "print('about to fail'); raise SystemExit(3)",
        "slow.py": "import time; print('waiting', flush=True); time.sleep(60)",
    }
    for name, text in scripts.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(runner, "HERE", tmp_path)
    outcomes = [runner.run(runner.Part(name, (), 2 if name == "slow.py" else 30), tmp_path) for name in scripts]
    assert [outcome.failure for outcome in outcomes] == [
        "",
        "exit status 3; it last printed: about to fail",
        "stopped after 2 s; it last printed: waiting",
    ]
    text = runner.written(outcomes, "# all", "all.svg")
    assert "No result: exit status 3; it last printed: about to fail." in text
    assert "### a case" in text
    assert "processor: x" not in text
    (panel,) = [panel for outcome in outcomes for panel in runner.panels(outcome)]
    assert panel.bars == [("torch's", 2.5, False), ("ours", 1.5, True)]
    assert runner.save(outcomes, tmp_path / "out") == 2
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()) == [".md", ".svg"]
