"""Runs checks of a test file in ranks: ``checks.py FILE FOLDER THOROUGH ROUND...``, a round being ``RANKS:NAME,NAME``.

One process imports everything and forks the ranks of each round in turn. Every rank writes ``FOLDER/RANKS.RANK.json``:
for each check the first thing that is wrong, or null. ``support/on_ranks.py`` starts it, and says more.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from support import clock, on_ranks
from support.ranks import fork, join, write_outcomes


def rank_main(rank: int, ranks: int, names: list[str], module: Any, folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    world = max(ranks, 1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    if ranks > 0:  # as under torchrun
        os.environ.update(GROUP_RANK="0", TORCHELASTIC_RUN_ID="test", MASTER_ADDR="127.0.0.1", MASTER_PORT="29400")
        join(rank, ranks, folder / f"store {ranks}")
    checks = [getattr(module, name).check.function for name in names]
    write_outcomes(folder / f"{ranks}.{rank}.json", checks, folder)
    if dist.is_initialized():
        dist.destroy_process_group()


def main(file: Path, folder: Path, thorough: bool, rounds: list[str]) -> None:
    on_ranks.THOROUGH = thorough
    clock.stop()
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    getattr(module, "before_ranks", lambda: None)()
    for asked in rounds:
        ranks, _, names = asked.partition(":")
        fork(rank_main, (int(ranks), names.split(","), module, folder), max(int(ranks), 1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "1", sys.argv[4:])
