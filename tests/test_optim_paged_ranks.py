"""Paged states of parameters that two ranks share. They run ``programs/paged_ranks.py``, once for all tests here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).parent / "programs" / "paged_ranks.py"
CHECKS = (
    "parts_stay_where_they_lie",
    "steps_are_the_unpaged_ones",
    "checkpoints_go_both_ways",
    "gradients_are_released",
)

pytestmark = [pytest.mark.multiprocess, pytest.mark.skipif(sys.platform == "win32", reason="the ranks are forked")]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """By rank: what each check found wrong."""
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run([sys.executable, PROGRAM, folder], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", CHECKS)
def test_on_two_ranks(name: str, results: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(results):
        assert name in found, f"rank {rank} did not get there: {[v for v in found.values() if v]}"
        assert found[name] is None, f"rank {rank}: {found[name]}"
