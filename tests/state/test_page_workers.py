"""The threads behind page files: interrupted anywhere, and left alone when the process ends."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from lowbit_lightning.state.pages import Moves, workers
from lowbit_lightning.state.pages.file import FileTransport
from lowbit_lightning.state.pages.workers import Workers

PAGE = 4096
pytestmark = pytest.mark.timeout(60)
linux = pytest.mark.skipif(sys.platform != "linux", reason="page files are Linux's")


class Struck(KeyboardInterrupt):
    pass


def struck_at(instruction: int, call: Callable[[], object]) -> bool:
    """Run ``call``, and raise in front of its nth instruction of Python, as a signal's handler does. False: the call
    has fewer."""
    left = instruction

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        frame.f_trace_opcodes = True
        if event == "opcode":
            left -= 1
            if left < 0:
                raise Struck
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except Struck:
        return True
    finally:
        sys.settrace(before)
    return False


def in_time(call: Callable[[], object]) -> None:
    """Fail where it hangs; the thread that does is left behind."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "it hangs"
    if errors:
        raise errors[0]


@linux
@pytest.mark.filterwarnings("ignore:.*has no O_DIRECT")
def test_an_interrupt_at_any_instruction_hangs_nobody_and_loses_no_copy(
    page_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport, under_way = FileTransport(page_dir), 0
    slab, near, real = transport.allocate(2 * PAGE), transport.buffer(2 * PAGE), os.pwritev
    moves, other = Moves(((near[:PAGE], 0),)), Moves(((near[PAGE:], PAGE),))

    def slow(*arguments: Any) -> int:
        nonlocal under_way
        under_way += 1
        time.sleep(0.0002)
        done = real(*arguments)
        under_way -= 1
        return done

    def step() -> None:
        transport.wait(transport.fetch(other, transport.store(moves, transport.computed(moves))))
        transport.settle(transport.store(other, None))

    monkeypatch.setattr(os, "pwritev", slow)
    instruction = 0
    while struck_at(instruction, step):
        instruction += 1
        in_time(lambda: transport.settle(transport.computed(moves)))
        assert under_way == 0
        near[:PAGE].fill_(instruction % 251)
        in_time(step)
        assert bool((slab[:PAGE] == instruction % 251).all())
    assert instruction > 100
    in_time(transport.close)


END = """
import runpy, signal, sys, time
Workers = runpy.run_path(sys.argv[1])["Workers"]
running, asleep = Workers(["work"], 2), []
event = running.start("work", [lambda: (asleep.append(1), time.sleep(600))] * 2)
behind = running.start("work", [lambda: None], event)
while len(asleep) < 2:
    time.sleep(0.001)
signal.signal(signal.SIGALRM, signal.default_int_handler)
signal.setitimer(signal.ITIMER_REAL, 0.05)
try:
    {wait}
except KeyboardInterrupt:
    print("interrupted")
"""


@linux
@pytest.mark.parametrize("wait", ["event.wait()", "behind.wait()", "running.finish()"])
def test_a_process_can_be_interrupted_and_ends_while_work_is_under_way(wait: str) -> None:
    command = [sys.executable, "-c", END.format(wait=wait), str(workers.__file__)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted\n", "")


class Fatal(BaseException):
    pass


def test_no_error_ends_a_thread() -> None:
    def fail(error: BaseException) -> None:
        raise error

    running, ran = Workers(["work"], 1), list[int]()
    for error in (Fatal("1"), SystemExit(2), MemoryError(), KeyboardInterrupt()):
        event = running.start("work", [lambda error=error: fail(error), lambda: ran.append(1)])  # type: ignore[misc]
        behind = running.start("work", [lambda: ran.append(2)], event)
        for failed in (event, behind):
            with pytest.raises(type(error)) as caught:
                failed.wait()
            assert caught.value is error
    assert ran == [1] * 4  # the other tasks are done, and what is behind them is not
    running.start("work", [lambda: ran.append(3)]).wait()
    assert ran[-1] == 3
    running.close()


def assert_set(event: threading.Event) -> None:
    assert event.wait(60)


def test_finishing_waits_for_what_waits() -> None:
    running, go, ran = Workers(["one", "other"], 2), threading.Event(), list[int]()
    last = running.start("one", [lambda: assert_set(go)])
    for number in range(20):
        kind = ("one", "other")[number % 2]
        last = running.start(kind, [partial(ran.append, number)], last)
    threading.Timer(0.05, go.set).start()
    running.finish()
    assert last.past
    assert ran == list(range(20))
    running.close()


def test_events_that_are_past_hold_nothing() -> None:
    """A chain of copies is as long as a run."""

    def does_nothing() -> None:
        pass

    running, task = Workers(["work"], 1), partial(does_nothing)
    first = running.start("work", [task])
    last = running.start("work", [], running.start("work", [task], first))
    last.wait()
    held: list[weakref.ref[Any]] = [weakref.ref(first), weakref.ref(task)]
    del first, task
    running.finish()
    assert [one() for one in held] == [None, None]
    running.close()


def test_threads_end_with_their_workers() -> None:
    running = Workers(["one", "other"], 3)
    queues = [weakref.ref(queue) for queue in running._queues.values()]  # a thread holds its own
    running.start("one", [lambda: None]).wait()
    del running
    end = time.monotonic() + 20
    while any(queue() for queue in queues):
        assert time.monotonic() < end
        time.sleep(0.001)
