"""The plan of a step: it turns the parameters of a group into launches, which are kept for the next step.

Parameters are grouped once. A launch takes the parameters on one device with equal dtypes (of parameter, gradient and
states), and, if states are paged, those of one chunk. A parameter that is cut into several chunks becomes several rows
of launches. It is cut at the borders of its rows or blocks, and its scales, its gradient and its random words are cut
with it. Each piece advances a step count of its own. A norm over the whole parameter is the fold of its pieces' sums,
in the order that the reference's ``optimizer_norms`` defines.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lowbit_lightning import kernels
from lowbit_lightning.kernels import StepArguments, StepScalars
from lowbit_lightning.kernels.formats import FOLD, BlockGrid, Span
from lowbit_lightning.kernels.reference.step import fold_sums
from lowbit_lightning.optim import partitions
from lowbit_lightning.optim.factors import Asked, Factors, factors
from lowbit_lightning.optim.settings import Settings, state_bits
from lowbit_lightning.state import shards
from lowbit_lightning.state.form import MASTER, STEP, codes_name, is_coded, scales_name
from lowbit_lightning.state.pages import Chunk, Pager, Piece
from lowbit_lightning.state.store import Everyone, Given, Store

Scalars = Callable[[torch.device, int], StepScalars]
"""Gives the scalars of a step for parameters on a device, with the given bits of their states."""
_PLACE, _DTYPE = operator.attrgetter("shape", "dtype", "device"), operator.attrgetter("dtype")


class Work(NamedTuple):
    """The parameters of a group that a step changes.

    ``params``: the parameters as the user knows them. ``local``, ``grads``: this rank's parts of them and of their
    gradients. ``ordinals``: their indices among all parameters of the optimizer.
    """

    settings: Settings
    params: list[Tensor]
    local: list[Tensor]
    grads: list[Tensor]
    ordinals: list[int]


class Plans:
    """The plans of an optimizer: for each parameter the last plan that it was in.

    A plan is kept as long as the store keeps the version that the plan was made for.
    """

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[Any, dict[Tensor, Plan]] = WeakKeyDictionary()

    def run(self, groups: Iterable[tuple], store: Store, everyone: Everyone, asked: Asked) -> None:
        """Do a step.

        ``groups``: for each group with gradients its settings, and the parameters, gradients and ordinals of those that
        have one.

        Raises:
            ValueError: for a sparse gradient.
        """
        work = [_collect(*group) for group in groups]
        plans = self._plans_of(work, store, everyone)
        params, grads = [p for part in work for p in part.params], [grad for part in work for grad in part.grads]
        found = factors(params, grads, asked, any(part.settings.group["skip_nonfinite"] for part in work))
        for part, plan in zip(work, plans, strict=True):
            plan.run(part, found)

    def _plans_of(self, work: list[Work], store: Store, everyone: Everyone) -> list[Plan]:
        while True:
            version = store.pagers.version
            plans = [self._plan(part, store, everyone) for part in work]
            if store.pagers.version is version:  # otherwise a new pager took over states of earlier plans
                return plans

    def _plan(self, work: Work, store: Store, everyone: Everyone) -> Plan:
        settings, params = work.settings, work.params
        known = self._known.get(store.pagers.version, {})
        plan = known.get(params[0])
        if plan is not None and plan.fits(work, store.held(params)):
            return plan
        del plan
        for p in params:  # old plans would keep the memory of states that are converted now
            known.pop(p, None)
        if settings.rule.norms:
            partitions.check_rule(settings.rule, [p for p, _ in everyone()])
        settings.keep_format(store)
        given = [store.give(p, form, everyone) for p, form in settings.forms(params)]
        plan = Plan(work, given)
        # A shard may be another tensor in the next step; of paged parameters the addresses are compared.
        if settings.group["paged"] or not any(map(shards.is_sharded, params)):
            self._known.setdefault(store.pagers.version, {}).update(dict.fromkeys(params, plan))
        return plan


class Plan:
    """The launches of a group's steps, in order. They are valid while parameters and states stay the same objects."""

    def __init__(self, work: Work, given: list[Given]) -> None:
        self._key, self._params, self._places = work.settings.key, list(work.params), _places(work)
        self._held = [value for x in given for value in x.held]
        self._launches = _launches(work, given)

    def fits(self, work: Work, held: list[Any]) -> bool:
        same = self._key == work.settings.key and _same(self._params, work.params) and _same(self._held, held)
        return same and self._places == _places(work)

    def run(self, work: Work, found: Factors) -> None:
        """Do the step. ``found``: the factors of gradients, and whether to skip."""
        known: dict[tuple[torch.device, int], StepScalars] = {}

        def scalars(device: torch.device, bits: int) -> StepScalars:
            if (device, bits) not in known:
                known[device, bits] = work.settings.scalars(device, bits, found)
            return known[device, bits]

        for launch in self._launches:
            launch.copy_step_counts()
        kinds = len(work.settings.rule.norms)
        norms = self._norms(work, kinds, scalars) if kinds else {}
        for launch in self._launches:
            device = launch.arguments.device
            launch.step(work.grads, scalars(device, launch.bits), norms.get(device))
        shards.mark_changed(work.params)

    def _norms(self, work: Work, kinds: int, scalars: Scalars) -> dict[torch.device, Tensor]:
        """The norms over all ranks, float64 ``[n, kinds]`` for each device, by number. A collective."""
        devices = dict.fromkeys(p.device for p in work.local)  # in the same order on all ranks
        found = {x: torch.zeros(len(work.params), kinds, dtype=torch.float64, device=x) for x in devices}
        cut: dict[torch.device, dict[int, list[Tensor]]] = {device: {} for device in found}
        for launch in self._launches:
            device = launch.arguments.device
            launch.add_norms(work.grads, scalars(device, launch.bits), found[device], cut[device])
        for device, norms in found.items():
            for i, parts in cut[device].items():
                norms[i] = fold_sums(torch.cat(parts))
            shards.sum_over_shards(work.params, norms)
        return found


