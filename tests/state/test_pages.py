"""The pager alone: layouts, and adversarial schedules against a model that has all states at hand."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.paged_engine import Engine, Stream
from torch import Tensor

from lowbit_lightning.state.pages import Chunk, Pager, Want
from lowbit_lightning.state.pages.layout import RING, lay_out

DTYPES = {"codes": torch.uint8, "mean": torch.float32, "rest": torch.int8}


@st.composite
def wants(draw: Any, longest: int = 20_000) -> list[Want]:
    result = []
    for _ in range(draw(st.integers(1, 6))):
        rows, length = draw(st.integers(1, 30)), draw(st.integers(1, longest // 30))
        names = draw(st.lists(st.sampled_from(sorted(DTYPES)), min_size=1, max_size=3, unique=True))
        unit = draw(st.sampled_from([length, rows * length, 256]))
        result.append(Want((rows, length), tuple((name, DTYPES[name]) for name in names), unit))
    return result


# -- layouts ---------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(wants(), st.integers(0, 400_000), st.integers(5_000, 200_000))
def test_layouts(wanted: list[Want], resident: int, limit: int) -> None:
    plan = lay_out(wanted, resident, limit)
    far: list[tuple[int, int]] = []
    reached = [0] * len(wanted)
    for chunk in plan.chunks:
        near = []
        for number, span, places_far, places_near in chunk.placed:
            want = wanted[number]
            assert span.start == reached[number], "in order, without a gap"
            reached[number] = span.stop
            assert span.start % want.unit == 0, "cut at a unit"
            for (_, dtype), to, first, place in zip(
                want.dtypes, places_near, places_far, plan.places[number], strict=True
            ):
                size = (span.stop - span.start) * dtype.itemsize
                assert first == place + span.start * dtype.itemsize, "contiguous in the slab"
                assert to % 4096 == first % 4096
                near.append((to, to + size))
                far.append((first, first + size))
                assert any(f <= first and first + size <= f + n and to - first == m - f for f, m, n in chunk.moves)
        assert_apart(near, chunk.nbytes)
        whole = [number for number, span, *_ in chunk.placed if span == (0, wanted[number].numel)]
        assert len(chunk.placed) == 1 or len(whole) == len(chunk.placed), "a piece travels alone"
        uncut = chunk.nbytes <= limit or len(chunk.placed) == 1
        assert uncut, "larger than it may be"
    assert reached == [want.numel for want in wanted]
    assert_apart(far, plan.nbytes)
    assert_apart([(f, f + n) for chunk in plan.chunks for f, _, n in chunk.moves], plan.nbytes)
    assert plan.resident <= resident
    kinds = [chunk.resident for chunk in plan.chunks]
    assert kinds == sorted(kinds, reverse=True), "resident ones come first"
    assert plan.near_bytes <= resident + sum(sorted(c.nbytes for c in plan.chunks if not c.resident)[-RING:])


def assert_apart(spans: Sequence[tuple[int, int]], end: int) -> None:
    last = 0
    for start, stop in sorted(spans):
        assert start >= last, "overlap"
        last = stop
    assert last <= end


def test_a_parameter_is_cut_into_pieces_of_equal_size() -> None:
    plan = lay_out([Want((100, 10_000), (("codes", torch.uint8),), 10_000)], 0, 98_192)
    sizes = [span.stop - span.start for chunk in plan.chunks for _, span, *_ in chunk.placed]
    assert sizes == [90_000] * 4 + [80_000] * 8  # nine rows fit, and would leave a chunk of one row


def test_the_budget_is_used() -> None:
    want = Want((1000, 1000), (("codes", torch.uint8),), 1000)
    plan = lay_out([want] * 4, 400_000)
    assert 400_000 - 10_000 <= plan.resident <= 400_000
    assert sum(plan.ring) <= 3 * (4_000_000 - 400_000) / 8 + 3 * 10_000


# -- schedules -------------------------------------------------------------------------------------------------------


class Model:
    """What a step does to states, with the pager and with all of them at hand."""

    def __init__(self, wanted: list[Want], seed: int, haste: float, resident: int, chunk: int) -> None:
        self.stream = Stream(seed, haste)
        self.random = random.Random(seed)
        self.pager = Pager(Engine(self.stream), wanted, resident, chunk)
        self.truth = [
            {name: torch.randint(-99, 99, want.shape).to(dtype) for name, dtype in want.dtypes} for want in wanted
        ]
        for number, states in enumerate(self.truth):
            self.pager.write(number, states)
        self.read: list[tuple[Tensor, Tensor]] = []
        self.count = 0

    def visit(self, chunk: Chunk, number: int, piece: Any, changes: bool) -> None:
        """A kernel on a piece: on the stream with the pager, at once on the truth."""
        self.count += 1
        count = self.count
        for name, near in piece.states.items():
            true = self.truth[number][name].view(-1)[piece.span.start : piece.span.stop]
            if changes:
                true.mul_(3).add_(count % 50)
                self.stream.launch(partial(self.change, near, count % 50))
            else:
                self.stream.launch(partial(self.note, near, true.clone()))

    def change(self, near: Tensor, by: int) -> None:
        near.mul_(3).add_(by)

    def note(self, near: Tensor, expected: Tensor) -> None:
        self.read.append((near.clone(), expected))

    def step(self, numbers: Sequence[int], changes: bool) -> None:
        for number in numbers:
            for piece in self.pager.pieces[number]:
                self.pager.near(piece.chunk, changes)
                self.visit(piece.chunk, number, piece, changes)

    def look(self) -> None:
        """A reader of the slab."""
        self.pager.settle()
        for engine in self.stream.engines:
            engine.finish_all()  # nothing, unless a wait is missing
        for far, true in zip(self.pager.far, self.truth, strict=True):
            for name in true:
                assert torch.equal(far[name], true[name]), name

    def write(self, number: int) -> None:
        for name, true in self.truth[number].items():
            true.random_(0, 99)
            self.pager.write(number, {name: true})

    def run(self, actions: Sequence[str]) -> None:
        everything = list(range(len(self.truth)))
        for action in actions:
            some = [number for number in everything if self.random.random() < 0.6]
            if action == "step":
                self.step(everything, changes=True)
            elif action == "norms, step":
                self.step(everything, changes=False)
                self.step(everything, changes=True)
            elif action == "some":
                self.step(some, changes=True)
            elif action == "backwards, one by one":
                self.step(everything[::-1], changes=True)
            elif action == "read in the middle":
                self.step(some, changes=True)
                self.look()
            elif action == "read only":
                self.step(some, changes=False)
            elif action == "read only, look, step":
                self.step(everything, changes=False)
                self.look()
                self.step(everything, changes=True)
            elif action == "look":
                self.look()
            elif action == "write":
                self.write(self.random.choice(everything))
            if action not in ("look", "write"):
                self.pager.end_step()
                if self.random.random() < 0.5:
                    self.stream.drain()
        self.look()
        self.stream.drain()
        for found, expected in self.read:
            assert torch.equal(found, expected)
        counted = self.pager.statistics  # what fits into the ring is stored in each step and never fetched again
        assert counted.bytes_out <= counted.steps * counted.far_bytes
        self.pager.close()


ACTIONS = (
    *("step", "step", "step", "norms, step", "some", "backwards, one by one", "read in the middle", "read only"),
    *("look", "write", "read only, look, step"),
)


def schedule(seed: int) -> None:
    """A run that a seed decides."""
    draw = random.Random(seed)
    wanted = [
        Want((rows, length), tuple((n, DTYPES[n]) for n in draw.sample(sorted(DTYPES), draw.randint(1, 3))), length)
        for rows, length in ((draw.randint(1, 30), draw.randint(1, 300)) for _ in range(draw.choice([1, 2, 4, 8])))
    ]
    total = sum(want.nbytes(want.numel) for want in wanted)
    resident = draw.choice([0, 0, total // 10, total // 3, total * 2])
    torch.manual_seed(seed)
    model = Model(wanted, seed, draw.choice([0.0, 0.0, 0.2, 0.7]), resident, draw.choice([13_000, 20_000]))
    model.run([draw.choice(ACTIONS) for _ in range(draw.randint(2, 9))])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowbit_lightning.state.pages.layout.SMALLEST", 5_000)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32))
def test_schedules(seed: int) -> None:
    schedule(seed)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32))
def test_many_schedules(seed: int) -> None:
    schedule(seed)


# -- mutation: every line that orders something is needed ----------------------------------------------------------


def fails(run: Callable[[int], None], tries: int = 600) -> bool:
    for seed in range(110, 110 + tries):
        try:
            run(seed)
        except (AssertionError, AttributeError):  # wrong numbers, a broken promise, or no event where one must be
            return True
    return False


LINES = {  # lines of the pager that order something -> what stands there without them
    "after=slot.last)\n            slot.holds = chunk.moves": "after=None)\n            slot.holds = chunk.moves",
    "self.transport.store(slot.holds, after=slot.last)": "self.transport.store(slot.holds, after=None)",
    "self.transport.wait(slot.last)": "pass",
    "        self._wait(chunk.slot)  # an open one too: these kernels may be launched from another stream\n": "",
    "chunk.slot.last = self.transport.computed(chunk.moves)": "self.transport.computed(chunk.moves)",
    "                self.transport.settle(slot.last)\n": "                pass\n",
    "            if slot.unsaved:\n                self._store(slot)\n": "            pass\n",
    "            if not self._settled:  # or the host may be about to change the slab\n": "            if True:\n",
    "            slot.holds = slot.last = None\n": "            slot.last = None\n",
}


@pytest.mark.parametrize("line", LINES)
def test_without_a_line_the_schedules_fail(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lowbit_lightning.state.pages import pager

    with open(pager.__file__, encoding="utf-8") as file:
        text = file.read()
    assert text.count(line) == 1, "the pager has changed: say here what its waits are now"
    scope: dict[str, Any] = {"__name__": pager.__name__}
    exec(compile(text.replace(line, LINES[line]), pager.__file__, "exec"), scope)
    monkeypatch.setitem(globals(), "Pager", scope["Pager"])
    assert fails(schedule)
