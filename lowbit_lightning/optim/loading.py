"""Saved states, in an optimizer's form: all are checked before anything is changed.

States that are paged go to their slab one parameter at a time. The slab is a new one: states of before, which may be
those that are loaded, stay as they are until all new ones are there, and are put back where that fails.
"""

from __future__ import annotations

import copy
import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lowbit_lightning.optim.options import OWN, wants_master
from lowbit_lightning.optim.paging import to_host, want_of
from lowbit_lightning.state import bitsandbytes, blocks, shards
from lowbit_lightning.state.form import MASTER, StateFormat, codes_name, scales_name
from lowbit_lightning.state.pages import Entries, in_a_slab

if TYPE_CHECKING:
    from lowbit_lightning.optim.base import LowBitOptimizer

Conversions = dict[Tensor, Callable[[], dict[str, Any]]]
"""How the states of a parameter come about."""


def load(optimizer: LowBitOptimizer, torch_load: Callable[[dict[str, Any]], None], state_dict: dict[str, Any]) -> None:
    """``LowBitOptimizer.load_state_dict``; ``torch_load`` is torch's."""
    conversions: Conversions = {}

    # torch's method casts every state to its parameter's dtype. It gets none; they come in behind it.
    def withhold_states(_: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        saved = bitsandbytes.native_groups(saved, optimizer.defaults)
        pairs = zip(saved["param_groups"], optimizer.param_groups, strict=False)
        groups = [
            {**{k: ours[k] for k in optimizer.defaults if k in ours}, **theirs, **{k: ours[k] for k in OWN}}
            for theirs, ours in pairs
        ]
        conversions.update(_checked(optimizer, saved, groups))
        return {**saved, "state": {}, "param_groups": groups + saved["param_groups"][len(groups) :]}

    if not optimizer.state:  # cleared, perhaps to make room
        _forget_pagers(optimizer)
    _remove_hooks(optimizer)  # of a load that an interrupt struck before it could clean up
    optimizer.register_load_state_dict_pre_hook(withhold_states)
    optimizer.register_load_state_dict_post_hook(lambda _: _install(optimizer, conversions), prepend=True)
    try:
        with all_or_nothing([optimizer]):
            torch_load(state_dict)
    except OSError as error:
        if error.errno != errno.ENOSPC or not any(isinstance(held, Entries) for held in optimizer.state.values()):
            raise
        raise OSError(
            error.errno,
            f"{error.strerror}, or give up the states of before, which are kept until all new ones are there: "
            "optimizer.state.clear(), and load again, both behind the except block, whose traceback keeps them alive",
        ) from error
    finally:
        _remove_hooks(optimizer)


def _remove_hooks(optimizer: LowBitOptimizer) -> None:
    """Those of ``load``."""
    for hooks in (optimizer._optimizer_load_state_dict_pre_hooks, optimizer._optimizer_load_state_dict_post_hooks):
        for number in [n for n, hook in hooks.items() if getattr(hook, "__module__", None) == __name__]:
            del hooks[number]


@contextmanager
def all_or_nothing(optimizers: Sequence[Optimizer]) -> Iterator[None]:
    """A load that fails inside leaves the optimizers with the states, groups and pagers of before."""
    names = ("state", "param_groups", "_pages")  # loading makes new ones
    before = [{name: vars(optimizer)[name] for name in names if name in vars(optimizer)} for optimizer in optimizers]
    try:
        yield
    except BaseException:
        for optimizer, attributes in zip(optimizers, before, strict=True):
            vars(optimizer).pop("_pages", None)
            vars(optimizer).update(attributes)
        raise


def _checked(optimizer: LowBitOptimizer, saved: dict[str, Any], groups: list[dict[str, Any]]) -> Conversions:
    """How saved states are converted, each found to be possible; of parameters that are not paged, done."""
    conversions: Conversions = {}
    for theirs, ours, group in zip(saved["param_groups"], optimizer.param_groups, groups, strict=False):
        parsed = format_of(theirs)
        for key, p in zip(theirs["params"], ours["params"], strict=False):
            if key not in saved["state"]:
                continue
            entries = saved["state"][key]
            _translated(optimizer, p, entries, parsed, group)
            conversions[p] = partial(converted, optimizer, p, entries, parsed, group)
    for p in [p for ours in optimizer.param_groups if not ours["paged"] for p in ours["params"] if p in conversions]:
        conversions[p] = partial(dict, conversions[p]())
    return conversions


def _install(optimizer: LowBitOptimizer, conversions: Conversions) -> None:
    _forget_pagers(optimizer)
    optimizer.state.update({p: {"step": None} for p in conversions})  # whose states are paged, all in one slab
    for group in optimizer.param_groups:
        rule = optimizer._rule_of(group)  # the checkpoint may have chosen another
        group["state_format"] = StateFormat.of(rule, group["block_size"]).to_dict()
        for p in (p for p in group["params"] if p in conversions):
            optimizer.state[p] = _owned(conversions[p]())
            if group["paged"]:  # at once: what is not, Lightning moves to the device
                optimizer._entries(p, group, rule)


def _owned(entries: dict[str, Any]) -> dict[str, Any]:
    """Entries that no step of another optimizer changes: those of a live one, if paged, are its slab's memory."""
    shared = any(isinstance(value, Tensor) and in_a_slab(value) for value in entries.values())
    return copy.deepcopy(entries) if shared else entries


def _forget_pagers(optimizer: LowBitOptimizer) -> None:
    """From here on states in their slabs, and whoever holds the old ``_pages``, are all that keeps them alive."""
    optimizer.forget_plans()
    optimizer.__dict__["_pages"] = optimizer._paging.renewed()


def _translated(
    optimizer: LowBitOptimizer, p: Tensor, entries: dict[str, Any], saved: StateFormat | None, group: dict[str, Any]
) -> tuple[dict[str, Any], StateFormat | None]:
    """Saved entries of p under this library's names, and their format.

    Raises:
        ValueError: for entries that are missing or malformed.
    """
    rule = optimizer._rule_of(group)
    if bitsandbytes.is_foreign(entries):
        entries, saved = bitsandbytes.translate(p, entries, rule)
    entries = optimizer._completed(entries)
    if not entries:
        return entries, saved
    step = entries.get("step")
    if not isinstance(step, (int, float, Tensor)) or (isinstance(step, Tensor) and step.numel() != 1):
        raise ValueError(f"the checkpoint's step must be one number, got {step!r}; it holds {sorted(entries)}")
    for state in rule.states:
        blocks.check(p, state, entries, saved)
    if MASTER in entries and wants_master(p, group):
        blocks.checked(p, entries, MASTER, p.shape)
    return entries, saved


def converted(
    optimizer: LowBitOptimizer, p: Tensor, entries: dict[str, Any], saved: StateFormat | None, group: dict[str, Any]
) -> dict[str, Any]:
    """Entries of p in the form that ``group`` asks for: the same tensors where nothing changes. What is to be paged
    comes in host memory. ``saved`` describes coded entries. Raises ValueError as ``_translated`` does.
    """
    entries, saved = _translated(optimizer, p, entries, saved, group)
    if not entries:
        return {}
    rule = optimizer._rule_of(group)
    count = shards.full(torch.as_tensor(entries["step"])).to(device=shards.local(p).device, dtype=torch.float32)
    result = {"step": count.reshape(()).clone()}  # states that are converted leave the checkpoint untouched
    for state in rule.states:
        bits = optimizer._bits(p, group, state)
        result.update(blocks.convert(p, state, entries, saved, bits, group["block_size"]))
    if MASTER in entries and wants_master(p, group):
        result[MASTER] = shards.like(p, blocks.placed(p, entries[MASTER], torch.int8), p.shape)
    names = [n for s in rule.states for n in (s.name, codes_name(s.name), scales_name(s.name))]
    known = {*result, MASTER, *names}
    want = want_of(optimizer, p, group)
    if want is not None:  # the states of one parameter at a time are near; what stays so is no checkpoint's memory
        pages = dict(want.dtypes)
        result = {name: to_host(p, value) if name in pages else value.clone() for name, value in result.items()}
    return {**{k: v for k, v in entries.items() if k not in known}, **result}


def format_of(group: dict[str, Any]) -> StateFormat | None:
    saved = group.get("state_format")
    return None if saved is None else StateFormat.parse(saved)
