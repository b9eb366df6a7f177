"""Checkpoints of bitsandbytes in Transformers, without bitsandbytes.

Transformers sends a config that says ``load_in_4bit`` or ``load_in_8bit`` to bitsandbytes. ``load_bitsandbytes`` gives
it the same config under a method of our own instead. Of each weight Transformers collects the parts, and
``convert.bitsandbytes`` reads them: codes are taken as they are. The loaded model is one of ``LowBitConfig``: it is
saved in this package's form.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableSet
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowbit_lightning.convert import bitsandbytes
from lowbit_lightning.convert.files import tensors
from lowbit_lightning.convert.lowbit import adopt, layer_at
from lowbit_lightning.integrations.transformers.config import METHOD, LowBitConfig
from lowbit_lightning.integrations.transformers.pages import ReadPages
from lowbit_lightning.integrations.transformers.quantizer import LowBitQuantizer, initialized
from lowbit_lightning.layers.lowbit import Weights

READS = "lowbit_lightning_bitsandbytes"
PARTS = [f"weight.{part}" for part in bitsandbytes.PARTS[::-1]]
PARTS += [f"weight.{bitsandbytes.STATE}{kind}" for kind in bitsandbytes.KINDS] + ["SCB", "weight_format", "weight"]
"""Ends of the names of a weight's parts; ``weight``, which the others contain, comes last."""
OF_CONFIG = {
    *("revision", "token", "cache_dir", "subfolder", "local_files_only", "force_download", "proxies"),
    *("trust_remote_code", "code_revision"),
}


