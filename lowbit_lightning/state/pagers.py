"""Which parameters have paged states, and the pagers that hold them: one pager for each device."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, MutableMapping
from typing import Any

import torch
from torch import Tensor

from lowbit_lightning.state import pages, shards
from lowbit_lightning.state.form import Form, Paging
from lowbit_lightning.state.pages import Entries, Pager, PageStatistics, Want, raw
from lowbit_lightning.state.pages.file import FileTransport

Place = tuple[Pager, int]
"""A pager, and the number of a parameter there."""
Forms = Iterable[tuple[Tensor, Form]]
State = MutableMapping[Tensor, Any]
"""``optimizer.state``."""


class Version:
    """A version of the places of all states. What was made for an older version is invalid."""


class Pagers:
    """The pagers of an optimizer: one for each device with parameters whose states are paged."""

    def __init__(self) -> None:
        self._pagers: dict[torch.device, Pager] = {}
        self._places: dict[Tensor, Place] = {}
        self._settings: dict[torch.device, Paging] = {}
        self._unpageable: set[tuple[bool | str, torch.device]] = set()  # they have no memory to page to
        self._passed: list[Tensor] = []  # parameters in the order of the first pass that updates them one by one
        self._order: dict[Tensor, int] | None = None
        self._before: dict[torch.device, PageStatistics] = {}
        self._partial = False  # whether some parameters are shown at a time, as DeepSpeed does with its partitions
        self.version = Version()

    def renewed(self) -> Pagers:
        """New ``Pagers`` without a pager, for states that are loaded. The old slabs stay unchanged."""
        new = Pagers()
        new._order, new._unpageable, new._partial = self._order, self._unpageable, self._partial
        new._before = self._before | {device: pager.statistics for device, pager in self._pagers.items()}
        return new

    def statistics(self) -> PageStatistics | None:
        """The statistics of all pagers together; None if there are no pagers."""
        parts = [pager.statistics for pager in self._pagers.values()]
        return PageStatistics.total(parts) if parts else None

    # -- whose states are paged --------------------------------------------------------------------------------------

    def place(self, state: State, p: Tensor, form: Form, everyone: Callable[[], Forms]) -> Place | None:
        """The place of p's states; None if they are not paged.

        If no pager has a place for them in this form, a new pager is made for all paged states on p's device.
        ``everyone``: gives all parameters with their forms.
        """
        if form.paging is None:
            return None
        self._partial = self._partial or form.partition
        device, want = shards.local(p).device, self._want(p, form)
        if want is None:
            return None
        place = self._places.get(p)
        same = place is not None and place[0] is self._pagers.get(device) and place[0].wants[place[1]] == want
        if not same or self._settings[device] != form.paging:
            self._build(state, device, form.paging, everyone())
            place = self._places.get(p)
        return place

    def _want(self, p: Tensor, form: Form) -> Want | None:
        local = shards.local(p)
        if form.paging is None or (form.paging.kind, local.device) in self._unpageable:
            return None
        return form.want(tuple(local.shape), local.is_contiguous())

    # -- pagers ------------------------------------------------------------------------------------------------------

    def _build(self, state: State, device: torch.device, paging: Paging, forms: Forms) -> None:
        """Make a new pager for a device. It takes over the states of the old one that are already in their form."""
        wants = self._wants_on(state, device, paging, forms)
        transport = pages.open_transport(paging.kind, device, paging.directory)
        if transport is None:
            self._unpageable.add((paging.kind, device))
            self._places = {p: place for p, place in self._places.items() if p not in wants}
            _warn_of_no_far_memory(device)
            return
        old = self._pagers.get(device)
        try:
            if old is not None:
                old.settle()
            new = Pager(transport, list(wants.values()), paging.resident)
        except BaseException:
            transport.close()
            raise
        self._places = {p: place for p, place in self._places.items() if place[0] is not old and p not in wants}
        self._places |= {p: (new, number) for number, p in enumerate(wants)}
        self._pagers[device], self._settings[device] = new, paging
        before = self._before.pop(device, None)
        if old is not None:
            self._move(state, old, new)
            old.close()
            before = old.statistics
        if before is not None:
            new.statistics.go_on(before)
        self.version = Version()

    def _wants_on(self, state: State, device: torch.device, paging: Paging, forms: Forms) -> dict[Tensor, Want]:
        wants: dict[Tensor, Want] = {}
        if self._partial:  # parameters that are not shown now stay
            pager = self._pagers.get(device)
            wants = {p: pager.wants[number] for p, (holder, number) in self._places.items() if holder is pager}
        for p, form in forms:
            used = shards.local(p).device == device and (p.requires_grad or raw(state.get(p, {})))
            want = self._want(p, form) if used else None
            if want is not None:
                wants[p] = want
                _check_equal(paging, form.paging)
            else:
                wants.pop(p, None)
        if self._order is not None:
            order, last = self._order, len(self._order)
            wants = dict(sorted(wants.items(), key=lambda item: order.get(item[0], last)))
        return wants

    def _move(self, state: State, old: Pager, new: Pager) -> None:
        for p, entries in list(state.items()):
            if isinstance(entries, Entries) and entries.pager is old and p in self._places:
                number = self._places[p][1]
                if new.wants[number].dtypes == old.wants[entries.number].dtypes:
                    state[p] = Entries(p, entries.raw, new, number)

    def drop_unused(self, state: State) -> None:
        """Close pagers that hold no state any more."""
        used = {id(entries.pager) for entries in state.values() if isinstance(entries, Entries)}
        for device, pager in list(self._pagers.items()):
            if id(pager) not in used:
                self._pagers.pop(device).close()
                self._places = {p: place for p, place in self._places.items() if place[0] is not pager}
                self.version = Version()

    # -- steps -------------------------------------------------------------------------------------------------------

    def record_order(self, p: Tensor) -> None:
        """Note that a step updated the single parameter p. The order of such steps is not known before."""
        if self._order is None and self._pagers:
            self._passed.append(p)

    def end_step(self, state: State, everyone: Callable[[], Forms]) -> None:
        """End the step. After the first step that updated parameters one by one, the slab is put in their order."""
        for pager in self._pagers.values():
            last = pager, len(pager.wants) - 1
            if not self._partial or any(self._places.get(p) == last for p, _ in everyone()):
                pager.end_step()
        if self._passed:
            self._order, self._passed = {p: i for i, p in enumerate(self._passed)}, []
            self._reorder(state, everyone, self._order)

    def _reorder(self, state: State, everyone: Callable[[], Forms], order: dict[Tensor, int]) -> None:
        for device, pager in list(self._pagers.items()):
            places = [order[p] for p, place in self._places.items() if place[0] is pager and p in order]
            if places == sorted(places):
                continue
            try:
                self._build(state, device, self._settings[device], everyone())
            except (OSError, RuntimeError) as error:  # the step is done, and all is as it was
                warnings.warn(
                    "the slab stays in its first order: there is no room for a second one, which the order of "
                    f"backward needs for a moment: {error}. Steps will wait longer for pages",
                    stacklevel=2,
                )


def check(forms: Iterable[tuple[Tensor, Form, float]]) -> None:
    """Raise before training if states cannot be paged as their forms say.

    ``forms``: each parameter with its form and the share of its states that will lie on this machine.

    Raises:
        ValueError, OSError: for settings that differ, and a disk that cannot serve (see ``open_transport``,
            ``FileTransport`` and its ``check_room``).
    """
    first: dict[torch.device, Paging] = {}
    wanted: dict[torch.device, float] = {}
    for p, form, share in forms:
        local = shards.local(p)
        want = form.want(tuple(local.shape), local.is_contiguous())
        if want is not None and form.paging is not None:
            _check_equal(first.setdefault(local.device, form.paging), form.paging)
            wanted[local.device] = wanted.get(local.device, 0.0) + share * want.nbytes(want.numel)
    for device, paging in first.items():
        if paging.kind == "disk":
            transport = pages.open_transport("disk", device, paging.directory)
            if isinstance(transport, FileTransport):
                transport.check_room(int(wanted[device]))


def _check_equal(paging: Paging, other: Paging | None) -> None:
    if paging != other:
        raise ValueError(
            "paged, resident and page_dir must be equal in all param groups that are paged, got "
            f"{tuple(paging)} and {tuple(other or ())}: their states share one pager and its budget; a group may also "
            "have paged=False"
        )


def _warn_of_no_far_memory(device: torch.device) -> None:
    if device.type != "meta":
        warnings.warn(
            f"paged=True has no effect on {device}: states lie in host memory already, and are not paged; "
            'paged="disk" keeps them in a file',
            stacklevel=2,
        )
