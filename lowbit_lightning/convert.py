"""Swap modules in place by a filter, and say what was swapped, what was skipped and why.

``swap_linears`` turns ``nn.Linear`` into ``Int8Linear`` by changing the object's class: parameters, names, hooks,
tying and ``state_dict`` stay, so optimizers, DDP and checkpoints notice nothing. ``restore`` turns them back.

The output layer
----------------
Quantising the layer that produces logits costs more quality than it saves time, so it is left alone by default. Which
one it is, a module cannot tell without being run; the rule (``output_layer="auto"``) is:

1. every Linear whose weight is also the weight of an ``nn.Embedding`` (tied) is an output layer;
2. if there is none, it is the last Linear in the order in which the model defines its modules.

A model in which that is wrong names it (``output_layer="decoder.head"``), or says ``output_layer=None``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from lowbit_lightning.layers.int8 import FLOATS, Int8Linear, Products

__all__ = ["Report", "restore", "swap_linears"]

MIN_FEATURES = 32
"""Below one tile of an int8 matrix instruction a product is cheaper than quantising its operands."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTION = "convolutions are not swapped"

Overrides = Mapping[str, Mapping[str, Any] | None]


@dataclass(frozen=True)
class Report:
    """What ``swap_linears`` did.

    ``swapped``: names that run in int8, by ``products`` but for those in ``overridden``; ``skipped``: name -> why not;
    ``notes``: what else to know. ``str(report)`` is a few lines, with the layers of a stack taken together.
    """

    swapped: tuple[str, ...]
    skipped: dict[str, str]
    notes: tuple[str, ...]
    products: Products
    overridden: dict[str, Products] = field(default_factory=dict)

    def __str__(self) -> str:
        total = len(self.swapped) + sum(reason != CONVOLUTION for reason in self.skipped.values())
        lines = [f"int8 ({self.products}) in {len(self.swapped)} of {total} linear layers: {_stacked(self.swapped)}"]
        for products in dict.fromkeys(self.overridden.values()):
            names = [name for name, own in self.overridden.items() if own == products]
            lines.append(f"  but {_stacked(names)}: int8 ({products}), by overrides")
        for reason in dict.fromkeys(self.skipped.values()):
            names = [name for name, why in self.skipped.items() if why == reason]
            lines.append(f"  not {_stacked(names)}: {reason}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def swap_linears(
    module: nn.Module,
    *,
    include: str | Iterable[str] = "*",
    exclude: str | Iterable[str] = (),
    filter: Callable[[str, nn.Linear], bool] | None = None,
    output_layer: str | None = "auto",
    min_features: int = MIN_FEATURES,
    overrides: Overrides | None = None,
    **settings: Any,
) -> Report:
    """Turn the module's ``nn.Linear`` layers into ``Int8Linear``, in place.

    Only objects whose type is exactly ``nn.Linear``: subclasses bring their own forward or are read by their owner.
    Idempotent; and a later call with another filter or other settings also takes back what an earlier one swapped.

    Args:
        include, exclude: shell patterns of qualified names (``"blocks.*.mlp.*"``); each must match some Linear.
        filter: ``filter(name, linear)``, asked last; False skips the layer.
        output_layer: "auto" (the rule above), a name or pattern, or None (no layer is special).
        min_features: layers with fewer input or output features are skipped.
        overrides: pattern -> settings that differ for the layers it matches, or None to skip them:
            ``{"*.down": {"grad_weight": "high"}, "blocks.0.*": None}``. Of several patterns that match a layer the
            later goes over the earlier.
        settings: the fields of ``layers.Products``, for all other layers.

    Raises:
        TypeError, ValueError: an unknown setting, a pattern that matches no Linear, or nothing left to swap; the
            message lists what is there. Nothing is changed then.
    """
    products, overrides = Products(**settings), overrides or {}
    check_overrides(products, overrides)
    linears = {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear)}
    included, excluded = _patterns("include", include, linears), _patterns("exclude", exclude, linears)
    _patterns("overrides", overrides, linears)
    outputs = _output_layers(module, output_layer, linears)
    swapped: dict[str, Products] = {}
    skipped = {}
    for name, linear in linears.items():
        chosen = _chosen(name, products, overrides)
        reason = _type_reason(linear)
        reason = reason or _name_reason(name, included, excluded, outputs) or _shape_reason(linear, min_features)
        if reason is None and filter is not None and not filter(name, linear):
            reason = "refused by filter"
        if reason is None and chosen is not None:
            swapped[name] = chosen
        else:
            skipped[name] = reason or "None in overrides"
    _check_released(name for name in skipped if _is_derived(linears[name]) and linears[name].adopted)  # type: ignore
    if not swapped:
        raise ValueError(_nothing(module, skipped))
    for name, linear in linears.items():
        if name in swapped:
            Int8Linear.adopt(linear, swapped[name])
        elif type(linear) is Int8Linear and linear.adopted:
            Int8Linear.release(linear)
    skipped |= {name: CONVOLUTION for name, m in module.named_modules() if isinstance(m, CONVOLUTIONS)}
    overridden = {name: own for name, own in swapped.items() if own != products}
    return Report(tuple(swapped), skipped, _notes(module), products, overridden)


