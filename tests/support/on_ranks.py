"""Checks that run on several ranks of this machine: one function, with its ranks beside it.

    @on_ranks(ALONE, 2, 3)
    def test_losses_are_those_of_one_device(folder: Path) -> str | None:
        ...  # runs in every rank; returns, or raises, what is wrong

It becomes a test for each number of ranks. The first one that pytest comes to starts a process (``programs/checks.py``)
that imports the file once, forks the ranks of each number in turn and lets them run all the checks that were selected,
in the order of the file; the others read what it found. ``ALONE`` is a single process without a process group, which
runs before all others: what it leaves in ``folder``, which is one for all checks of a file, theirs are compared with.
``AGAIN`` is the same after all others. If the file has a ``before_ranks()``, it runs once before the ranks are forked.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support.run_program import check, outcomes, run

ALONE, AGAIN = 0, -1
THOROUGH = False
"""Whether the rounds named ``slow=`` are running: checks may take more steps then."""

_NAMES = {ALONE: "alone", AGAIN: "alone again"}


@dataclass(frozen=True)
class Check:
    function: Callable[[Path], Any]
    rounds: tuple[int, ...]
    after: Any


def on_ranks(*quick: int, slow: Sequence[int] = (), after: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """
    Args:
        quick: numbers of ranks, ``ALONE`` and ``AGAIN`` among them, in the order in which they run.
        slow: those for ``make slow``, in a run of its own.
        after: a check whose files this one reads. It runs wherever this one does; if it is not of these ranks, on its
            own first ones, before.
    """
    rounds = [pytest.param(ranks, False, id=_NAMES.get(ranks, str(ranks))) for ranks in quick]
    marks = [pytest.mark.slow, pytest.mark.timeout(1800)]
    rounds += [pytest.param(ranks, True, id=f"{_NAMES.get(ranks, ranks)}, slow", marks=marks) for ranks in slow]

    def decorate(function: Callable[[Path], Any]) -> Any:
        @pytest.mark.multiprocess
        @pytest.mark.parametrize(("ranks", "thorough"), rounds)
        def test(
            ranks: int, thorough: bool, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
        ) -> None:
            results, problem = _results(request.path, thorough, request.session, tmp_path_factory)
            by_rank = [results.get(f"{ranks}.{rank}") for rank in range(max(ranks, 1))]
            if problem and not all(by_rank):
                pytest.fail(problem)
            check(function.__name__, (found or {} for found in by_rank))

        test.__name__, test.__doc__ = function.__name__, function.__doc__
        test.check = Check(function, (*quick, *slow), after)  # type: ignore[attr-defined]
        return test

    return decorate


Results = tuple[dict[str, dict[str, Any]], str | None]
"""By round and rank, what each selected check of a file found wrong; and what the process failed with."""

_found: dict[tuple[Path, bool], Results] = {}


def _results(file: Path, thorough: bool, session: Any, folders: pytest.TempPathFactory) -> Results:
    if (file, thorough) not in _found:
        _found[file, thorough] = _run(file, thorough, session, folders.mktemp("ranks"))
    return _found[file, thorough]


def _run(file: Path, thorough: bool, session: Any, folder: Path) -> Results:
    rounds: dict[int, list[str]] = {ALONE: []}
    for item in session.items:
        parameters = item.callspec.params if item.path == file and hasattr(item.obj, "check") else {}
        if parameters.get("thorough") == thorough:
            _add(item.obj, parameters["ranks"], rounds)
    order = sorted(filter(rounds.get, rounds), key=lambda ranks: ranks == AGAIN)  # the rest as they were found
    asked = [f"{ranks}:{','.join(rounds[ranks])}" for ranks in order]
    try:
        run("checks.py", file, folder, int(thorough), *asked, timeout=1700 if thorough else 280)
    except (AssertionError, subprocess.TimeoutExpired) as error:
        return outcomes(folder), str(error)
    return outcomes(folder), None


def _add(test: Any, ranks: int, rounds: dict[int, list[str]]) -> None:
    """A check, and before it what it reads: of another check, and its own of one device."""
    if test.__name__ in rounds.get(ranks, []):
        return
    after = test.check.after
    if after is not None:
        _add(after, ranks if ranks in after.check.rounds else after.check.rounds[0], rounds)
    if ALONE in test.check.rounds and ranks != ALONE:
        _add(test, ALONE, rounds)
    rounds.setdefault(ranks, []).append(test.__name__)
