"""What every test gets: a fixed seed, one thread, poisoned uninitialised memory, and no silent skip.

Tests that need something special carry a marker. Those that plain ``pytest`` leaves out are counted in the closing
lines, with the make target that runs them.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import clock

from lowbit_lightning.state import pages
from lowbit_lightning.state.pages.file import FileTransport

# Left out unless -m names the marker: marker -> the make target that runs it.
ON_REQUEST = {"gpu": "make gpu", "six_architectures": "make cuda-compile", "slow": "make slow"}
_left_out = pytest.StashKey[dict[str, int]]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked = config.option.markexpr
    if "gpu" in asked and not torch.cuda.is_available():
        raise pytest.UsageError("-m gpu: torch sees no CUDA device here; run it on a machine with a GPU")
    kept: list[pytest.Item] = []
    dropped: list[pytest.Item] = []
    counts: dict[str, int] = {}
    for item in items:
        marker = next((m for m in ON_REQUEST if item.get_closest_marker(m) and m not in asked), None)
        if marker is None or any(item.nodeid in str(a) for a in config.args if "::" in str(a)):
            kept.append(item)
        else:
            dropped.append(item)
            counts[marker] = counts.get(marker, 0) + 1
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept
    config.stash[_left_out] = counts


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for marker, count in config.stash.get(_left_out, {}).items():
        terminalreporter.write_line(f"left out: {count} tests marked {marker}; `{ON_REQUEST[marker]}` runs them")


@pytest.fixture
def stays_in_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run leaves its int8 layers in the model, for the test to look at."""
    from lowbit_lightning import Int8MixedPrecision

    monkeypatch.setattr(Int8MixedPrecision, "release_layers", lambda plugin: None)


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """Fixes the seed and fills ``torch.empty`` with NaN (or the largest integer), so that an output element that a
    kernel forgets to write cannot pass for a right one. Small tensors gain nothing from several threads: tests of
    threads ask for them."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def _layers_are_faster_in_int8() -> None:
    """``swap="faster"`` keeps every layer in int8; tests of the choice have clocks of their own."""
    clock.stop()


@pytest.fixture(autouse=True)
def _leaves_the_process_as_it_was() -> Iterator[None]:
    """What a program may set for its whole process, and a test that calls its ``main`` must not hand on to the next
    test of this worker: environment variables, the levels of loggers, the default dtype, Lightning's rank."""
    environment, dtype = dict(os.environ), torch.get_default_dtype()
    known = logging.root.manager.loggerDict.values()
    loggers = [logging.root, *(each for each in known if isinstance(each, logging.Logger))]
    levels = [each.level for each in loggers]
    yield
    if os.environ != environment:
        os.environ.clear()
        os.environ.update(environment)
    torch.set_default_dtype(dtype)
    for logger, level in zip(loggers, levels, strict=True):
        if logger.level != level:
            logger.setLevel(level)
    if (rank_zero := sys.modules.get("lightning.fabric.utilities.rank_zero")) is not None:
        rank_zero.rank_zero_only.rank = 0


@pytest.fixture
def page_dir() -> Iterator[Path]:
    """A folder for page files: an empty one on a disk, which ``tmp_path`` need not be."""
    with tempfile.TemporaryDirectory(dir=FileTransport().folder) as folder:
        yield Path(folder)


@pytest.fixture
def deepspeed_imported() -> None:
    """What tells partitions from parameters looks whether there is a DeepSpeed that could have made them."""
    importlib.import_module("deepspeed")


@pytest.fixture(params=["O_DIRECT", "page cache"])
def transport(request: pytest.FixtureRequest, page_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A page file's transport, one of each kind; a file system that has no O_DIRECT gives the second one twice."""
    if request.param == "page cache":
        monkeypatch.setattr(pages.file, "_direct", lambda base: None)
    made = FileTransport(page_dir)
    yield made
    made.close()
