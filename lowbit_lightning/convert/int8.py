"""Linear layers, convolutions, attentions and experts that compute in int8, in place, and back.

``swap_linears`` turns ``nn.Linear``, Transformers' ``Conv1D``, ``nn.Conv1d`` to ``3d``, ``nn.MultiheadAttention`` and
the experts of mixtures of experts (``layers.moe``) into their int8 forms by changing the object's class: parameters,
names, hooks, tying and ``state_dict`` stay, so optimizers, DDP and checkpoints notice nothing. ``restore`` turns them
back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from lowbit_lightning.convert.others import INSTEAD, others
from lowbit_lightning.layers.attention import weights_of
from lowbit_lightning.layers.int8 import FLOATS, FORMS, Int8Layer, Products, adopt, can_be_released, is_conv1d, release
from lowbit_lightning.layers.moe import int8_experts, is_experts, parameters_of
from lowbit_lightning.layers.outputs import sizes
from lowbit_lightning.layers.select import Overrides, Patterns, Report, Selection, grouped, select, stacked

MIN_FEATURES = 32
"""Below one tile of an int8 matrix instruction a product is cheaper than quantising its operands."""

MIN_CHANNELS = 16
"""The same for a convolution, where the channels of each tap are summed separately."""


LAST = "the model's last convolution: perhaps its output (output_layer=None takes it too)"
OWNED = "its nn.MultiheadAttention runs in high precision, and reads this weight itself"
_Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
_CANDIDATES = nn.Linear | Int8Layer | _Conv | nn.MultiheadAttention


class NothingToSwap(ValueError):
    """No layer of the model would run in int8; the message lists the model's layers and says what to use instead."""


def swap_linears(
    module: nn.Module,
    *,
    include: Patterns = "*",
    exclude: Patterns = (),
    filter: Callable[[str, Any], bool] | None = None,
    output_layer: str | None = "auto",
    min_features: int = MIN_FEATURES,
    overrides: Overrides | None = None,
    **settings: Any,
) -> Report[Products]:
    """Turn the module's linear layers, convolutions, attentions and experts into their int8 forms, in place.

    It swaps only objects whose type is exactly ``nn.Linear``, Transformers' ``Conv1D``, ``nn.Conv1d`` to ``3d`` or
    ``nn.MultiheadAttention``: subclasses have their own forward, or their owner reads their weight; and experts
    (``layers.Experts``, and those of Transformers' models), whose projections share one setting. Convolutions need
    ``groups=1``, zeros as padding, and at least 16 channels in and out. The name of an attention stands for its input
    projections, ``NAME.out_proj`` for the output projection, which stays plain if the attention does.

    The call is idempotent. A later call with another filter or other settings also turns back layers that an earlier
    call swapped.

    Args:
        include, exclude: shell patterns of qualified names (``"blocks.*.mlp.*"``); each must match some layer.
        filter: ``filter(name, layer)``, called last; False skips the layer.
        output_layer: "auto" (``layers.outputs`` finds it), a name or pattern, or None (no layer is special).
        min_features: linear layers with fewer input or output features are skipped.
        overrides: pattern -> settings for the layers that it matches, or None to skip them:
            ``{"*.down": {"grad_weight": "high"}, "blocks.0.*": None}``. If several patterns match a layer, the later
            one overrides the earlier.
        settings: the fields of ``layers.Products``, for all other layers.

    Raises:
        TypeError, ValueError: an unknown setting, or a pattern that matches no layer. Nothing is changed then.
        NothingToSwap: a ValueError too; the message lists what is there.

    Warns if the output layer is uncertain (``output_layer="auto"``).
    """
    products = Products(**settings)
    layers = {name: m for name, m in module.named_modules() if _is_candidate(m)}
    last = _last_convolution(layers) if output_layer == "auto" else None
    selection = select(
        module,
        layers,
        products,
        unfit=lambda layer: LAST if layer is last else _unfit(layer, min_features),
        change=Products.changed,
        include=include,
        exclude=exclude,
        filter=filter,
        output_layer=output_layer,
        overrides=overrides,
    )
    selection, rest = _without_owned(layers, selection), others(module, layers)
    _carry_out(module, layers, selection, rest)
    return Report.of(selection, products, _notes(module), rest)


def _carry_out(
    module: nn.Module, layers: Mapping[str, nn.Module], selection: Selection[Products], rest: dict[str, str]
) -> None:
    """Swap the chosen layers, and turn back the others that an earlier call swapped."""
    turned_back = {name: layers[name] for name in selection.skipped if _is_adopted(layers[name])}
    _check_released(turned_back)
    if not selection.chosen:
        raise NothingToSwap(_nothing(module, {**selection.skipped, **rest}))
    for name, products in selection.chosen.items():
        if is_experts(layers[name]) and not isinstance(layers[name], Int8Layer):
            int8_experts(type(layers[name]))  # their class may be one of a model
        adopt(layers[name], products)
    for layer in turned_back.values():
        release(layer)  # type: ignore[arg-type]


def restore(module: nn.Module) -> tuple[str, ...]:
    """Turn every int8 layer back into the plain one, in place; returns their names.

    Raises:
        ValueError: for layers whose class was replaced by ``fully_shard`` or by a parametrization.
    """
    layers = {name: m for name, m in module.named_modules() if isinstance(m, Int8Layer)}
    _check_released(layers)
    for layer in layers.values():
        release(layer)
    return tuple(layers)


