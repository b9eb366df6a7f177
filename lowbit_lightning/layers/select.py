"""Which modules a change is for, and the report of it. ``convert`` uses it for int8 training and for low-bit weights.

A selection starts from candidates (name -> module) and one setting for all of them. Each candidate then gets a setting,
or a reason why it is skipped. The first of these rules that applies decides:

1. the name is not in ``include``, or in ``exclude``;
2. it is an output layer (below);
3. ``unfit`` gives a reason: the module's type, dtype or shape can't be served;
4. ``filter`` refuses it;
5. ``overrides`` has None for it. Any other value changes the setting.

``outputs`` finds output layers (``output_layer="auto"``). If its answer is wrong for a model, name them
(``output_layer="decoder.head"``, or a pattern), or use ``output_layer=None``: no layer is special.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Generic, TypeVar

from torch import nn

from lowbit_lightning.layers.outputs import output_layers, sizes

Setting = TypeVar("Setting")
OUTPUT = "output layer (output_layer=None takes it too)"
Patterns = str | Iterable[str]
"""Shell patterns of qualified names: ``"blocks.*.mlp.*"``."""

Overrides = Mapping[str, Any]
"""Pattern -> how the setting changes for the modules that it matches, or None to leave them unchanged."""


@dataclass(frozen=True)
class Selection(Generic[Setting]):
    """``chosen``: name -> setting; ``skipped``: name -> why it is skipped. Together they are all candidates."""

    chosen: dict[str, Setting]
    skipped: dict[str, str]


def select(
    module: nn.Module,
    candidates: Mapping[str, nn.Module],
    setting: Setting,
    *,
    unfit: Callable[[nn.Module], str | None],
    change: Callable[[Setting, Any], Setting],
    include: Patterns = "*",
    exclude: Patterns = (),
    filter: Callable[[str, Any], bool] | None = None,
    output_layer: str | None = "auto",
    overrides: Overrides | None = None,
) -> Selection[Setting]:
    """Decide for each of the candidates, which are modules of ``module``; nothing is changed.

    Args:
        setting: of all candidates that no override matches.
        unfit: says why a candidate can't be changed, or None.
        change: ``change(setting, value)`` is the setting under an override of this value; it raises TypeError or
            ValueError if it does not know the value.
        include, exclude: patterns; each must match some candidate.
        filter: ``filter(name, candidate)``; False skips it.
        output_layer: "auto" (``outputs``; warns if it is not sure), a name or pattern, or None.
        overrides: pattern -> value for ``change``, or None to skip. If several patterns match a candidate, the later
            one overrides the earlier.

    Raises:
        TypeError, ValueError: a pattern that matches no candidate (the message lists them), or a bad override.
    """
    overrides = overrides or {}
    check_overrides(setting, overrides, change)
    included, excluded = _patterns("include", include, candidates), _patterns("exclude", exclude, candidates)
    _patterns("overrides", overrides, candidates)
    named = {name for name in candidates if _by_name(name, included, excluded, {}) is None}
    outputs = _output_layers(module, output_layer, candidates, named)
    chosen: dict[str, Setting] = {}
    skipped: dict[str, str] = {}
    for name, candidate in candidates.items():
        reason = _by_name(name, included, excluded, outputs) or unfit(candidate)
        own = _overridden(name, setting, overrides, change)
        if reason is None and filter is not None and not filter(name, candidate):
            reason = "refused by filter"
        if reason is None and own is not None:
            chosen[name] = own
        else:
            skipped[name] = reason or "None in overrides"
    return Selection(chosen, skipped)


def check_overrides(setting: Setting, overrides: Overrides, change: Callable[[Setting, Any], Setting]) -> None:
    """Raise a TypeError or ValueError that names the pattern, if an override is not None and ``change`` refuses it."""
    for pattern, value in overrides.items():
        try:
            if value is not None:
                change(setting, value)
        except (TypeError, ValueError) as error:
            raise type(error)(f"overrides[{pattern!r}]={value!r} must be None or settings: {error}") from None


def _patterns(argument: str, patterns: Patterns, names: Iterable[str]) -> list[str]:
    result = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in result:
        if pattern != "*" and not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"{argument}={pattern!r} matches no layer; there are: {stacked(names)}")
    return result


def _by_name(name: str, include: list[str], exclude: list[str], outputs: Mapping[str, str]) -> str | None:
    if not any(fnmatchcase(name, pattern) for pattern in include):
        return f"not in include={include!r}"
    if any(fnmatchcase(name, pattern) for pattern in exclude):
        return f"in exclude={exclude!r}"
    return outputs.get(name)


def _overridden(
    name: str, setting: Setting, overrides: Overrides, change: Callable[[Setting, Any], Setting]
) -> Setting | None:
    own: Setting | None = setting
    for pattern, value in overrides.items():
        if fnmatchcase(name, pattern):
            own = None if value is None else change(setting if own is None else own, value)
    return own


def _output_layers(
    module: nn.Module, rule: str | None, candidates: Mapping[str, nn.Module], named: Container[str]
) -> dict[str, str]:
    """Name -> reason to skip it; warns if the reason is doubtful for one of ``named``."""
    if rule is None:
        return {}
    if rule != "auto":
        pattern = _patterns("output_layer", rule, candidates)[0]
        return dict.fromkeys((name for name in candidates if fnmatchcase(name, pattern)), OUTPUT)
    found = output_layers(module, {name: m for name, m in candidates.items() if sizes(m) is not None})
    if doubtful := {name: why for name, why in found.doubtful.items() if name in named}:
        warnings.warn(
            f"not sure which layers of {type(module).__name__} are output layers; left alone because they may be: "
            f"{_reasons(doubtful)}. Name them (output_layer='NAME' or a pattern), or say output_layer=None",
            stacklevel=3,
        )
    doubtful = {name: f"perhaps an output layer: {why} (output_layer= decides)" for name, why in found.doubtful.items()}
    return {**dict.fromkeys(found.known, OUTPUT), **doubtful}


def _reasons(named: Mapping[str, str]) -> str:
    return "; ".join(f"{names} ({reason})" for reason, names in grouped(named))


# -- the report ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report(Generic[Setting]):
    """What was changed and what was not; ``str(report)`` is a few lines, in which the layers of a stack share one line.

    ``swapped``: names that have the ``setting``, except those in ``overridden`` (name -> its own setting);
    ``skipped``: candidates, name -> why not; ``others``: modules that never were candidates, name -> why;
    ``notes``: further remarks.
    """

    swapped: tuple[str, ...]
    skipped: dict[str, str]
    notes: tuple[str, ...]
    setting: Setting
    overridden: dict[str, Setting] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        selection: Selection[Setting],
        setting: Setting,
        notes: Iterable[str] = (),
        others: Mapping[str, str] | None = None,
    ) -> Report[Setting]:
        """The report of a selection that has been carried out."""
        overridden = {name: own for name, own in selection.chosen.items() if own != setting}
        return cls(tuple(selection.chosen), selection.skipped, tuple(notes), setting, overridden, dict(others or {}))

    def __str__(self) -> str:
        total = len(self.swapped) + len(self.skipped)
        lines = [f"{self.setting} in {len(self.swapped)} of {total} layers: {stacked(self.swapped)}"]
        lines += [f"  but {names}: {own}, by overrides" for own, names in grouped(self.overridden)]
        lines += [f"  not {names}: {reason}" for reason, names in grouped({**self.skipped, **self.others})]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def grouped(named: Mapping[str, Any]) -> list[tuple[Any, str]]:
    """Each value with the names that have it, in the order of their first."""
    return [(value, stacked(n for n, v in named.items() if v == value)) for value in dict.fromkeys(named.values())]


def stacked(names: Iterable[str]) -> str:
    """'blocks.*.qkv (6), head': names that differ only in numbers are taken together."""
    stacks: dict[tuple[str, ...], list[list[str]]] = {}
    for name in names:
        parts = name.split(".")
        stacks.setdefault(tuple("*" if part.isdigit() else part for part in parts), []).append(parts)
    shown = []
    for members in stacks.values():
        name = ".".join(part[0] if len(set(part)) == 1 else "*" for part in zip(*members, strict=True))
        shown.append(f"{name} ({len(members)})" if len(members) > 1 else name or "(the module itself)")
    return ", ".join(shown) or "none"
