"""What a step works on, and what is kept from one step to the next."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowbit_lightning import kernels
from lowbit_lightning.kernels import rules
from lowbit_lightning.optim.launches import Launch, Part, make_launches
from lowbit_lightning.state import blocks, shards
from lowbit_lightning.state.form import MASTER, codes_name, scales_name
from lowbit_lightning.state.store import Given

FORM = ("bits", "min_size", "block_size", "master", "stochastic_rounding", "paged", "resident", "page_dir")
"""Group keys that decide what a group's launches are."""
_PLACE, _DTYPE = operator.attrgetter("shape", "dtype", "device"), operator.attrgetter("dtype")


class Work(NamedTuple):
    """The parameters of a group that a step is to change, and this rank's parts of their gradients.

    ``ordinals``: their places among all parameters.
    """

    group: dict[str, Any]
    params: list[Tensor]
    grads: list[Tensor]
    ordinals: list[int]


class Plan(NamedTuple):
    """The launches of a group's steps, in order, kept while parameters and states stay the same objects."""

    form: tuple
    params: list[Tensor]
    held: list[Any]
    places: list[Any]
    parts: list[Part]
    launches: list[Launch]

    def fits(self, form: tuple, work: Work, held: list[Any]) -> bool:
        same = self.form == form and _same(self.params, work.params) and _same(self.held, held)
        return same and self.places == places(work)


def make_plan(form: tuple, work: Work, rule: rules.Rule, given: list[Given], held: list[Any]) -> Plan:
    """The plan of a group's steps; ``given``: what the store gave for each parameter, and ``held`` what it holds."""
    entries = [x.kept for x in given]
    alike: dict[tuple, list[int]] = {}
    for i, p in enumerate(work.params):
        alike.setdefault((p.device, MASTER in entries[i], bits_of(entries[i], rule)), []).append(i)
    parts = [Part(rows, bits, _arguments(work, entries, rows, rule)) for (_, _, bits), rows in alike.items()]
    return Plan(form, list(work.params), held, places(work), parts, make_launches(parts, given))


def _arguments(
    work: Work, entries: list[dict[str, Tensor]], indices: list[int], rule: rules.Rule
) -> kernels.StepArguments:
    """The step for some of the work's parameters, of one device."""
    group, entries, params = work.group, [entries[i] for i in indices], [work.params[i] for i in indices]
    states, scales = [], []
    for state in rule.states:
        coded = [blocks.is_coded(e, state.name) for e in entries]
        names = [codes_name(state.name) if c else state.name for c in coded]
        states.append([e[name] for e, name in zip(entries, names, strict=True)])
        pairs = zip(entries, coded, strict=True)
        scales.append([e[scales_name(state.name)] if c else e["step"] for e, c in pairs])
    return kernels.StepArguments(
        rule=rule.name,
        params=[shards.local(p) for p in params],
        grads=[work.grads[i] for i in indices],
        steps=[e["step"] for e in entries],
        states=states,
        scales=scales,
        hyper=[0.0] * len(rule.hyper),
        block_size=group["block_size"],
        ordinals=[work.ordinals[i] for i in indices],
        offsets=[shards.first_index(p) for p in params],
        stochastic_rounding=group["stochastic_rounding"],
        remainders=[e[MASTER] for e in entries if MASTER in e],
    )


def collect_work(group: dict[str, Any], params: list[Tensor], ordinals: list[int]) -> Work:
    """The work on parameters that have a gradient."""
    for p in params:
        assert p.grad is not None
        if p.grad.layout is not torch.strided:
            raise ValueError(
                f"a parameter of shape {tuple(p.shape)} has a sparse gradient ({p.grad.layout}); "
                "build its embedding with sparse=False"
            )
    return Work(group, params, [shards.part_of(p, p.grad) for p in params], ordinals)  # type: ignore[arg-type]


def places(work: Work) -> list[Any]:
    """What ``p.data = ...`` and ``model.to(...)`` change of a parameter that stays the same object."""
    local = [shards.local(p) for p in work.params] if work.group["paged"] else []  # pieces are views
    views = [(x.data_ptr(), x.stride()) for x in local]
    return [*map(_PLACE, work.params), *map(_DTYPE, work.grads), *work.ordinals, *views]


def _same(ours: list[Any], theirs: list[Any]) -> bool:
    """Whether two lists hold the same objects."""
    return len(ours) == len(theirs) and all(map(operator.is_, ours, theirs))


def bits_of(entries: dict[str, Tensor], rule: rules.Rule) -> int:
    return 8 if any(blocks.is_coded(entries, state.name) for state in rule.states) else 32


def hyperparameters(rule: rules.Rule, group: dict[str, Any], device: torch.device) -> tuple[Tensor | None, list[float]]:
    """The learning rate if it is a tensor on the device, and the rule's hyperparameters as floats."""
    values = dict(group)
    if "betas" in group:
        values |= {f"beta{i + 1}": beta for i, beta in enumerate(group["betas"])}
    lr = values["lr"]
    on_device = isinstance(lr, Tensor) and lr.device == device
    if on_device:
        values["lr"] = 0.0
    return (lr.detach().float() if on_device else None), [float(values[name]) for name in rule.hyper]
