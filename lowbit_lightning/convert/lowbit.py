"""Turn weights into low bits, in place, and back. ``layers.select`` chooses the layers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lowbit_lightning.convert.fused import settle_fused_path
from lowbit_lightning.layers.embedding import LowBitEmbedding
from lowbit_lightning.layers.experts import LowBitTensor
from lowbit_lightning.layers.int8 import is_conv1d
from lowbit_lightning.layers.lowbit import FLOATS, LowBitLinear, LowBitWeight, Weights
from lowbit_lightning.layers.select import Overrides, Patterns, Selection, select, stacked

Module = TypeVar("Module", bound=nn.Module)


class NothingToQuantize(ValueError):
    """No layer is left to quantise; the message gives the reason for each."""


MIN_EXPERT = 32
"""A three-dimensional parameter with shorter rows, or fewer of them, is taken for something else than experts."""


def quantize(
    module: Module,
    weights: str = "nf4",
    *,
    include: Patterns = "*",
    exclude: Patterns = (),
    filter: Callable[[str, nn.Module], bool] | None = None,
    output_layer: str | None = "auto",
    overrides: Overrides | None = None,
    embeddings: bool = False,
    experts: bool = True,
    device: torch.device | str | None = None,
    **settings: Any,
) -> Module:
    """Turn the weights of a model's linear layers and experts into low bits, in place; returns the module.

    Linear layers are ``nn.Linear`` and Transformers' ``Conv1D``; experts are three-dimensional parameters of modules
    that are not torch's own (``layers.experts``).

    Layers are converted one at a time, each on its device. Only the quantised weights are frozen; the caller decides
    which other parameters train. ``weight_report(module)`` lists the format, bytes and error of each layer.
    ``dequantize`` turns the layers back.

    Args:
        weights: the format: ``"int8"``, ``"nf4"``, ``"fp4"``, ``"int4"``, ``"int3"``, ``"int2"``, with ``-dq`` and
            ``-g128`` as ``kernels.formats.weight_format`` says.
        include, exclude: shell patterns of qualified names (``"blocks.*.mlp.*"``); each must match some layer.
        filter: ``filter(name, layer)``, called last; False leaves the layer unchanged.
        output_layer: "auto" (the rule in ``layers.select``) leaves it unchanged, None quantises it too; or a name.
        overrides: pattern -> another format, other fields of ``layers.Weights``, or None to leave the layers unchanged:
            ``{"*.down_proj": "int8", "*.v_proj": {"weights": "int4", "fit": "absmax"}, "*.0.*": None}``.
        embeddings: quantise ``nn.Embedding`` too, except one that shares its weight with a layer that is not quantised.
        experts: quantise experts.
        device: layers move here, one by one, before they are quantised; the rest of the model follows.
        settings: the fields of ``layers.Weights``: ``fit``, ``compute_dtype``, ``threshold``.

    Raises:
        TypeError, ValueError: for a bad setting, a pattern that matches nothing, or nothing left to quantise. Nothing
            is changed then.
    """
    which: dict[str, Any] = {"include": include, "exclude": exclude, "filter": filter, "output_layer": output_layer}
    which |= {"overrides": overrides, "embeddings": embeddings, "experts": experts}
    selection = select_weights(module, Weights.of(weights, **settings), **which)
    seen: dict[int, LowBitWeight] = {}
    for name, own in selection.chosen.items():
        layer = layer_at(module, name)
        original = layer.weight
        tied = seen.get(id(original))
        if device is not None:
            layer.to(device)
        low = adopt(layer, own)
        if tied is not None and tied.format == low.format:
            low.share(tied)
        seen[id(original)] = low
    settle_fused_path(module)
    return module if device is None else module.to(device)


def dequantize(module: Module, dtype: torch.dtype | None = None) -> Module:
    """Turn every low-bit layer back into the plain one, with its decoded weight, in place; returns the module.

    Args:
        dtype: float32, float16 or bfloat16; None: the dtype that each weight had before.

    The weights are frozen; ``requires_grad_`` makes them trainable. Layers that share a weight share the decoded one.
    """
    if dtype not in (None, *FLOATS):
        raise TypeError(f"dtype must be None, torch.float32, torch.float16 or torch.bfloat16, got {dtype}")
    found = list(low_bit_layers(module))
    users = Counter(id(layer.weight) for _, layer in found)
    shared: dict[tuple[int, bool], nn.Parameter] = {}
    for name, layer in found:
        if isinstance(layer, LowBitTensor):
            owner, _, part = name.rpartition(".")
            LowBitTensor.release(module.get_submodule(owner), part, dtype)
            continue
        packed = id(layer.weight)
        (LowBitEmbedding if isinstance(layer, LowBitEmbedding) else LowBitLinear).release(layer, dtype)  # type: ignore
        if users[packed] > 1:
            layer.weight = shared.setdefault((packed, is_conv1d(layer)), layer.weight)
    settle_fused_path(module)
    return module


def low_bit_layers(module: nn.Module) -> Iterator[tuple[str, LowBitWeight]]:
    """Every low-bit layer with its name."""
    return ((name, layer) for name, layer in module.named_modules() if isinstance(layer, LowBitWeight))


def quantised_state(module: nn.Module, saved: Mapping[str, Any]) -> dict[str, Any]:
    """A ``state_dict`` in which the weights of the module's low-bit layers are in low bits. Those that are in high
    precision, of the right shape, are quantised; experts are parameters there."""
    found = dict(saved)
    for name, layer in low_bit_layers(module):
        prefix = f"{name}." if name else ""
        if isinstance(layer, LowBitTensor):
            _as_weight(found, name)
        weight = found.get(f"{prefix}weight")
        if isinstance(weight, Tensor) and weight.is_floating_point() and f"{prefix}weight_format" not in found:
            weight = layer.oriented(weight)
            if weight.shape == layer.weight_shape:
                found |= {f"{prefix}{part}": x for part, x in layer.saved(weight).items()}
    return found


def _as_weight(state_dict: dict[str, Any], name: str) -> None:
    """Experts in high precision, a parameter, by the name that they have in low bits."""
    if name in state_dict:
        state_dict[f"{name}.weight"] = state_dict.pop(name)


def _load_experts(owner: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before ``owner.load_state_dict``: a state in high precision has its experts as parameters."""
    for part, layer in owner._modules.items():
        if isinstance(layer, LowBitTensor):
            _as_weight(state_dict, f"{prefix}{part}")


