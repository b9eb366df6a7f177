"""Paged states of parameters that two ranks share. They run ``programs/paged_ranks.py``, once for all tests here."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from support.run_program import check, outcomes, run

CHECKS = (
    "parts_stay_where_they_lie",
    "steps_are_the_unpaged_ones",
    "checkpoints_go_both_ways",
    "gradients_are_released",
)

pytestmark = [pytest.mark.multiprocess, pytest.mark.skipif(sys.platform == "win32", reason="the ranks are forked")]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By rank: what each check found wrong."""
    folder = tmp_path_factory.mktemp("ranks")
    run("paged_ranks.py", folder)
    return outcomes(folder)


@pytest.mark.parametrize("name", CHECKS)
def test_on_two_ranks(name: str, results: dict[str, dict[str, Any]]) -> None:
    check(name, (results[str(rank)] for rank in range(2)))
