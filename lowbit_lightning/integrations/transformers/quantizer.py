"""The quantizer that Transformers asks while it loads a model.

Loading in high precision
-------------------------
The model stands on the meta device, with its own layers. ``select_weights`` chooses among them. When the weight of a
chosen layer has been read, and converted if the model's file format differs (experts are stacked then), Transformers
gives it to ``Quantize``: the layer becomes a low-bit one and takes the weight. The high-precision tensor is dropped
before the next one is read. No parameter changes its shape or dtype before its values are there, so nothing can be
cast to uint8 on the way.

Loading what was saved
----------------------
The layers that the config names become low-bit ones on the meta device; their codes, scales and format are ordinary
tensors, which Transformers loads as it loads all others.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, MutableSet
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantizer

from lowbit_lightning.convert.fused import settle_fused_path
from lowbit_lightning.convert.lowbit import (
    adopt,
    candidate_weights,
    dequantize,
    in_parts,
    layer_at,
    low_bit_layers,
    quantize,
    select_weights,
)
from lowbit_lightning.integrations.transformers import ties, zero
from lowbit_lightning.integrations.transformers.config import METHOD, LowBitConfig, described, dtype_of, settings_of
from lowbit_lightning.integrations.transformers.hooks import without_hooks
from lowbit_lightning.integrations.transformers.pages import ReadPages
from lowbit_lightning.layers.experts import LowBitTensor
from lowbit_lightning.layers.lowbit import LowBitWeight, Weights

LOADED = "_is_hf_initialized"
"""By this attribute Transformers knows a tensor, or a module, that needs no initial values."""


class Quantize(ConversionOps):
    """Puts a weight that was loaded in high precision into its layer, in low bits."""

    def __init__(self, hf_quantizer: LowBitQuantizer) -> None:
        self.hf_quantizer = hf_quantizer  # the name that Transformers looks for

    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        model: PreTrainedModel,
        missing_keys: MutableSet[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Take ``input_dict``, a weight by its full name. What is not to be quantised is returned."""
        rest = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            if name in self.hf_quantizer.waiting:
                self.hf_quantizer.take(model, name, weight, missing_keys)
            else:
                rest[name] = weight
        return rest