@dataclass(frozen=True)
class Expert:
    """A three-dimensional parameter, as a layer that could be changed."""

    owner: nn.Module
    part: str

    @property
    def weight(self) -> nn.Parameter:
        return self.owner.get_parameter(self.part)

    def to(self, device: torch.device | str) -> None:
        self.weight.data = self.weight.data.to(device)


def in_parts(weight: Tensor) -> bool:
    """Whether a rank holds only its part of a parameter, because ZeRO-3 of DeepSpeed has cut it: it looks empty."""
    return hasattr(weight, "ds_shape") and weight.numel() != weight.ds_shape.numel()


def layer_at(module: nn.Module, name: str) -> Any:
    """The module of that name, or the ``Expert``."""
    owner, _, part = name.rpartition(".")
    holder = module.get_submodule(owner)
    return Expert(holder, part) if part in holder._parameters else module.get_submodule(name)


def adopt(layer: Any, weights: Weights) -> LowBitWeight:
    """Put a layer of ``select_weights`` into low bits."""
    if isinstance(layer, Expert):
        if not any(isinstance(m, LowBitTensor) for m in layer.owner.children()):  # once for all of its parameters
            layer.owner.register_load_state_dict_pre_hook(_load_experts)
        return LowBitTensor.adopt(layer.owner, layer.part, weights)
    (LowBitEmbedding if isinstance(layer, nn.Embedding) else LowBitLinear).adopt(layer, weights)
    return layer


def candidate_weights(module: nn.Module, *, embeddings: bool, experts: bool) -> dict[str, Any]:
    """Every layer that could have low-bit weights, by name: modules, and ``Expert`` for a parameter."""
    found: dict[str, Any] = {}
    for name, m in module.named_modules():
        if isinstance(m, nn.Linear) or is_conv1d(m) or (embeddings and isinstance(m, nn.Embedding)):
            found[name] = m
        elif experts and not type(m).__module__.startswith("torch."):
            held = {part: p for part, p in m._parameters.items() if p is not None and p.ndim == 3}
            found |= {f"{name}.{part}" if name else part: Expert(m, part) for part in held}
    return found


