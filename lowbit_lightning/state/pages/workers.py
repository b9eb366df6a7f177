"""Threads that run tasks after events. Ctrl-C may interrupt their callers at any instruction.

Python runs signal handlers on the main thread, between any two of its instructions, and a handler's exception is raised
there. Futures, executors and most of ``threading`` are written in Python. If an exception interrupts them at the wrong
instruction, a lock stays locked: a worker waits for it for ever, and at its end the interpreter waits for the worker.
So callers make only single calls of C functions here: they put an event into a ``SimpleQueue``, and wait at a lock that
workers only release. Workers do all the bookkeeping, because signals do not reach them. The interpreter ends without
waiting for them, and work under way is lost then.
"""

from __future__ import annotations

import os
import weakref
from _thread import LockType, allocate_lock, start_new_thread
from collections.abc import Callable, Iterable, Sequence
from queue import SimpleQueue

Task = Callable[[], None]


class Event:
    """An event is past once all its tasks have been done or have failed."""

    def __init__(self, tasks: Iterable[Task] = (), after: Event | None = None) -> None:
        self.past, self.error = False, None
        self._tasks, self._after = list(tasks), after
        self._left = len(self._tasks)
        self._following: list[tuple[Queue, Event]] = []  # what waits for this
        self._books, self._gate = allocate_lock(), allocate_lock()  # the workers' own; open once it is past
        self._gate.acquire()

    error: BaseException | None
    """The error of the first task that failed, or of the event that this one waited for."""

    def join(self) -> None:
        """Wait until it is past."""
        if not self.past:
            with self._gate:
                pass

    def wait(self) -> None:
        """Wait until it is past. Raises its error."""
        self.join()
        if self.error is not None:
            raise self.error

    # -- in the workers ----------------------------------------------------------------------------------------------

    def _begin(self, queue: Queue) -> None:
        """Do the first task, and hand the others to the queue's threads. If the event before is not past yet, it calls
        this again later."""
        before, tasks = self._after, self._tasks
        if before is not None:
            with before._books:
                if not before.past:
                    before._following.append((queue, self))
                    return
            self._after, self.error = None, before.error
        self._tasks = []
        if self.error is not None or not tasks:
            self._end()
            return
        for task in tasks[1:]:
            queue.put((self, task))
        self._run(tasks[0])

    def _run(self, task: Task) -> None:
        try:
            task()
        except BaseException as error:  # any error is raised where somebody waits for the event
            with self._books:
                self.error = self.error or error
        with self._books:
            self._left -= 1
            last = not self._left
        if last:
            self._end()

    def _end(self) -> None:
        with self._books:
            self.past = True
        self._gate.release()
        for queue, event in self._following:
            queue.put((event, None))
        self._following = []


Queue = SimpleQueue[tuple[Event, Task | None] | None]
"""Events to begin, tasks of those that have begun, and None where a thread is to end."""


def past() -> Event:
    """An event that is past."""
    event = Event()
    event.past = True
    return event


class Workers:
    """``threads`` threads for each kind of work. Only one thread may call the methods at a time."""

    def __init__(self, kinds: Sequence[str], threads: int) -> None:
        self._process, self._idle = os.getpid(), True
        self._queues: dict[str, Queue] = {kind: SimpleQueue() for kind in kinds}
        self._under_way: set[Event] = set()
        for queue in self._queues.values():
            turn = allocate_lock()
            for _ in range(threads):
                start_new_thread(_work, (queue, turn, self._under_way))
        self.close = weakref.finalize(self, _dismiss, list(self._queues.values()) * threads)
        """Let the threads end after the work that they have been given. Returns at once."""
        self.close.atexit = False

    def start(self, kind: str, tasks: Iterable[Task], after: Event | None = None) -> Event:
        """Have the tasks done, in any order and beside each other, once ``after`` is past. Returns at once."""
        event = Event(tasks, after)
        self._idle = False
        self._queues[kind].put((event, None))
        return event

    def finish(self) -> None:
        """Wait until everything that was started is past, even if the call that started it was interrupted."""
        if self._idle or os.getpid() != self._process:  # a forked process has the books, and no threads
            return
        for kind in self._queues:
            self.start(kind, ()).join()  # now what was started before is known
        for event in tuple(self._under_way):
            event.join()
        self._idle = True


def _work(queue: Queue, turn: LockType, under_way: set[Event]) -> None:
    while _serve(queue, turn, under_way):  # a call for each item, after which nothing holds it
        pass


def _serve(queue: Queue, turn: LockType, under_way: set[Event]) -> bool:
    """Do one item of the queue. False for the one that ends the thread."""
    with turn:  # an event is known before anything that was started after it is begun
        item = queue.get()
        if item is None:
            return False
        event, task = item
        under_way.add(event)
    if task is None:
        event._begin(queue)
    else:
        event._run(task)
    if event.past:
        under_way.discard(event)
    return True


def _dismiss(queues: list[Queue]) -> None:
    for queue in queues:
        queue.put(None)
