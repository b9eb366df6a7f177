"""Paged states: which parameters' they are, and the pager that holds them."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowbit_lightning.optim import partitions
from lowbit_lightning.optim.options import parse_bytes
from lowbit_lightning.state import pages, shards
from lowbit_lightning.state.pages import Entries, Pager, PageStatistics, Want, raw
from lowbit_lightning.state.pages.file import FileTransport

if TYPE_CHECKING:
    from lowbit_lightning.optim.base import LowBitOptimizer


class Pagers:
    """The pagers of an optimizer: one for each device that paged parameters lie on."""

    def __init__(self) -> None:
        self.pagers: dict[torch.device, Pager] = {}
        self._places: dict[Tensor, tuple[Pager, int]] = {}
        self._settings: dict[torch.device, tuple] = {}
        # Values of ``paged`` for which there is nothing to page to.
        self._unpageable: set[tuple[Any, torch.device]] = set()
        self._passed: list[Tensor] = []  # parameters in the order of the first pass that updates them one by one
        self._order: dict[Tensor, int] | None = None
        self._before: dict[torch.device, PageStatistics] = {}

    def renewed(self) -> Pagers:
        """One without pagers, for states that are loaded: the old ones' slab stays as it is."""
        new = Pagers()
        new._order, new._unpageable = self._order, self._unpageable
        new._before = self._before | {device: pager.statistics for device, pager in self.pagers.items()}
        return new

    # -- whose states are paged --------------------------------------------------------------------------------------

    def place(self, optimizer: LowBitOptimizer, p: Tensor, group: dict[str, Any]) -> tuple[Pager, int] | None:
        """The pager that is to hold p's states, and p's number there; None where they are not paged.

        Where no pager has room for them in their form, makes one that holds all that is paged on p's device.
        """
        want = self._want(optimizer, p, group)
        if want is None:
            return None
        device = shards.local(p).device
        place = self._places.get(p)
        same = place is not None and place[0] is self.pagers.get(device) and place[0].wants[place[1]] == want
        if not same or self._settings[device] != _settings(group):
            self._build(optimizer, device, group)
            place = self._places.get(p)
        return place

    def _want(self, optimizer: LowBitOptimizer, p: Tensor, group: dict[str, Any]) -> Want | None:
        unpageable = (group["paged"], shards.local(p).device) in self._unpageable
        return None if unpageable else want_of(optimizer, p, group)

    # -- pagers ------------------------------------------------------------------------------------------------------

    def _build(self, optimizer: LowBitOptimizer, device: torch.device, group: dict[str, Any]) -> None:
        """A new pager for a device, with all states in it that the old one had in their present form."""
        wants: dict[Tensor, Want] = {}
        for p, (pager, number) in self._places.items():  # DeepSpeed shows one group at a time
            if partitions.is_partition(p) and pager is self.pagers.get(device):
                wants[p] = pager.wants[number]
        for other in optimizer.param_groups:
            for p in other["params"]:
                if shards.local(p).device == device and (p.requires_grad or raw(optimizer.state.get(p, {}))):
                    want = self._want(optimizer, p, other)
                    if want is not None:
                        wants[p] = want
                        _check_equal(group, other)
        if self._order is not None:
            last = len(self._order)
            order = self._order
            wants = dict(sorted(wants.items(), key=lambda item: order.get(item[0], last)))
        transport = pages.open_transport(group["paged"], device, group["page_dir"])
        if transport is None:
            self._unpageable.add((group["paged"], device))
            self._places = {p: place for p, place in self._places.items() if p not in wants}
            _warn_of_no_far_memory(device)
            return
        old = self.pagers.get(device)
        try:
            if old is not None:
                old.settle()
            new = Pager(transport, list(wants.values()), parse_bytes(group["resident"]))
        except BaseException:
            transport.close()
            raise
        self._places = {p: place for p, place in self._places.items() if place[0] is not old and p not in wants}
        self._places |= {p: (new, number) for number, p in enumerate(wants)}
        self.pagers[device], self._settings[device] = new, _settings(group)
        before = self._before.pop(device, None)
        if old is not None:
            self._move(optimizer, old, new)
            old.close()
            before = old.statistics
        if before is not None:
            new.statistics.go_on(before)
        optimizer.forget_plans()

    def _move(self, optimizer: LowBitOptimizer, old: Pager, new: Pager) -> None:
        for p, entries in list(optimizer.state.items()):
            if isinstance(entries, Entries) and entries.pager is old and p in self._places:
                number = self._places[p][1]
                if new.wants[number].dtypes == old.wants[entries.number].dtypes:
                    optimizer.state[p] = Entries(p, entries.raw, new, number)  # type: ignore[assignment]

    def drop_unused(self, optimizer: LowBitOptimizer) -> None:
        """Close pagers that no state lies in any more."""
        for device, pager in list(self.pagers.items()):
            if not any(isinstance(e, Entries) and e.pager is pager for e in optimizer.state.values()):
                self.pagers.pop(device).close()
                self._places = {p: place for p, place in self._places.items() if place[0] is not pager}
                optimizer.forget_plans()

    # -- steps -------------------------------------------------------------------------------------------------------

    def record_order(self, p: Tensor) -> None:
        """A step of a single parameter, in an order that is not known before."""
        if self._order is None and self.pagers:
            self._passed.append(p)

    def end_step(self, optimizer: LowBitOptimizer) -> None:
        """The step is over. After the first one of single parameters, what lies in the slab is put in their order."""
        for pager in self.pagers.values():
            if self._is_over(optimizer, pager):
                pager.end_step()
        if self._passed:
            self._order, self._passed = {p: i for i, p in enumerate(self._passed)}, []
            for device, pager in list(self.pagers.items()):
                params = [p for p, place in self._places.items() if place[0] is pager and p in self._order]
                places = [self._order[p] for p in params]
                if places != sorted(places):
                    group = next(g for g in optimizer.param_groups if any(p is params[0] for p in g["params"]))
                    try:
                        self._build(optimizer, device, group)
                    except (OSError, RuntimeError) as error:  # the step is done, and all is as it was
                        warnings.warn(
                            "the slab stays in its first order, because a second one, which the order of backward "
                            f"needs for a moment, was not to be had: {error}. Pages will be waited for longer",
                            stacklevel=2,
                        )

    def _is_over(self, optimizer: LowBitOptimizer, pager: Pager) -> bool:
        """Whether a step was the last in a pass over all states; DeepSpeed steps one group after the other."""
        shown = (p for group in optimizer.param_groups for p in group["params"])
        first = next(shown, None)
        if first is None or not partitions.is_partition(first):
            return True
        return any(self._places.get(p) == (pager, len(pager.wants) - 1) for p in (first, *shown))

    def statistics(self) -> PageStatistics | None:
        """What all pagers did; None where there are none."""
        parts = [pager.statistics for pager in self.pagers.values()]
        return PageStatistics.total(parts) if parts else None