class Row(NamedTuple):
    """One parameter of a launch, or a part of one.

    ``number``: the parameter's index in the work. ``span``: the part's elements; None for the whole parameter.
    """

    number: int
    span: Span | None
    param: Tensor
    step: Tensor
    states: list[Tensor]
    scales: list[Tensor | None]
    remainder: Tensor | None
    ordinal: int
    offset: int

    def cut(self, span: Span, block_size: int) -> Row:
        """A part of this row. It still has the step count of the whole."""
        grid = BlockGrid.of(self.param.shape, block_size)
        return self._replace(
            span=span,
            param=span.of(self.param, grid),
            states=[span.of(x, grid) for x in self.states],
            scales=[None if x is None else span.of_scales(x, grid) for x in self.scales],
            remainder=None if self.remainder is None else span.of(self.remainder, grid),
            offset=self.offset + span.start,
        )


def _arguments(settings: Settings, rows: Sequence[Row]) -> StepArguments:
    states = range(len(settings.rule.states))
    return StepArguments(
        rule=settings.rule.name,
        params=[row.param for row in rows],
        steps=[row.step for row in rows],
        states=[[row.states[s] for row in rows] for s in states],
        scales=[[_or(row.scales[s], row.step) for row in rows] for s in states],
        block_size=settings.group["block_size"],
        ordinals=[row.ordinal for row in rows],
        offsets=[row.offset for row in rows],
        stochastic_rounding=settings.group["stochastic_rounding"],
        remainders=[row.remainder for row in rows if row.remainder is not None],
    )


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    return other if x is None else x


class Launch:
    """One launch of a step.

    ``place``: the pager and the chunk of its states, if they are paged. ``count``: the number of parameters in the
    work.
    """

    def __init__(self, settings: Settings, rows: list[Row], place: tuple[Pager, Chunk] | None, count: int) -> None:
        self._takes_all = [(row.number, row.span) for row in rows] == [(i, None) for i in range(count)]
        self._copies: list[tuple[Tensor, Tensor]] = []  # step counts of pieces, with their parameters' counts
        for k, row in enumerate(rows):
            if row.span is not None and row.span.start:  # the first piece advances the parameter's own count
                self._copies.append((torch.zeros_like(row.step), row.step))
                rows[k] = row._replace(step=self._copies[-1][0])
        self._settings, self._rows, self._place = settings, rows, place
        self.arguments = _arguments(settings, rows)
        self.bits = 8 if self.arguments.coded else 32

    @property
    def index(self) -> int:
        """The launch's place in the order of chunks. Launches without paged states come first."""
        return -1 if self._place is None else self._place[1].index

    def copy_step_counts(self) -> None:
        """Copy the step counts of parameters to their pieces."""
        for count, followed in self._copies:
            count.copy_(followed)

    def step(self, grads: Sequence[Tensor], scalars: StepScalars, norms: Tensor | None) -> None:
        """Launch the step. ``grads`` and ``norms`` are those of all parameters of the work."""
        if not self._takes_all:
            grads = _of(self._rows, grads, self.arguments.block_size)
            norms = None if norms is None else norms.index_select(0, self._numbers)
        self._bring_near(changes=True)
        kernels.optimizer_step(self.arguments, grads, scalars, norms)

    def add_norms(
        self, grads: Sequence[Tensor], scalars: StepScalars, norms: Tensor, cut: dict[int, list[Tensor]]
    ) -> None:
        """Write sums of squares into ``norms``, float64 ``[n, kinds]``. The sums of pieces, ``[folds, kinds]``, are
        appended to ``cut``, by the number of their parameter."""
        self._bring_near(changes=False)
        rows, arguments = self._folds
        values = kernels.optimizer_norms(arguments, _of(rows, grads, self.arguments.block_size), scalars)
        if all(row.span is None for row in rows):
            norms.index_copy_(0, self._numbers, values)
            return
        for row, value in zip(rows, values.split(1), strict=True):
            cut.setdefault(row.number, []).append(value)

    def _bring_near(self, changes: bool) -> None:
        if self._place is not None:
            pager, chunk = self._place
            pager.near(chunk, changes)

    @cached_property
    def _numbers(self) -> Tensor:
        """The rows' numbers. They are sent to the device once, because the host waits for every copy."""
        return torch.tensor([row.number for row in self._rows], device=self.arguments.device)

    @cached_property
    def _folds(self) -> tuple[list[Row], StepArguments]:
        """The rows with pieces cut further, into parts that are folded by themselves, and the launch's arguments."""
        if all(row.span is None for row in self._rows):
            return self._rows, self.arguments
        size, rows = FOLD * self.arguments.block_size, list[Row]()
        for row in self._rows:
            if row.span is None:
                rows.append(row)
                continue
            numel, first = row.param.numel(), row.span.start
            for start in range(0, numel, size):
                span = Span(start, min(numel, start + size))
                part = row.cut(span, self.arguments.block_size)
                rows.append(part._replace(span=Span(first + span.start, first + span.stop)))
        return rows, _arguments(self._settings, rows)


