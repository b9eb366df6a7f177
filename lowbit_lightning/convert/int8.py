"""Linear layers that compute in int8, in place, and back.

``swap_linears`` turns ``nn.Linear``, and Transformers' ``Conv1D``, into their int8 forms by changing the object's
class: parameters, names, hooks, tying and ``state_dict`` stay, so optimizers, DDP and checkpoints notice nothing.
``restore`` turns them back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from lowbit_lightning.convert.others import INSTEAD, others
from lowbit_lightning.layers.int8 import FLOATS, Int8Layer, Products, adopt, can_be_released, is_conv1d, release
from lowbit_lightning.layers.outputs import sizes
from lowbit_lightning.layers.select import Overrides, Patterns, Report, grouped, select, stacked

MIN_FEATURES = 32
"""Below one tile of an int8 matrix instruction a product is cheaper than quantising its operands."""


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
    """Turn the module's linear layers into their int8 forms, in place.

    It swaps only objects whose type is exactly ``nn.Linear`` or Transformers' ``Conv1D``: subclasses have their own
    forward, or their owner reads their weight. The call is idempotent. A later call with another filter or other
    settings also turns back layers that an earlier call swapped.

    Args:
        include, exclude: shell patterns of qualified names (``"blocks.*.mlp.*"``); each must match some layer.
        filter: ``filter(name, linear)``, called last; False skips the layer.
        output_layer: "auto" (``layers.outputs`` finds it), a name or pattern, or None (no layer is special).
        min_features: layers with fewer input or output features are skipped.
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
    linears = {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear | Int8Layer) or is_conv1d(m)}
    selection = select(
        module,
        linears,
        products,
        unfit=lambda linear: _unfit(linear, min_features),
        change=Products.changed,
        include=include,
        exclude=exclude,
        filter=filter,
        output_layer=output_layer,
        overrides=overrides,
    )
    _check_released({n: linears[n] for n in selection.skipped if _is_adopted(linears[n])})
    rest = others(module, linears)
    if not selection.chosen:
        raise NothingToSwap(_nothing(module, {**selection.skipped, **rest}))
    for name, linear in linears.items():
        if name in selection.chosen:
            adopt(linear, selection.chosen[name])
        elif _is_adopted(linear):
            release(linear)  # type: ignore[arg-type]
    return Report.of(selection, products, _notes(module), rest)


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
            "Int8Linear: choose layers before sharding, or make a new model and load the weights"
        )


def _unfit(layer: nn.Module, min_features: int) -> str | None:
    if isinstance(layer, Int8Layer):  # also under the class that fully_shard derives
        if not layer.adopted:
            return "was built as Int8Linear; left as it is"
    elif type(layer) is not nn.Linear and not is_conv1d(layer):
        return f"{type(layer).__name__} is a subclass of nn.Linear"
    elif "forward" in vars(layer):
        return "its forward was replaced on the object"
    features = sizes(layer)  # not those of the weight, which DeepSpeed may have taken apart
    if features is None or min(features) < min_features:
        return f"fewer than min_features={min_features} features"
    dtype = layer.weight.dtype
    return None if dtype in FLOATS else f"weight is {dtype}; int8 takes float32, float16 and bfloat16"


def _nothing(module: nn.Module, there: dict[str, str]) -> str:
    """What the model has instead, by reasons."""
    found = "\n".join(f"  {names}: {reason}" for reason, names in grouped(there)) or "  no layer with a matrix"
    return f"nothing to swap in {type(module).__name__}: no linear layer would run in int8. It has\n{found}\n{INSTEAD}."


def _notes(module: nn.Module) -> tuple[str, ...]:
    fused = [
        name
        for name, m in module.named_modules()
        if isinstance(m, nn.TransformerEncoderLayer) and isinstance(m.linear1, Int8Layer)
    ]
    if not fused:
        return ()
    return (
        f"{stacked(fused)}: nn.TransformerEncoderLayer may take torch's fused path in evaluation, which bypasses "
        "its layers: int8 in training only (torch.backends.mha.set_fastpath_enabled(False) turns that path off)",
    )