def load_bitsandbytes(
    auto_class: Any,
    name: str,
    *,
    threshold: float = 0.0,
    compute_dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> Any:
    """Load a checkpoint that bitsandbytes quantised, in 4 or 8 bits, without bitsandbytes; returns the model.

        model = load_bitsandbytes(AutoModelForCausalLM, "somebody/llama-bnb-4bit", dtype=torch.bfloat16)

    Codes are those of the file, where rows are multiples of a block; ``convert.bitsandbytes`` says what else can be.

    Args:
        auto_class: any class that has ``from_pretrained``.
        name: a name on the hub or a folder.
        threshold: of 8-bit weights, as ``layers.Weights`` says: 6.0 computes as bitsandbytes does by default, with
            inputs in int8 too; 0 leaves inputs as they are, which is closer to the model before it was quantised.
        compute_dtype: as ``layers.Weights`` says.
        kwargs: for ``auto_class.from_pretrained``: ``dtype``, ``device_map``, ``revision``, ...

    Raises:
        ValueError: for a checkpoint that is not bitsandbytes', and for damaged weights.
    """
    if "quantization_config" in kwargs:
        raise ValueError("quantization_config must be left out: the checkpoint is quantised already")
    given = kwargs.pop("config", None)
    config = given or AutoConfig.from_pretrained(name, **{k: v for k, v in kwargs.items() if k in OF_CONFIG})
    holder = config if getattr(config, "quantization_config", None) else config.get_text_config(decoder=True)
    saved = getattr(holder, "quantization_config", None)
    saved = saved if isinstance(saved, dict) else saved.to_dict() if saved is not None else {}
    if saved.get("quant_method") != "bitsandbytes" and not (saved.get("load_in_4bit") or saved.get("load_in_8bit")):
        found = f"quant_method {saved['quant_method']!r}" if "quant_method" in saved else "no quantization_config"
        raise ValueError(f"{name} is not a checkpoint of bitsandbytes: its config has {found}")
    storage = saved.get("bnb_4bit_quant_storage") or "uint8"
    settings = {"threshold": threshold, "compute_dtype": compute_dtype, "storage": str(storage)}
    if saved.get("load_in_8bit"):
        settings["storage"] = "int8"
    holder.quantization_config = {"quant_method": READS, **settings}
    return auto_class.from_pretrained(name, config=config, **kwargs)


@register_quantization_config(READS)
class BitsAndBytesFiles(QuantizationConfigMixin):
    """What ``load_bitsandbytes`` tells the quantizer. A loaded model has a ``LowBitConfig`` in its place."""

    def __init__(
        self, quant_method: str = READS, threshold: float = 0.0, compute_dtype: Any = None, storage: str = "uint8"
    ) -> None:
        self.quant_method: Any = quant_method
        self.threshold, self.compute_dtype = threshold, compute_dtype
        self.storage = getattr(torch, storage.removeprefix("torch."))


class Take(ConversionOps):
    """Puts the parts of a weight, as bitsandbytes saved them, into its layer."""

    def __init__(self, hf_quantizer: BitsAndBytesQuantizer) -> None:
        self.hf_quantizer = hf_quantizer  # the name that Transformers looks for: parts keep their dtypes then

    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        model: PreTrainedModel,
        full_layer_name: str,
        missing_keys: MutableSet[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """``input_dict``: ends of names -> tensors, of the weight ``full_layer_name``."""
        parts = {part: value[0] if isinstance(value, list) else value for part, value in input_dict.items()}
        if full_layer_name not in self.hf_quantizer.parts:
            weight = parts["weight"]
            dtype = model.get_parameter(full_layer_name).dtype
            return {"weight": weight.to(dtype) if weight.is_floating_point() else weight}
        self.hf_quantizer.take_parts(model, full_layer_name, parts)
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        return {}


@register_quantizer(READS)
class BitsAndBytesQuantizer(LowBitQuantizer):
    """Loads what bitsandbytes saved."""

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.parts: dict[str, torch.dtype] = {}
        """Weights that the files have in bitsandbytes' form, with the dtype that the model has them in."""

    def get_weight_conversions(self) -> list[WeightConverter]:
        return [WeightConverter(source_patterns=[*PARTS], target_patterns="weight", operations=[Take(self)])]

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        self.pages = ReadPages(checkpoint_files)
        found = bitsandbytes.weights_of(tensors(checkpoint_files or ()))
        if not found:
            raise ValueError(f"{checkpoint_files} hold no weight of bitsandbytes, though the config says so")
        state = model.state_dict()
        for saved, name in _names_in(model, found).items():
            weight = state.get(name)
            if weight is None or not name.endswith(".weight"):
                raise ValueError(
                    f"{saved} is in bitsandbytes' form, but {type(model).__name__} has no layer of its own for it "
                    f"({name}): experts that were quantised one by one can't be stacked"
                )
            self.parts[name] = weight.dtype
            layer = model.get_submodule(name.removesuffix(".weight"))
            # Transformers casts what it reads to the dtype of the parameter.
            layer.weight = nn.Parameter(weight.to(self.quantization_config.storage), requires_grad=False)

    def take_parts(self, model: PreTrainedModel, name: str, parts: dict[str, Tensor]) -> None:
        """Take one weight from its parts."""
        prefix = name.removesuffix("weight")
        layer: Any = layer_at(model, prefix.removesuffix("."))
        plain = torch.empty(layer.weight.shape, dtype=self.parts[name], device="meta")
        layer.weight = nn.Parameter(plain, requires_grad=False)
        own = self.quantization_config
        fields = {"compute_dtype": own.compute_dtype}
        if "SCB" in parts:
            weights = Weights.of("int8", **fields, threshold=own.threshold)
        else:
            weights = Weights.of("nf4", **fields)
        low: Any = adopt(layer, weights)
        found = {f"{prefix}{part}": lambda value=value: value for part, value in parts.items()}
        low.hold(*bitsandbytes.read(name, found, low.weight_shape, weights, parts["weight"].device))
        low.snr_db = None
        initialized(low)
        self.pages.read(parts["weight"].nbytes)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        self.quantization_config = model.config.quantization_config = LowBitConfig()
        model.quantization_method = METHOD
        super()._process_model_after_weight_loading(model, **kwargs)
        config = self.quantization_config
        config.weights = next(iter({str(one) for one in _formats(config.layers or {})}), config.weights)
        return model


def _formats(layers: dict[str, Any]) -> Iterable[str]:
    return (one if isinstance(one, str) else one["weights"] for one in layers.values())


def _names_in(model: PreTrainedModel, saved: Iterable[str]) -> dict[str, str]:
    """Names in files -> names in the model, as Transformers will map them."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    state = model.state_dict()
    return {name: rename_source_key(name, renamings, converters, model.base_model_prefix, state)[0] for name in saved}