@register_quantizer(METHOD)
class LowBitQuantizer(HfQuantizer):
    """Registered with Transformers for ``LowBitConfig``; ``model.hf_quantizer`` of a quantised model."""

    quantization_config: LowBitConfig

    def __init__(self, quantization_config: LowBitConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.waiting: dict[str, tuple[str, Weights]] = {}
        """Weights that are still to be quantised: name of the parameter -> name of the layer, settings."""
        self.missing: MutableSet[str] | None = None
        """What the checkpoint has not given yet; Transformers' own set."""
        self.pages = ReadPages(None)
        self.experts_before: str | None = None
        """How experts were run before they were in low bits."""

    # -- what Transformers asks -------------------------------------------------------------------------------------

    def is_serializable(self, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """With adapters. Low-bit weights themselves do not train, so ``is_qat_trainable`` stays False."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if not self.pre_quantized and isinstance(device_map, dict) and "disk" in device_map.values():
            onto = [name for name, device in device_map.items() if device == "disk"]
            raise ValueError(
                f"device_map puts {onto[:4]} on disk, where a model can't be quantised while it is loaded: load it "
                "without disk offload, save_pretrained() it, and load that with the same device_map"
            )

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Bytes of an element, for ``device_map="auto"``."""
        if param_name not in self.waiting:
            return param.element_size()
        form = self.waiting[param_name][1].format
        return form.bits_per_weight(layer_at(model, self.waiting[param_name][0]).weight.shape[-1]) / 8

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.waiting

    def get_quantize_ops(self) -> Quantize:
        return Quantize(self)

    # -- before, while and after weights are loaded -----------------------------------------------------------------

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        self.pages = ReadPages(checkpoint_files)
        if self.pre_quantized:
            self.adopt_saved(model)
            return
        config = self.quantization_config
        with ties.tied(model):
            chosen = select_weights(model, config.setting, **config.choice).chosen
        self.waiting = {_parameter(model, name): (name, own) for name, own in chosen.items()}
        ties.check(model, {name: own.format for name, (_, own) in self.waiting.items()})

    def adopt_saved(self, model: PreTrainedModel) -> None:
        """Make the layers that the config names low-bit ones, without values."""
        layers, prefix = self.quantization_config.layers, getattr(model, "base_model_prefix", "")
        if layers is None:
            raise ValueError("quantization_config lacks layers: this model was not saved by lowbit_lightning")
        found = {n: settings_of(n, prefix, layers) for n in candidate_weights(model, embeddings=True, experts=True)}
        if not any(found.values()):
            raise ValueError(f"no layer of {type(model).__name__} is among those that were quantised: {[*layers]}")
        for name, own in found.items():
            if own is not None:
                vars(adopt(layer_at(model, name), own))[LOADED] = True  # codes have no initial values
        ties.share(model)

    def take(self, model: PreTrainedModel, name: str, weight: Tensor, missing: MutableSet[str] | None) -> None:
        """Quantise the weight ``name`` into its layer, and into those that are tied to it."""
        layer, own = self.waiting.pop(name)
        _put(model, name, weight)
        initialized(adopt(layer_at(model, layer), own))
        for other in ties.tied_to(model, name):
            if other in self.waiting:
                other_layer, other_own = self.waiting.pop(other)
                initialized(adopt(layer_at(model, other_layer), other_own))
        ties.share(model)
        zero.partition(layer_at(model, layer))
        if missing is not None:
            missing.discard(name)
            self.missing = missing
        self.pages.read(weight.nbytes)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name, (layer, own) in list(self.waiting.items()):
            del self.waiting[name]
            if self.missing is None or name not in self.missing:  # one that is new stays as it is: it has to be trained
                adopt(layer_at(model, layer), own)
        ties.share(model)
        settle_fused_path(model)
        for name, low in low_bit_layers(model):
            for part in ("weight", "weight_scales") if self.pre_quantized else ():
                if not getattr(low, part).is_meta and not hasattr(getattr(low, part), LOADED):
                    raise ValueError(f"the checkpoint lacks {name}.{part}, which its config says is in low bits")
            low.check_format(name)
        if any(isinstance(low, LowBitTensor) for _, low in low_bit_layers(model)):
            self.experts_before = model.config._experts_implementation
            model.set_experts_implementation("eager")  # one expert at a time, in packed form
        self.describe(model)
        _keep_names(model)
        model.hqq_quantized = True  # PEFT prepares it for training as it does HQQ's: nothing is cast to float32
        if importlib.util.find_spec("peft"):
            importlib.import_module("lowbit_lightning.integrations.peft")
        return model

    # -- saving and going back --------------------------------------------------------------------------------------

    def describe(self, model: PreTrainedModel) -> None:
        """Write into the config which layers are in low bits now."""
        candidates = candidate_weights(model, embeddings=True, experts=True)
        chosen = {name: low.weights for name, low in low_bit_layers(model)}
        self.quantization_config.layers = described(chosen, [*candidates, *(n for n in chosen if n not in candidates)])

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel, *args: Any, **kwargs: Any
    ) -> tuple[None, dict[str, Any]]:
        """Called before a model is saved: the config says what it has now, which a merge may have changed."""
        self.describe(model)
        if not self.quantization_config.layers:
            self.remove_quantization_config(model)
        return None, {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        low = dict(low_bit_layers(model))
        if away := [name for name, layer in low.items() if layer.weight.is_meta or in_parts(layer.weight)]:
            raise ValueError(
                f"dequantize() needs the weights in memory, but {away[:4]} are offloaded to disk or to the CPU, or cut "
                "by ZeRO-3: load the model without"
            )
        with without_hooks(low.values()):
            dequantize(model, dtype_of(dtype))  # a saved model's config has its name
        for name in low:
            layer_at(model, name).weight.requires_grad_(True)
        ties.release(model)
        if self.experts_before is not None:
            model.set_experts_implementation(self.experts_before)
        if hasattr(model, "_weight_conversions"):
            del model._weight_conversions
        return model


def quantize_pretrained(model: PreTrainedModel, config: LowBitConfig) -> PreTrainedModel:
    """Quantise a model of Transformers that is in memory already, in place; returns it.

    The same as ``lowbit_lightning.quantize``, and ``save_pretrained``, ``dequantize`` and the Trainer know of it as if
    ``from_pretrained`` had quantised it.

    Raises:
        TypeError, ValueError: as ``lowbit_lightning.quantize``, and for a model that is quantised already.
    """
    if getattr(model, "is_quantized", False):
        raise ValueError(f"{type(model).__name__} is quantised already; model.dequantize() turns it back")
    fields: dict[str, Any] = {"fit": config.fit, "compute_dtype": config.compute_dtype, "threshold": config.threshold}
    quantize(model, config.weights, **fields, **config.choice)
    quantizer = LowBitQuantizer(config, pre_quantized=False)
    model.is_quantized, model.quantization_method = True, METHOD
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)
    return model


def _parameter(model: PreTrainedModel, layer: str) -> str:
    """The name of a layer's weight; of an expert, its own."""
    owner, _, part = layer.rpartition(".")
    return layer if part in model.get_submodule(owner)._parameters else f"{layer}.weight"


def _put(model: PreTrainedModel, name: str, weight: Tensor) -> None:
    owner, _, part = name.rpartition(".")
    expected = model.get_parameter(name).shape
    if weight.shape != expected:
        raise ValueError(f"{name} must be of shape {tuple(expected)}, the checkpoint has {tuple(weight.shape)}")
    setattr(model.get_submodule(owner), part, nn.Parameter(weight, requires_grad=False))


def initialized(low: LowBitWeight) -> None:
    """Tell Transformers that nothing is left to initialise here."""
    for one in (low, low.weight, low.weight_scales, low.weight_format):
        vars(one)[LOADED] = True


def _keep_names(model: PreTrainedModel) -> None:
    """Low-bit weights are saved under the model's own names.

    Transformers remembers how it converted the tensors of a checkpoint (experts are stacked, fused projections cut)
    and reverts that when it saves. Codes and scales can't be converted so.
    """
    low = [f"{name}.weight" for name, _ in low_bit_layers(model)]
    low += [name for name, layer in low_bit_layers(model) if isinstance(layer, LowBitTensor)]
    kept = [one for one in _conversions(model) if not (hasattr(one, "operations") and _touches(one, low))]
    model._weight_conversions = kept


def _conversions(model: PreTrainedModel) -> Iterator[Any]:
    known = getattr(model, "_weight_conversions", None)
    if known is None:  # built, not loaded
        from transformers.conversion_mapping import get_model_conversion_mapping

        known = get_model_conversion_mapping(model, add_legacy=False)
    return iter(known or ())


def _touches(converter: Any, names: list[str]) -> bool:
    parts = [str(target).replace("\\", "").strip("^$").split("*") for target in converter.target_patterns]
    return any(all(part in name for part in pieces) for pieces in parts for name in names)
