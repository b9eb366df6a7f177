"""The kernel launches of a step: one for each part of a group; of paged states, one for each part and chunk.

A parameter that is cut into several chunks becomes several, cut at the borders of rows or blocks: its scales, its
gradient and its random words are cut with it. Each piece needs a step count of its own to advance. A norm over all of
it is the fold of its pieces' sums (``join_norms``), in the order of ``kernels.reference`` (``fold_sums``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lowbit_lightning import kernels
from lowbit_lightning.kernels import StepArguments, rules
from lowbit_lightning.kernels.formats import FOLD, BlockGrid
from lowbit_lightning.kernels.reference.step import fold_sums
from lowbit_lightning.state.form import codes_name
from lowbit_lightning.state.pages import Chunk, Pager, Piece
from lowbit_lightning.state.store import Given


class Cut(NamedTuple):
    """Elements ``start`` to ``stop - 1`` of a parameter."""

    start: int
    stop: int

    def of(self, x: Tensor, grid: BlockGrid) -> Tensor:
        """This part of a tensor that has the parameter's shape: a view where it is contiguous."""
        if grid.in_runs:
            return x.contiguous().view(-1)[self.start : self.stop]
        return x.contiguous()[self.start // grid.row_length : self.stop // grid.row_length]

    def of_scales(self, scales: Tensor, grid: BlockGrid) -> Tensor:
        if grid.in_runs:
            return scales.view(1, -1)[:, self.start // grid.block_size : -(-self.stop // grid.block_size)]
        return scales[self.start // grid.row_length : self.stop // grid.row_length]


Rows = list[tuple[int, "Cut | None"]]
"""Parameters by their number, each whole (None) or a part of it."""


class Part(NamedTuple):
    """The step for the parameters of a work at ``indices``: of one device, with states of equal ``bits``."""

    indices: list[int]
    bits: int
    arguments: kernels.StepArguments


class Launch:
    """One launch of a step, of members ``rows`` of part ``part`` of a group.

    ``place``: the pager and the chunk that its states travel in, if they are paged. ``copies``: step counts of pieces,
    with those that they follow.
    """

    def __init__(
        self, part: int, rows: Rows, arguments: StepArguments, place: tuple[Pager, Chunk] | None = None
    ) -> None:
        self.part, self.rows, self.arguments, self.place = part, rows, arguments, place
        self.copies: list[tuple[Tensor, Tensor]] = []
        self._index: Tensor | None = None
        self._folds: tuple[Rows, StepArguments] | None = None

    @property
    def index(self) -> int:
        """Where it comes in the order of chunks; first what is not paged."""
        return -1 if self.place is None else self.place[1].index

    def copy_step_counts(self) -> None:
        """Have the step counts of pieces be their parameters'."""
        for count, followed in self.copies:
            count.copy_(followed)

    def prepare(self, of_part: StepArguments, changes: bool) -> None:
        """Take gradients and settings of the part's step, and have the states where the kernels look for them."""
        a = self.arguments
        if a is not of_part:
            a.grads = [
                of_part.grads[i] if cut is None else cut.of(of_part.grads[i], of_part.grid(i)) for i, cut in self.rows
            ]
            a.copy_settings(of_part)
        if self.place is not None:
            pager, chunk = self.place
            pager.near(chunk, changes)

    def select_norms(self, norms: Tensor | None) -> Tensor | None:
        """The norms of this launch's members, of those of the part."""
        members = [i for i, _ in self.rows]
        if norms is None or members == list(range(len(norms))):
            return norms
        if self._index is None:
            self._index = torch.tensor(members, device=norms.device)
        return norms.index_select(0, self._index)

    def square_sums(self) -> list[Tensor]:
        """Sums of squares for the norms, for each row ``[n, kinds]``: of a piece, those of its n folds."""
        a = self.arguments
        if all(cut is None for _, cut in self.rows):
            return list(kernels.optimizer_norms(a).split(1))
        if self._folds is None:
            rows = [(k, fold) for k, (_, cut) in enumerate(self.rows) for fold in _folds(a, k, cut)]
            self._folds = rows, _subset(a, rows)
        rows, folds = self._folds
        folds.grads = [a.grads[k] if fold is None else fold.of(a.grads[k], a.grid(k)) for k, fold in rows]
        folds.copy_settings(a)
        counts = [sum(k == member for k, _ in rows) for member in range(len(self.rows))]
        values = kernels.optimizer_norms(folds)
        folds.forget_gradients()
        return list(values.split(counts))


def make_launches(parts: Sequence[Part], given: Sequence[Given]) -> list[Launch]:
    """The launches of a group's step, in the order of the chunks.

    ``given``: by the store, for all its parameters. Where one is paged, the parts' arguments have the states in the
    slab.
    """
    launches = []
    for number, part in enumerate(parts):
        unpaged: Rows = []
        chunks: dict[Chunk, tuple[Pager, list[tuple[int, Piece]]]] = {}
        for member, i in enumerate(part.indices):
            _, pager, pieces = given[i]
            if pager is None:
                unpaged.append((member, None))
                continue
            for piece in pieces:
                chunks.setdefault(piece.chunk, (pager, []))[1].append((member, piece))
        if unpaged:
            whole = len(unpaged) == len(part.indices)
            launches.append(Launch(number, unpaged, part.arguments if whole else _subset(part.arguments, unpaged)))
        for chunk, (pager, members) in chunks.items():
            launches.append(_paged(number, part.arguments, members, (pager, chunk)))
    return sorted(launches, key=lambda launch: launch.index)


def _paged(part: int, whole: StepArguments, members: list[tuple[int, Piece]], place: tuple[Pager, Chunk]) -> Launch:
    rows: Rows = []
    for i, piece in members:
        entire = piece.stop - piece.start == whole.params[i].numel()
        rows.append((i, None if entire else Cut(piece.start, piece.stop)))
    launch = Launch(part, rows, _subset(whole, rows), place)
    a, names = launch.arguments, rules.get(whole.rule).state_names
    for k, (_, piece) in enumerate(members):
        shape = a.params[k].shape
        for s, name in enumerate(names):
            near = piece.states[codes_name(name) if a.states[s][k].dtype == torch.uint8 else name]
            a.states[s][k] = near.view(shape)
        if a.remainders:
            a.remainders[k] = next(x for x in piece.states.values() if x.dtype == torch.int8).view(shape)
        if piece.start:  # the first one advances the parameter's own count
            launch.copies.append((torch.zeros_like(a.steps[k]), a.steps[k]))
            a.steps[k] = launch.copies[-1][0]
    return launch


def _subset(a: StepArguments, rows: Rows) -> StepArguments:
    """The same step for some of its parameters, or parts of them."""
    taken = a._select([i for i, _ in rows])
    for k, (i, cut) in enumerate(rows):
        if cut is None:
            continue
        grid = a.grid(i)
        for column in (taken.params, taken.grads, *taken.states, *([taken.remainders] if taken.remainders else [])):
            column[k] = cut.of(column[k], grid)
        for column in taken.scales:
            if column[k].ndim:  # not the placeholder of a 32-bit state
                column[k] = cut.of_scales(column[k], grid)
        taken.offsets[k] += cut.start
    return taken


def _folds(a: StepArguments, k: int, cut: Cut | None) -> list[Cut | None]:
    """The parts of a row whose sums are folded first, each by itself."""
    if cut is None:
        return [None]
    numel, size = a.params[k].numel(), FOLD * a.block_size
    return [Cut(start, min(numel, start + size)) for start in range(0, numel, size)]


def join_norms(launches: Sequence[tuple[Launch, list[Tensor]]], members: int) -> Tensor:
    """Sums of squares of a part's members, float64 ``[members, kinds]``, from what ``Launch.square_sums`` gave of each
    of its launches, in order."""
    sums: list[list[Tensor]] = [[] for _ in range(members)]
    for launch, values in launches:
        for (member, _), value in zip(launch.rows, values, strict=True):
            sums[member].append(value)
    return torch.stack([fold_sums(torch.cat(parts)) for parts in sums])
