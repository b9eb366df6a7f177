"""Tied weights: an output layer that shares its weight with an embedding, both in low bits.

Transformers ties parameters by name, from ``all_tied_weights_keys`` (target -> source) when it loads and from
``_tied_weights_keys`` when it saves. Where both are in low bits their scales are tied as their codes are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from lowbit_lightning.kernels.formats import Format
from lowbit_lightning.layers.lowbit import LowBitWeight

SCALES = "_scales"
"""``NAME.weight`` -> ``NAME.weight_scales``."""


def pairs(model: PreTrainedModel) -> list[tuple[str, str]]:
    """Names of weights that are tied: target, source."""
    known = dict(getattr(model, "all_tied_weights_keys", None) or {})
    return [(target, source) for target, source in known.items() if not target.endswith(SCALES)]


def tied_to(model: PreTrainedModel, name: str) -> list[str]:
    """Names of the other weights that are one with ``name``."""
    groups = [pair for pair in pairs(model) if name in pair]
    sources = {source for _, source in groups}
    alike = {one for pair in pairs(model) if pair[1] in sources for one in pair}
    return sorted(alike - {name})


@contextmanager
def tied(model: PreTrainedModel) -> Iterator[None]:
    """Weights that will be tied are one parameter inside. (They are not yet while a model is built for loading.)"""
    before = []
    for target, source in pairs(model):
        owner, _, part = target.rpartition(".")
        holder = model.get_submodule(owner)
        before.append((holder, part, getattr(holder, part)))
        setattr(holder, part, model.get_parameter(source))
    try:
        yield
    finally:
        for holder, part, value in before:
            setattr(holder, part, value)


def check(model: PreTrainedModel, formats: Mapping[str, Format]) -> None:
    """Raise a ValueError if tied weights are to have two formats. ``formats``: of weights, by their names."""
    for target, source in pairs(model):
        one, other = formats.get(target), formats.get(source)
        if one is not None and other is not None and one != other:
            raise ValueError(
                f"{target} and {source} are one weight, but are {one} and {other}: give both the same format in "
                "overrides, or exclude both"
            )


def share(model: PreTrainedModel) -> None:
    """Low-bit layers whose weights are tied share codes and scales, and Transformers knows of the scales."""
    for target, source in pairs(model):
        layers = [_layer(model, name) for name in (target, source)]
        if not all(isinstance(layer, LowBitWeight) for layer in layers):
            continue
        one, other = layers
        check(model, {target: one.format, source: other.format})
        one.share(other)
        one.weight_format = other.weight_format.clone()  # safetensors saves no tensor twice
        scales = {f"{target}{SCALES}": f"{source}{SCALES}"}
        model.all_tied_weights_keys = {**model.all_tied_weights_keys, **scales}
        model._tied_weights_keys = {**(getattr(model, "_tied_weights_keys", None) or {}), **scales}


def release(model: PreTrainedModel) -> None:
    """After ``dequantize``: weights are tied again, and scales are forgotten."""
    for name in ("all_tied_weights_keys", "_tied_weights_keys"):
        known = getattr(model, name, None)
        if isinstance(known, dict):
            setattr(model, name, {target: source for target, source in known.items() if not target.endswith(SCALES)})
    for target, source in pairs(model):
        owner, _, part = target.rpartition(".")
        setattr(model.get_submodule(owner), part, model.get_parameter(source))


def _layer(model: PreTrainedModel, weight: str) -> Any:
    return model.get_submodule(weight.rpartition(".")[0])
