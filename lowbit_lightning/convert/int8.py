"""Linear layers that compute in int8, in place, and back.

``swap_linears`` turns ``nn.Linear`` into ``Int8Linear`` by changing the object's class: parameters, names, hooks,
tying and ``state_dict`` stay, so optimizers, DDP and checkpoints notice nothing. ``restore`` turns them back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from lowbit_lightning.layers.int8 import FLOATS, Int8Linear, Products
from lowbit_lightning.layers.select import Overrides, Patterns, Report, select, stacked

MIN_FEATURES = 32
"""Below one tile of an int8 matrix instruction a product is cheaper than quantising its operands."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def swap_linears(
    module: nn.Module,
    *,
    include: Patterns = "*",
    exclude: Patterns = (),
    filter: Callable[[str, nn.Linear], bool] | None = None,
    output_layer: str | None = "auto",
    min_features: int = MIN_FEATURES,
    overrides: Overrides | None = None,
    **settings: Any,
) -> Report[Products]:
    """Turn the module's ``nn.Linear`` layers into ``Int8Linear``, in place.

    Only objects whose type is exactly ``nn.Linear``: subclasses bring their own forward or are read by their owner.
    Idempotent; and a later call with another filter or other settings also takes back what an earlier one swapped.

    Args:
        include, exclude: shell patterns of qualified names (``"blocks.*.mlp.*"``); each must match some Linear.
        filter: ``filter(name, linear)``, asked last; False skips the layer.
        output_layer: "auto" (the rule in ``layers.select``), a name or pattern, or None (no layer is special).
        min_features: layers with fewer input or output features are skipped.
        overrides: pattern -> settings that differ for the layers it matches, or None to skip them:
            ``{"*.down": {"grad_weight": "high"}, "blocks.0.*": None}``. Of several patterns that match a layer the
            later goes over the earlier.
        settings: the fields of ``layers.Products``, for all other layers.

    Raises:
        TypeError, ValueError: an unknown setting, a pattern that matches no Linear, or nothing left to swap; the
            message lists what is there. Nothing is changed then.
    """
    products = Products(**settings)
    linears = {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear)}
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
    _check_released(n for n in selection.skipped if _is_derived(linears[n]) and linears[n].adopted)  # type: ignore
    if not selection.chosen:
        raise ValueError(_nothing(module, selection.skipped))
    for name, linear in linears.items():
        if name in selection.chosen:
            Int8Linear.adopt(linear, selection.chosen[name])
        elif type(linear) is Int8Linear and linear.adopted:
            Int8Linear.release(linear)
    others = {n: "convolutions are not swapped" for n, m in module.named_modules() if isinstance(m, CONVOLUTIONS)}
    return Report.of(selection, products, _notes(module), others)


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
            f"fully_shard was applied to {stacked(held)} itself, whose class can't be changed back from Int8Linear: "
            "choose layers before sharding, or make a new model and load the weights"
        )


def _unfit(linear: nn.Module, min_features: int) -> str | None:
    assert isinstance(linear, nn.Linear)
    if isinstance(linear, Int8Linear):  # also under the class that fully_shard derives
        if not linear.adopted:
            return "was built as Int8Linear; left as it is"
    elif type(linear) is not nn.Linear:
        return f"{type(linear).__name__} is a subclass of nn.Linear"
    elif "forward" in vars(linear):
        return "its forward was replaced on the object"
    if min(linear.in_features, linear.out_features) < min_features:
        return f"fewer than min_features={min_features} features"
    dtype = linear.weight.dtype
    return None if dtype in FLOATS else f"weight is {dtype}; int8 takes float32, float16 and bfloat16"


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
        f"{stacked(fused)}: nn.TransformerEncoderLayer may take torch's fused path in evaluation, which bypasses "
        "its layers: int8 in training only (torch.backends.mha.set_fastpath_enabled(False) turns that path off)",
    )
