"""Whole recipes of training: what is planned, what torch's allocator counts, what the kernel calls resident."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from support.run_program import run_afresh

from lowbit_lightning.state.pages.layout import CHUNK

PARAMETERS = 24 * 1024**2
EXPECTED = {  # docs/memory.md: weights, gradients, states
    "fp32": 4 + 4 + 2.03,
    "bf16, rounded at random": 2 + 2 + 2.03,
    "+ gradient release": 2 + 2 / 24 + 2.03,
    "+ states on disk": 2 + 2 / 24 + 0.03,
}


@pytest.mark.skipif(sys.platform != "linux", reason="page files and resident memory as Linux counts it")
def test_recipes_take_what_is_planned(page_dir: Path) -> None:
    found = json.loads(run_afresh("recipes.py", page_dir, MALLOC_MMAP_THRESHOLD_="1048576").splitlines()[-1])
    assert set(found) == set(EXPECTED)
    for name, taken in found.items():
        ring = taken["planned"] - EXPECTED[name] if "disk" in name else 0.0  # which is no tensor of torch's allocator
        assert 0 <= ring < 1, name
        assert taken["planned"] == pytest.approx(EXPECTED[name] + ring, abs=0.03), name
        assert taken["counted"] == pytest.approx(EXPECTED[name], abs=0.05), name
        assert 0.85 * taken["planned"] < taken["resident"] < taken["fits"], (name, taken)
        new_layout = ring + 2 * CHUNK / PARAMETERS if "disk" in name else 0.0
        assert taken["first"] < taken["fits"] + new_layout, (name, taken)