def select_weights(
    module: nn.Module, weights: Weights, *, embeddings: bool, experts: bool, **choice: Any
) -> Selection[Weights]:
    """The layers that ``quantize`` would change, with the same arguments; nothing is changed."""
    candidates = candidate_weights(module, embeddings=embeddings, experts=experts)
    selection = select(module, candidates, weights, unfit=_unfit, change=Weights.changed, **choice)
    _leave_tied(selection, candidates)
    if not selection.chosen:
        reasons = [f"  {name}: {reason}" for name, reason in selection.skipped.items()]
        raise NothingToQuantize("\n".join([f"nothing to quantize in {type(module).__name__}; its layers:", *reasons]))
    return selection


def _leave_tied(selection: Selection[Weights], candidates: Mapping[str, Any]) -> None:
    """An embedding and the output layer that shares its weight change together, or neither changes."""
    for name in [n for n in selection.chosen if isinstance(candidates[n], nn.Embedding)]:
        if tied := [n for n in selection.skipped if candidates[n].weight is candidates[name].weight]:
            del selection.chosen[name]
            selection.skipped[name] = f"shares its weight with {tied[0]}, which stays as it is"


def _unfit(layer: Any) -> str | None:
    if isinstance(layer, LowBitWeight):
        return f"is {layer.weights} already"
    if type(layer) not in (nn.Linear, nn.Embedding, Expert) and not is_conv1d(layer):
        return f"{type(layer).__name__} is a class of its own"
    if "forward" in vars(layer):
        return "its forward was replaced on the object"
    if isinstance(layer, Expert) and min(layer.weight.shape[1:]) < MIN_EXPERT:
        return f"a parameter of shape {tuple(layer.weight.shape)} is small"
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        return f"max_norm={layer.max_norm} changes its table"
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if in_parts(weight):
        return "ZeRO-3 of DeepSpeed has cut its weight: quantise before that"
    return None if weight.dtype in FLOATS else f"weight is {weight.dtype}; float32, float16 and bfloat16 are taken"


# -- the report ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WeightReport:
    """What low-bit weights a model has; ``str(report)`` is a few lines, with the layers of a stack taken together.

    ``layers``: name -> (settings, bytes in high precision, bytes now, SNR in dB or None where it was loaded);
    ``rest``: bytes of all other parameters and buffers.
    """

    layers: Mapping[str, tuple[Weights, int, int, float | None]]
    rest: int

    @property
    def bytes_before(self) -> int:
        """Bytes of the quantised weights in the dtype that they had."""
        return sum(before for _, before, _, _ in self.layers.values())

    @property
    def bytes_after(self) -> int:
        return sum(after for _, _, after, _ in self.layers.values())

    def __str__(self) -> str:
        if not self.layers:
            return "no low-bit weights"
        before, after = self.bytes_before, self.bytes_after
        lines = [
            f"{len(self.layers)} weights in low bits: {_size(before)} became {_size(after)} "
            f"({before / max(after, 1):.1f}x less); all else takes {_size(self.rest)}"
        ]
        for own in dict.fromkeys(own for own, *_ in self.layers.values()):
            named = {name: snr for name, (weights, _, _, snr) in self.layers.items() if weights == own}
            known = sorted((snr, name) for name, snr in named.items() if snr is not None and math.isfinite(snr))
            error = f"; SNR {known[0][0]:.1f} dB ({known[0][1]}) to {known[-1][0]:.1f} dB" if known else ""
            lines.append(f"  {own}: {stacked(named)}{error}")
        return "\n".join(lines)


def weight_report(module: nn.Module) -> WeightReport:
    """What low-bit weights the module has, with their bytes and errors."""
    layers: dict[str, tuple[Weights, int, int, float | None]] = {}
    counted: set[int] = set()
    for name, layer in low_bit_layers(module):
        own = (layer.weight, layer.weight_scales)
        counted.update(id(part) for part in (*own, layer.weight_format))
        before = layer.weight_shape.numel() * layer.dtype.itemsize
        layers[name] = (layer.weights, before, sum(part.nbytes for part in own), layer.snr_db)
    rest = {id(x): x.nbytes for x in (*module.parameters(), *module.buffers()) if id(x) not in counted}
    return WeightReport(layers, sum(rest.values()))


def _size(count: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} bytes"
