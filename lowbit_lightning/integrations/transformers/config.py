"""``LowBitConfig``: what ``from_pretrained`` is to quantise, and what ``config.json`` says of a quantised model.

A saved model is described by its ``layers``, pattern -> settings, and not by the options that chose them. So it loads
the same whatever rule chose the layers, in a class with or without a head, and where a ``filter`` had a say.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from transformers.quantizers import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowbit_lightning.layers.lowbit import Weights
from lowbit_lightning.layers.select import Overrides, Patterns, check_overrides

METHOD = "lowbit_lightning"
"""``quant_method`` in ``config.json``."""
NEVER_SAVED = ("filter", "quant_method", "layers")


@register_quantization_config(METHOD)
class LowBitConfig(QuantizationConfigMixin):
    """Low-bit weights, for ``from_pretrained(..., quantization_config=LowBitConfig("nf4"))``.

    The arguments are those of ``lowbit_lightning.quantize``:

    Args:
        weights: ``"int8"``, ``"nf4"``, ``"fp4"``, ``"int4"``, ``"int3"``, ``"int2"``; with ``-dq`` for scales in 8 bits
            and ``-g128`` for a block size: ``"nf4-dq-g128"``.
        include, exclude: shell patterns of layers' names.
        filter: ``filter(name, layer)``; False leaves the layer as it is.
        output_layer: "auto" leaves the output layer as it is, None quantises it too; or a name.
        overrides: pattern -> another format, other settings, or None.
        embeddings: quantise embeddings too.
        experts: quantise the experts of mixture-of-experts models, which are three-dimensional parameters.
        fit, compute_dtype, threshold: as ``layers.Weights`` says.

    Raises:
        TypeError, ValueError: for a bad setting. Patterns are checked when the model is known.
    """

    def __init__(
        self,
        weights: str = "nf4",
        *,
        include: Patterns = "*",
        exclude: Patterns = (),
        filter: Callable[[str, nn.Module], bool] | None = None,
        output_layer: str | None = "auto",
        overrides: Overrides | None = None,
        embeddings: bool = False,
        experts: bool = True,
        fit: str | None = None,
        compute_dtype: torch.dtype | str | None = None,
        threshold: float = 0.0,
    ) -> None:
        self.quant_method: Any = METHOD
        self.weights = str(weights)
        self.include = include if isinstance(include, str) else list(include)
        self.exclude = exclude if isinstance(exclude, str) else list(exclude)
        self.filter = filter
        self.output_layer = output_layer
        self.overrides = {pattern: _with_dtypes(value) for pattern, value in (overrides or {}).items()}
        self.embeddings = embeddings
        self.experts = experts
        self.fit = fit
        self.compute_dtype = dtype_of(compute_dtype)
        self.threshold = threshold
        self.layers: dict[str, Any] | None = None
        """Of a quantised model: pattern of layers -> their settings. Filled in by the quantizer."""
        check_overrides(self.setting, self.overrides, Weights.changed)

    @property
    def setting(self) -> Weights:
        """What layers get that no override matches."""
        return Weights.of(self.weights, fit=self.fit, compute_dtype=self.compute_dtype, threshold=self.threshold)

    @property
    def choice(self) -> dict[str, Any]:
        """The arguments of ``convert.lowbit.select_weights``."""
        names = ("include", "exclude", "filter", "output_layer", "overrides", "embeddings", "experts")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From what ``config.json`` holds.

        Raises:
            ValueError: for an entry that this version does not know.
        """
        given = dict(config_dict)
        layers = given.pop("layers", None)
        given.pop("quant_method", None)
        known = vars(cls()).keys() - set(NEVER_SAVED)
        if unknown := sorted(given.keys() - known):
            raise ValueError(
                f"quantization_config has {unknown}, which this version of lowbit_lightning does not know: a newer one "
                f"saved the model, or the entry is wrong; known are {sorted(known)}"
            )
        config = cls(**given)
        config.layers = layers
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """What ``config.json`` holds: ``weights``, what differs from the defaults, and ``layers``."""
        plain = vars(LowBitConfig())
        own = {name: value for name, value in vars(self).items() if name not in NEVER_SAVED and value != plain[name]}
        saved = {"quant_method": METHOD, "weights": self.weights, **own}
        return _with_names({**saved, "layers": self.layers} if self.layers is not None else saved)

    def __iter__(self) -> Any:
        yield from self.to_dict().items()


# -- the layers of a saved model -----------------------------------------------------------------------------------


def described(chosen: Mapping[str, Weights], names: Iterable[str]) -> dict[str, Any]:
    """``chosen`` by patterns: layers of a stack that have the same settings share a line. ``names``: of all layers that
    could have been chosen."""
    every = list(names)
    result: dict[str, Any] = {}
    for pattern in dict.fromkeys(_stack(name) for name in chosen):
        members = [name for name in every if fnmatchcase(name, pattern)]
        settings = {chosen.get(name) for name in members}
        lines = {pattern: settings.pop()} if len(settings) == 1 else {n: chosen[n] for n in members if n in chosen}
        result |= {line: _saved(own) for line, own in lines.items() if own is not None}
    return result


def settings_of(name: str, prefix: str, layers: Mapping[str, Any]) -> Weights | None:
    """The settings of the layer ``name`` in a saved description; ``prefix``: of the base model, which a name may have
    in one class of a model and not in another."""
    alike = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
    for pattern, saved in layers.items():
        if any(fnmatchcase(other, pattern) for other in alike):
            fields = _with_dtypes(saved if isinstance(saved, Mapping) else {"weights": saved})
            return Weights.of(**fields)
    return None


def _stack(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _saved(own: Weights) -> str | dict[str, Any]:
    extra = {"fit": own.fit, "compute_dtype": own.compute_dtype, "threshold": own.threshold or None}
    given = {name: value for name, value in extra.items() if value is not None}
    return {"weights": str(own.format), **given} if given else str(own.format)


def dtype_of(value: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype from its name too: ``"bfloat16"``."""
    found = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if (found is not None and not isinstance(found, torch.dtype)) or (value is not None and found is None):
        raise ValueError(f"a dtype must be None, float32, float16 or bfloat16, got {value!r}")
    return found


def _with_dtypes(value: Any) -> Any:
    """An override, or saved settings, with dtypes in place of their names."""
    if isinstance(value, Mapping) and "compute_dtype" in value:
        return {**value, "compute_dtype": dtype_of(value["compute_dtype"])}
    return copy.deepcopy(value)


def _with_names(value: Any) -> Any:
    """For JSON: dtypes by their names."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Mapping):
        return {key: _with_names(item) for key, item in value.items()}
    return [_with_names(item) for item in value] if isinstance(value, (list, tuple)) else copy.deepcopy(value)
