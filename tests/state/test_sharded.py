"""Optimizer states on 1, 2 and 3 ranks: shards, checkpoints, and what is summed over ranks.

The ranks run ``programs/sharded_state.py``, once for all tests here.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
from support.run_program import check, outcomes, run

RANKS = {"plain": 1, "2": 2, "3": 3, "1": 1}
CHECKS = (
    "states_are_the_single_process_states",
    "checkpoints_of_every_world_load_here",
    "full_state_dicts_come_and_go",
    "plain_state_dicts_are_cut",
    "lambs_norms_are_global",
    "nothing_moves_where_one_ranks_gradient_is_not_finite",
    "stochastic_rounding_is_the_same",
    "other_placements_stay_in_32_bits",
    "gradients_may_be_placed_otherwise",
    "a_model_trains_by_its_own_gradients",
)

pytestmark = [pytest.mark.multiprocess, pytest.mark.skipif(sys.platform == "win32", reason="the ranks are forked")]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By round and rank: what each check found wrong."""
    folder = tmp_path_factory.mktemp("ranks")
    run("sharded_state.py", folder)
    return outcomes(folder)


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("world", RANKS)
def test_on_ranks(name: str, world: str, results: dict[str, dict[str, Any]]) -> None:
    check(name, (results[f"{world}.{rank}"] for rank in range(RANKS[world])))


def test_a_plain_model_loads_what_2_3_and_1_ranks_saved(results: dict[str, dict[str, Any]]) -> None:
    assert results["plain again.0"] == {"checkpoints_of_every_world_load_here": None}