def inherited_settings(groups: list[dict[str, Any]], new: dict[str, Any]) -> dict[str, Any]:
    """The settings of paging that a new group shares with those that are paged as it is."""
    paged = (group for group in groups if new["paged"] and group["paged"] == new["paged"])
    return next(({name: group[name] for name in ("resident", "page_dir")} for group in paged), {})


def check_pages(optimizer: LowBitOptimizer, groups: list[dict[str, Any]], share: float | None = None) -> None:
    """Raise before training for groups of an optimizer that cannot be paged: whose settings differ, or who are to lie
    on a disk and cannot (see ``open_transport``, ``FileTransport`` and its ``check_room``). ``share`` of what ZeRO
    will cut lies on this machine, if that is known. Parameters that stage 3 has cut count for nothing."""
    first: dict[torch.device, dict[str, Any]] = {}
    wanted: dict[torch.device, float] = {}
    for group in groups:
        for p in group["params"]:
            want, device = want_of(optimizer, p, group), shards.local(p).device
            if want is not None:
                _check_equal(first.setdefault(device, group), group)
                wanted.setdefault(device, 0)
                if p.requires_grad or raw(optimizer.state.get(p, {})):
                    wanted[device] += partitions.share_of_machine(p, share) * want.nbytes(want.numel)
    for device, group in first.items():
        if group["paged"] == "disk":
            transport = pages.open_transport("disk", device, group["page_dir"])
            if isinstance(transport, FileTransport):
                transport.check_room(int(wanted[device]))


def want_of(optimizer: LowBitOptimizer, p: Tensor, group: dict[str, Any]) -> Want | None:
    """What p, of a group, keeps in a slab; None where nothing of it is paged."""
    local = shards.local(p)
    form = optimizer.form(group, p.shape, p.dtype, keeps_grid=shards.keeps_grid(p))
    return form.want(tuple(local.shape), local.is_contiguous())


def to_host(p: Tensor, value: Tensor) -> Tensor:
    """A state of p in host memory: a DTensor where it was one."""
    return shards.like(p, shards.local(value).to("cpu"), value.shape, stays=True)


def to_device(p: Tensor, value: Any) -> Any:
    """A state of p where p is, in memory of its own."""
    if not isinstance(value, Tensor):
        return value
    local = shards.local(value).to(shards.local(p).device, copy=True)
    return shards.like(p, local, value.shape) if shards.is_sharded(value) else local


def _settings(group: dict[str, Any]) -> tuple:
    return group["paged"], parse_bytes(group["resident"]), group["page_dir"]


def _check_equal(group: dict[str, Any], other: dict[str, Any]) -> None:
    if _settings(group) != _settings(other):
        raise ValueError(
            "paged, resident and page_dir must be equal in all param groups that are paged, got "
            f"{_settings(group)} and {_settings(other)}: their states share one pager and its budget; a group may also "
            "have paged=False"
        )


def _warn_of_no_far_memory(device: torch.device) -> None:
    if device.type != "meta":
        warnings.warn(
            f"paged=True has no effect on {device}: states lie in host memory already, and are not paged; "
            'paged="disk" keeps them in a file',
            stacklevel=2,
        )