def _is_candidate(module: nn.Module) -> bool:
    return isinstance(module, _CANDIDATES) or is_conv1d(module) or is_experts(module)


def _is_adopted(layer: nn.Module) -> bool:
    return isinstance(layer, Int8Layer) and layer.adopted


def _check_released(layers: Mapping[str, nn.Module]) -> None:
    """Raise for layers whose class is no longer the one that ``adopt`` gave them."""
    derived = {name: m for name, m in layers.items() if not can_be_released(m)}
    if parametrized := [name for name, m in derived.items() if is_parametrized(m)]:
        raise ValueError(
            f"{stacked(parametrized)}: parametrized after it became an int8 layer, and can't be turned back so; call "
            "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight') first"
        )
    if derived:
        raise ValueError(
            f"fully_shard was applied to {stacked(derived)} itself, whose class can't be changed back from "
            "int8: choose layers before sharding, or make a new model and load the weights"
        )


def _unfit(layer: nn.Module, min_features: int) -> str | None:
    plain: Any = layer.plain if isinstance(layer, Int8Layer) else type(layer)
    if isinstance(layer, Int8Layer):  # also under the class that fully_shard derives
        if not layer.adopted:
            return f"was built as Int8{plain.__name__}; left as it is"
    elif plain not in FORMS and not is_conv1d(layer) and not is_experts(layer):
        kinds = {nn.Linear: "Linear", nn.MultiheadAttention: "MultiheadAttention"}
        kind = next((name for base, name in kinds.items() if isinstance(layer, base)), "Conv")
        return f"{plain.__name__} is a subclass of nn.{kind}"
    elif "forward" in vars(layer):
        return "its forward was replaced on the object"
    reason = _unfit_convolution(layer) if isinstance(layer, _Conv) else _unfit_matrix(layer, min_features)
    dtype = _weights(layer)[0].dtype
    return reason or (None if dtype in FLOATS else f"weight is {dtype}; int8 takes float32, float16 and bfloat16")


def _weights(layer: Any) -> tuple[Any, ...]:
    if isinstance(layer, nn.MultiheadAttention):
        return weights_of(layer)
    return tuple(getattr(layer, name) for name in parameters_of(layer)) if is_experts(layer) else (layer.weight,)


def _unfit_matrix(layer: nn.Module, min_features: int) -> str | None:
    features: Any = sizes(layer)  # not those of the weight, which DeepSpeed may have taken apart
    if isinstance(layer, nn.MultiheadAttention):
        features = layer.embed_dim, layer.kdim, layer.vdim
    elif is_experts(layer):
        if getattr(layer, "_is_expert_parallel", False):
            return "expert parallelism, where a rank has some of the experts, runs in high precision"
        features = [size for weight in _weights(layer) for size in getattr(weight, "ds_shape", weight.shape)[1:]]
    few = features is None or min(features) < min_features
    return f"fewer than min_features={min_features} features" if few else None


def _unfit_convolution(layer: Any) -> str | None:
    if layer.groups != 1:
        return "grouped and depthwise convolutions run in high precision"
    if layer.padding_mode != "zeros":
        return f"padding_mode={layer.padding_mode!r} runs in high precision"
    few = min(layer.in_channels, layer.out_channels) < MIN_CHANNELS
    return f"a convolution of fewer than {MIN_CHANNELS} channels" if few else None


def _last_convolution(layers: Mapping[str, nn.Module]) -> nn.Module | None:
    """The convolution that computes the output of a model without linear layers after it (a UNet)."""
    last = list(layers.values())[-1] if layers else None
    return last if isinstance(last, _Conv) else None


def _without_owned(layers: Mapping[str, nn.Module], selection: Selection[Products]) -> Selection[Products]:
    """Output projections stay plain where an attention doesn't call them."""
    plain = [n for n, m in layers.items() if isinstance(m, nn.MultiheadAttention) and n not in selection.chosen]
    owned = {f"{name}.out_proj".lstrip(".") for name in plain} & set(selection.chosen)
    chosen = {name: own for name, own in selection.chosen.items() if name not in owned}
    skipped = {name: OWNED if name in owned else selection.skipped.get(name) for name in layers if name not in chosen}
    return Selection(chosen, skipped)  # type: ignore[arg-type]


def _nothing(module: nn.Module, there: dict[str, str]) -> str:
    """The error's text: what the model has, by the reason why it is not swapped."""
    found = "\n".join(f"  {names}: {reason}" for reason, names in grouped(there)) or "  no layer with a matrix"
    return f"nothing to swap in {type(module).__name__}: no layer would run in int8. It has\n{found}\n{INSTEAD}."


def _notes(module: nn.Module) -> tuple[str, ...]:
    fused = [
        name
        for name, m in module.named_modules()
        if isinstance(m, nn.TransformerEncoderLayer)
        and isinstance(m.linear1, Int8Layer)
        and not isinstance(m.self_attn, Int8Layer)
    ]
    if not fused:
        return ()
    return (
        f"{stacked(fused)}: nn.TransformerEncoderLayer whose attention is not in int8 may take torch's fused path in "
        "evaluation, which bypasses its layers: int8 in training only (torch.backends.mha.set_fastpath_enabled(False) "
        "turns that path off)",
    )
