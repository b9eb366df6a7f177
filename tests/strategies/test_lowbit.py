"""Adapters on frozen low-bit weights over several ranks; tests/programs/lowbit_ranks.py says what each check is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.run_program import check, outcomes, run

ROUNDS = ("1", "2", "1 again", "3")
CHECKS = (
    "trains_like_one_process",
    "packed_weights_are_sharded_and_travel_packed",
    "resumes_on_any_number_of_ranks",
    "mixed_precision_rounds_no_scale",
    "quantises_by_plugin",
    "trains_under_deepspeed",
)
pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.skipif(torch.__version__ < "2.8", reason="torch 2.7's fully_shard refuses integer parameters"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("lowbit")
    run("lowbit_ranks.py", folder, *ROUNDS, DS_ACCELERATOR="cpu")
    return outcomes(folder)


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("ranks", ROUNDS)
def test_on_ranks(ranks: str, name: str, found: dict[str, dict[str, Any]]) -> None:
    check(name, [found[f"{ranks}.{rank}"] for rank in range(int(ranks.split()[0]))])