def _of(rows: Sequence[Row], grads: Sequence[Tensor], block_size: int) -> list[Tensor]:
    """The gradients of the rows, cut from those of whole parameters."""
    return [
        grads[row.number]
        if row.span is None
        else row.span.of(grads[row.number], BlockGrid.of(grads[row.number].shape, block_size))
        for row in rows
    ]


def _launches(work: Work, given: Sequence[Given]) -> list[Launch]:
    """The launches of a group's step, in the order of the chunks."""
    settings = work.settings
    alike: dict[tuple, list[tuple[int, Piece | None]]] = {}
    for i, (p, grad, (kept, _, _, pieces)) in enumerate(zip(work.local, work.grads, given, strict=True)):
        coded = tuple(is_coded(kept, name) for name in settings.rule.state_names)
        kind = p.device, p.dtype, grad.dtype, MASTER in kept, coded
        some: list[Piece | None] = [*pieces] or [None]
        for piece in some:
            alike.setdefault((None if piece is None else piece.chunk, *kind), []).append((i, piece))
    launches = []
    for (chunk, *_), members in alike.items():
        rows = [_row(work, given[i].kept, i, piece) for i, piece in members]
        pager = given[members[0][0]].pager
        launches.append(Launch(settings, rows, None if pager is None else (pager, chunk), len(work.params)))
    return sorted(launches, key=lambda launch: launch.index)


def _row(work: Work, kept: dict[str, Tensor], i: int, piece: Piece | None) -> Row:
    p, names = work.local[i], work.settings.rule.state_names
    codes = [codes_name(name) if is_coded(kept, name) else name for name in names]
    row = Row(
        number=i,
        span=None,
        param=p,
        step=kept[STEP],
        states=[kept[name] for name in codes],
        scales=[kept.get(scales_name(name)) for name in names],
        remainder=kept.get(MASTER),
        ordinal=work.ordinals[i],
        offset=shards.first_index(work.params[i]),
    )
    if piece is None:
        return row
    if piece.span != Span(0, p.numel()):
        row = row.cut(piece.span, work.settings.group["block_size"])
    shape = row.param.shape
    near = {name: x.view(shape) for name, x in piece.states.items()}
    return row._replace(states=[near[name] for name in codes], remainder=near.get(MASTER))


def _collect(settings: Settings, params: list[Tensor], grads: list[Tensor], ordinals: list[int]) -> Work:
    for p, grad in zip(params, grads, strict=True):
        if grad.layout is not torch.strided:
            raise ValueError(
                f"a parameter of shape {tuple(p.shape)} has a sparse gradient ({grad.layout}); "
                "build its embedding with sparse=False"
            )
    local = [shards.local(p) for p in params]
    return Work(settings, params, local, list(map(shards.part_of, params, grads)), ordinals)


def _places(work: Work) -> list[Any]:
    """The properties that ``p.data = ...``, ``model.to(...)`` and ``p.state_bits = ...`` can change while a parameter
    stays the same object."""
    views = [(x.data_ptr(), x.stride()) for x in work.local] if work.settings.group["paged"] else []  # pieces are views
    bits = map(state_bits, work.params)
    return [*map(_PLACE, work.params), *map(_DTYPE, work.grads), *work.ordinals, *bits, *views]


def _same(ours: list[Any], theirs: list[Any]) -> bool:
    """Whether two lists hold the same objects."""
    return len(ours) == len(theirs) and all(map(operator.is_, ours, theirs))
