"""The store of an optimizer's states. It gives them in the form that is asked for, and takes in loaded states.

The entries of p are always found in ``optimizer.state[p]``: as plain tensors, or as DTensors if p is one. Only the
store writes them there. It makes DTensors local once, when it gives them to a step, and wraps once what it has made or
converted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowbit_lightning.state import blocks, shards
from lowbit_lightning.state.blocks import Kept
from lowbit_lightning.state.form import MASTER, STEP, Form, codes_name, is_coded, names_of, scales_name
from lowbit_lightning.state.pagers import Forms, Pagers, Place, State
from lowbit_lightning.state.pages import Entries, Pager, Piece, in_a_slab, raw

Everyone = Callable[[], Forms]
"""All parameters of the optimizer that are shown, with their forms."""
Made = tuple[Form, Callable[[], dict[str, Any]]]
"""The form of entries that are loaded, and what makes them."""


class Given(NamedTuple):
    """What a step gets for one parameter.

    ``kept``: this rank's part of its entries. ``held``: the objects that are its entries now. ``pager``, ``pieces``:
    the place of its paged entries; None and empty if nothing is paged.
    """

    kept: Kept
    held: list[Any]
    pager: Pager | None
    pieces: list[Piece]


class Store:
    """The states of an optimizer.

    ``state``: ``optimizer.state``. ``pagers``: the pagers of the paged states; their ``version`` changes when states
    are moved.
    """

    def __init__(self, state: State, pagers: Pagers | None = None) -> None:
        self.state, self.pagers = state, pagers or Pagers()

    # -- for a step --------------------------------------------------------------------------------------------------

    def give(self, p: Tensor, form: Form, everyone: Everyone) -> Given:
        """The entries of p in ``form``. They are created, converted, paged or brought back as needed."""
        place = self.pagers.place(self.state, p, form, everyone)
        if form.partition:
            _adopt(p, raw(self.state[p]), form)
        held = self.state[p]
        fits = form.names <= raw(held).keys() and (form.master or MASTER not in held)
        if not fits or place != (held.place if isinstance(held, Entries) else None):
            self._form(p, form, place)
        entries = raw(self.state[p])
        kept = {name: shards.local(value) for name, value in entries.items() if name in form.names}
        pager, pieces = (None, []) if place is None else (place[0], place[0].pieces[place[1]])
        return Given(kept, list(entries.values()), pager, pieces)

    def _form(self, p: Tensor, form: Form, place: Place | None) -> None:
        held, local, states = self.state[p], shards.local(p), form.rule.states
        entries: dict[str, Any] = held
        if isinstance(held, Entries):  # scales and counts follow their parameter
            stays = held.is_paged if place is not None else lambda _: False
            entries = {n: value if stays(n) else shards.moved(p, value) for n, value in held.named().items()}
        kept = _local(entries)
        absent = {STEP, MASTER} - kept.keys()
        for state in states:
            if state.name not in kept and not is_coded(kept, state.name):
                absent.update(names_of(state.name))
        wanted = form.entries(local.shape)
        paged = {entry.name for entry in wanted if entry.paged and place is not None}
        made = {
            entry.name: blocks.filled(entry, local.device, spread=entry.name in paged)
            for entry in wanted
            if entry.name in absent
        }
        codings = {state.name: (state.codebook, form.block_size) for state in states}
        _put(p, entries, kept, made | blocks.convert(kept, codings, form, local.device), form, unwrapped=paged)
        if not form.master:
            entries.pop(MASTER, None)
        self.state[p] = entries if place is None else Entries(p, entries, *place)
        if isinstance(held, Entries):
            self.pagers.drop_unused(self.state)

    def held(self, params: Iterable[Tensor]) -> list[Any]:
        """The objects that are the parameters' entries now. A plan is valid for these objects."""
        return [value for p in params for value in raw(self.state[p]).values()]

    # -- conversions -------------------------------------------------------------------------------------------------

    def requantise(self, forms: Forms) -> None:
        """Requantise the coded states whose block size is not that of their form. Nothing else changes.

        Raises:
            ValueError: for scales that fit no block size; nothing has been changed then.
        """
        changes = []
        for p, form in forms:
            entries, shape = raw(self.state.get(p, {})), shards.local(p).shape
            coded = [state for state in form.rule.states if is_coded(entries, state.name)]
            sizes = {s.name: blocks.block_size_of(shape, _local(entries), s.name, form.block_size) for s in coded}
            if any(size != form.block_size for size in sizes.values()):
                bits = tuple(8 if state in coded else 32 for state in form.rule.states)
                codings = {state.name: (state.codebook, sizes[state.name]) for state in coded}
                changes.append((p, replace(form, bits=bits), codings))
        for p, form, codings in changes:
            held = self.state[p]
            kept = _local(dict(held.items()))
            _put(p, held, kept, blocks.convert(kept, codings, form, shards.local(p).device), form)

    def load(self, made: Mapping[Tensor, Made], everyone: Everyone) -> None:
        """Take in loaded entries. They are made one parameter at a time, and paged ones go to their slab at once."""
        self.state.update({p: {STEP: None} for p in made})  # so that one slab is made for all of them
        for p, (form, make) in made.items():
            self.state[p] = _owned(make())
            if form.paging is not None:  # at once: what is not, Lightning moves to the device
                self.give(p, form, everyone)


def _local(entries: Mapping[str, Any]) -> Kept:
    return {name: shards.local(value) for name, value in entries.items()}


def _put(p: Tensor, entries: Any, kept: Kept, made: Kept, form: Form, unwrapped: Collection[str] = ()) -> None:
    """Replace ``kept``, the entries of p, by ``made``. If p is a DTensor they become DTensors, except the step count
    and the ``unwrapped`` ones."""
    for name in {name for state in form.rule.states for name in names_of(state.name)} & kept.keys() - made.keys():
        del entries[name]
    shapes = {entry.name: entry.shape for entry in form.entries(p.shape)}
    for name, value in made.items():
        if value is not kept.get(name):
            entries[name] = value if name == STEP or name in unwrapped else shards.leave(p, value, shapes[name])


def _adopt(p: Tensor, entries: dict[str, Any], form: Form) -> None:
    """Take over what DeepSpeed wrote into a partition's entries: values, which are newer than the codes, and one
    ``step`` on the CPU for several partitions."""
    for state in form.rule.states:
        if state.name in entries:
            entries.pop(codes_name(state.name), None)
            entries.pop(scales_name(state.name), None)
    if STEP in entries:
        step = torch.as_tensor(entries[STEP]).detach()
        entries[STEP] = step.to(p.device, torch.float32, copy=True).reshape(())


def _owned(entries: dict[str, Any]) -> dict[str, Any]:
    """Entries that no other optimizer's step will change. Paged entries of a live optimizer are its slab's memory, so
    they are copied."""
    shared = any(isinstance(value, Tensor) and in_a_slab(value) for value in entries.values())
    return copy.deepcopy(entries) if shared else entries