def check_overrides(products: Products, overrides: Overrides) -> None:
    """Raises TypeError or ValueError where an override isn't None or settings that ``Products`` takes."""
    for pattern, changes in overrides.items():
        try:
            if changes is not None:
                replace(products, **changes)
        except (TypeError, ValueError) as error:
            raise type(error)(f"overrides[{pattern!r}]={changes!r} must be None or settings: {error}") from None


def restore(module: nn.Module) -> tuple[str, ...]:
    """Turn every ``Int8Linear`` back into a plain ``nn.Linear``, in place; returns their names.

    Raises:
        ValueError: for layers that ``fully_shard`` was applied to; it has made them a class of its own.
    """
    _check_released(name for name, m in module.named_modules() if _is_derived(m))
    layers = [(name, m) for name, m in module.named_modules() if type(m) is Int8Linear]
    for _, layer in layers:
        Int8Linear.release(layer)
    return tuple(name for name, _ in layers)


def _is_derived(layer: nn.Module) -> bool:
    return isinstance(layer, Int8Linear) and type(layer) is not Int8Linear


def _check_released(names: Iterable[str]) -> None:
    if held := list(names):
        raise ValueError(
            f"fully_shard was applied to {_stacked(held)} itself, whose class can't be changed back from Int8Linear: "
            "choose layers before sharding, or make a new model and load the weights"
        )


# -- the filter ------------------------------------------------------------------------------------------------------


def _patterns(argument: str, patterns: str | Iterable[str], linears: Iterable[str]) -> list[str]:
    result = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in result:
        if pattern != "*" and not any(fnmatchcase(name, pattern) for name in linears):
            raise ValueError(f"{argument}={pattern!r} matches no linear layer; there are: {_stacked(linears)}")
    return result


def _chosen(name: str, products: Products, overrides: Overrides) -> Products | None:
    chosen: Products | None = products
    for pattern, changes in overrides.items():
        if fnmatchcase(name, pattern):
            chosen = None if changes is None else replace(chosen or products, **changes)
    return chosen


def _output_layers(module: nn.Module, rule: str | None, linears: dict[str, nn.Linear]) -> set[str]:
    if rule is None or not linears:
        return set()
    if rule != "auto":
        pattern = _patterns("output_layer", rule, linears)[0]
        return {name for name in linears if fnmatchcase(name, pattern)}
    embeddings = [m.weight for m in module.modules() if isinstance(m, nn.Embedding)]
    tied = {name for name, linear in linears.items() if any(linear.weight is w for w in embeddings)}
    return tied or {list(linears)[-1]}


def _type_reason(linear: nn.Linear) -> str | None:
    if isinstance(linear, Int8Linear):  # also under the class that fully_shard derives
        return None if linear.adopted else "was built as Int8Linear; left as it is"
    if type(linear) is not nn.Linear:
        return f"{type(linear).__name__} is a subclass of nn.Linear"
    if "forward" in vars(linear):
        return "its forward was replaced on the object"
    return None


def _name_reason(name: str, include: list[str], exclude: list[str], outputs: set[str]) -> str | None:
    if not any(fnmatchcase(name, pattern) for pattern in include):
        return f"not in include={include!r}"
    if any(fnmatchcase(name, pattern) for pattern in exclude):
        return f"in exclude={exclude!r}"
    return "output layer (output_layer=None swaps it too)" if name in outputs else None


def _shape_reason(linear: nn.Linear, min_features: int) -> str | None:
    if min(linear.in_features, linear.out_features) < min_features:
        return f"fewer than min_features={min_features} features"
    dtype = linear.weight.dtype
    return None if dtype in FLOATS else f"weight is {dtype}; int8 takes float32, float16 and bfloat16"


# -- the report ------------------------------------------------------------------------------------------------------


def _nothing(module: nn.Module, skipped: dict[str, str]) -> str:
    name = type(module).__name__
    if not skipped:
        kinds = Counter(
            type(m).__name__ for m in module.modules() if next(m.parameters(recurse=False), None) is not None
        )
        return f"nothing to swap: {name} has no nn.Linear; modules with parameters: {dict(kinds) or 'none'}"
    return "\n".join([f"nothing to swap in {name}; its linear layers:", *(f"  {n}: {r}" for n, r in skipped.items())])


def _notes(module: nn.Module) -> tuple[str, ...]:
    fused = [
        name
        for name, m in module.named_modules()
        if isinstance(m, nn.TransformerEncoderLayer) and isinstance(m.linear1, Int8Linear)
    ]
    if not fused:
        return ()
    return (
        f"{_stacked(fused)}: nn.TransformerEncoderLayer may take torch's fused path in evaluation, which bypasses "
        "its layers: int8 in training only (torch.backends.mha.set_fastpath_enabled(False) turns that path off)",
    )


def _stacked(names: Iterable[str]) -> str:
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
