"""A copy engine that lies in wait: a transport on the CPU that does everything as late, and as badly, as it may.

It stands for a GPU. Kernels go to a stream that runs behind the host; copies run whenever the engine likes once their
``after`` is past, in any order. Where a copy will write is poisoned from its start to its end, and what it reads may be
read at its start or at its end. Whoever forgot a wait sees poison, or what was there before.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from lowbit_lightning import kernels
from lowbit_lightning.state import pages
from lowbit_lightning.state.pages import Moves

POISON = 0xA5


class Event:
    """A copy, or a place in the stream. ``stale``: made again since, for the same moves."""

    def __init__(self) -> None:
        self.done = self.started = self.stale = False


class Copy(Event):
    def __init__(self, moves: Moves, after: Event | None, inwards: bool, early: bool) -> None:
        super().__init__()
        self.moves, self.after, self.inwards, self.early = moves, after, inwards, early
        self.seen: list[Tensor] = []


class Stream:
    """Where kernels run: in order, but behind the host."""

    def __init__(self, seed: int, haste: float) -> None:
        """``haste``: the probability that something runs when it may; 0: only when somebody waits for it."""
        self.random, self.haste = random.Random(seed), haste
        self.queue: deque[Callable[[], None] | Event] = deque()
        self.engines: list[Engine] = []
        self.kernels = 0

    def launch(self, kernel: Callable[[], None]) -> None:
        self.queue.append(kernel)
        self.stir()

    def stir(self) -> None:
        """Let some of what may run do so."""
        for engine in self.engines:
            engine.stir()
        while self.queue and self.random.random() < self.haste:
            item = self.queue[0]
            if isinstance(item, Copy) and not item.done:
                return
            self.next()

    def next(self) -> None:
        item = self.queue.popleft()
        if isinstance(item, Copy):  # the stream waits for it
            finish(item, self)
        elif isinstance(item, Event):
            item.done = True
        else:
            self.kernels += 1
            item()

    def drain(self) -> None:
        """What a host does that reads a parameter."""
        while self.queue:
            self.next()


def finish(event: Event, stream: Stream) -> None:
    """Run all that ``event`` depends on, and it."""
    if event.done:
        return
    if isinstance(event, Copy):
        if event.after is not None:
            finish(event.after, stream)
        engine = next(engine for engine in stream.engines if event in engine.pending)
        engine.start(event)
        engine.end(event)
        return
    assert event in stream.queue, "the event was forgotten"
    while not event.done:
        stream.next()


class Engine:
    """See ``lowbit_lightning.state.pages.Transport``."""

    device = torch.device("cpu")

    def __init__(self, stream: Stream) -> None:
        self.stream, self.random = stream, stream.random
        stream.engines.append(self)
        self.pending: list[Copy] = []
        self.last: dict[tuple[str, Moves], Event] = {}
        self.buffers: list[Tensor] = []
        self.slab = torch.empty(0, dtype=torch.uint8)
        self.trims, self.closed = 0, False

    def allocate(self, nbytes: int) -> Tensor:
        assert not self.slab.numel(), "one slab"
        self.slab = torch.full((nbytes,), POISON, dtype=torch.uint8)
        return self.slab

    def buffer(self, nbytes: int) -> Tensor:
        self.buffers.append(torch.full((nbytes,), POISON, dtype=torch.uint8))
        return self.buffers[-1]

    def fetch(self, moves: Moves, after: Event | None) -> Event:
        return self._copy(moves, after, inwards=True)

    def store(self, moves: Moves, after: Event | None) -> Event:
        return self._copy(moves, after, inwards=False)

    def computed(self, moves: Moves) -> Event:
        event = self._made("computed", moves, Event())
        self.stream.queue.append(event)
        self.stream.stir()
        return event

    def wait(self, event: Event) -> None:
        assert not event.stale
        if isinstance(event, Copy):  # the stream is behind its own events anyway
            self.stream.queue.append(event)
        self.stream.stir()

    def settle(self, event: Event) -> None:
        assert not event.stale
        finish(event, self.stream)

    def trim(self) -> None:
        assert not self.pending, "the host touched the slab while copies were under way"
        self.trims += 1

    def close(self) -> None:
        self.closed = True
        self.finish_all()

    def finish_all(self) -> None:
        while self.pending:
            finish(self.pending[0], self.stream)

    # -- copies ------------------------------------------------------------------------------------------------------

    def _copy(self, moves: Moves, after: Event | None, inwards: bool) -> Copy:
        assert not self.closed
        assert after is None or not after.stale
        self._check(moves)
        event = Copy(moves, after, inwards, early=self.random.random() < 0.5)
        self._made("fetch" if inwards else "store", moves, event)
        self.pending.append(event)
        self.stream.stir()
        return event

    def _made(self, kind: str, moves: Moves, event: Any) -> Any:
        if (kind, moves) in self.last:
            self.last[kind, moves].stale = True
        self.last[kind, moves] = event
        return event

    def _check(self, moves: Moves) -> None:
        addresses = [(b.data_ptr(), b.data_ptr() + b.numel()) for b in self.buffers]
        far = sorted((offset, offset + part.numel()) for part, offset in moves.parts)
        near = sorted((part.data_ptr(), part.data_ptr() + part.numel()) for part, _ in moves.parts)
        for spans in (far, near):
            assert all(a[1] <= b[0] for a, b in pairwise(spans)), "parts overlap"
        assert far[0][0] >= 0, "before the slab"
        assert far[-1][1] <= self.slab.numel(), "behind the slab"
        for first, last in near:
            assert any(start <= first and last <= end for start, end in addresses), "not in a buffer"

    def stir(self) -> None:
        for event in self.random.sample(self.pending, len(self.pending)):
            if (event.after is None or event.after.done) and self.random.random() < self.stream.haste:
                if event.started:
                    self.end(event)
                else:
                    self.start(event)

    def start(self, event: Copy) -> None:
        if event.started:
            return
        event.started = True
        ends = [self._ends(part, offset, event.inwards) for part, offset in event.moves.parts]
        event.seen = [source.clone() if event.early else source for source, _ in ends]
        for _, target in ends:
            target.fill_(POISON)

    def end(self, event: Copy) -> None:
        for (part, offset), source in zip(event.moves.parts, event.seen, strict=True):
            self._ends(part, offset, event.inwards)[1].copy_(source)
        event.done, event.seen = True, []
        self.pending.remove(event)

    def _ends(self, part: Tensor, offset: int, inwards: bool) -> tuple[Tensor, Tensor]:
        """Source and target."""
        far = self.slab[offset : offset + part.numel()]
        return (far, part) if inwards else (part, far)


@contextmanager
def lying_in_wait(
    seed: int = 0, haste: float = 0.0, chunk: int | None = None, smallest: int = 4096
) -> Iterator[Stream]:
    """Pages of all optimizers inside the block travel by engines, and their kernels run behind the host.

    ``chunk``, ``smallest``: bytes of chunks, instead of what suits real machines.
    """
    stream = Stream(seed, haste)
    step, norms = kernels.optimizer_step, kernels.optimizer_norms

    def late_step(*arguments: Any) -> None:
        stream.launch(lambda: torch.no_grad()(step)(*arguments))

    def late_norms(*arguments: Any) -> Tensor:
        stream.drain()
        return norms(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "open_transport", lambda *_: Engine(stream))
        patch.setattr(kernels, "optimizer_step", late_step)
        patch.setattr(kernels, "optimizer_norms", late_norms)
        patch.setattr(pages.layout, "SMALLEST", smallest)
        if chunk is not None:
            patch.setattr(pages.layout, "CHUNK", chunk)
        handle = register_optimizer_step_post_hook(lambda *_: stream.drain())
        try:
            yield stream
        finally:
            handle.remove()
