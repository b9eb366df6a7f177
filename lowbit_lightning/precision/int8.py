"""The plugins of ``precision="int8-mixed"``: which layers run in int8, and in which dtype the other ops run."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.fabric.plugins.precision import Precision as FabricPrecision
from lightning.fabric.utilities.apply_func import apply_to_collection
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.plugins import DeepSpeedPrecision
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lowbit_lightning.convert import MIN_FEATURES, NothingToSwap, swap_linears
from lowbit_lightning.layers.int8 import (
    Int8Layer,
    Product,
    Products,
    Rotation,
    Rounding,
    Saved,
    can_be_released,
    release,
)
from lowbit_lightning.layers.select import Overrides, Report, check_overrides
from lowbit_lightning.precision.autocast import Choice, choose, computes_in_bf16
from lowbit_lightning.precision.in_step import InStep
from lowbit_lightning.precision.peaks import weakness
from lowbit_lightning.precision.slower import Slower

NAME = "int8-mixed"
KEPT = "lowbit_lightning.autocast"  # a checkpoint's key for what autocast="auto" chose
KEPT_LAYERS = "lowbit_lightning.swap"  # and for what swap="faster" chose


class Int8Mixed:
    """The common part of the Trainer's and Fabric's plugins."""

    precision: Any = NAME
    by_name = False
    """True where the bare string asked for it: a model with nothing to swap is then a warning, no error."""

    device_type: str | None = None  # the accelerator's; None: that of the module when it is converted

    def __init__(
        self,
        *,
        include: str | Iterable[str] = "*",
        exclude: str | Iterable[str] = (),
        filter: Callable[[str, nn.Linear], bool] | None = None,
        output_layer: str | None = "auto",
        min_features: int = MIN_FEATURES,
        forward: Product = "int8",
        grad_input: Product = "int8",
        grad_weight: Product = "int8",
        save_inputs: Saved = "int8",
        gradient_rounding: Rounding = "auto",
        rotation: Rotation = "none",
        overrides: Overrides | None = None,
        swap: Literal["faster", "all"] = "faster",
        autocast: Literal["auto", "bf16", "off"] = "auto",
    ) -> None:
        if swap not in ("faster", "all"):
            raise ValueError(f"swap must be 'faster' or 'all', got {swap!r}")
        if autocast not in ("auto", "bf16", "off"):
            raise ValueError(f"autocast must be 'auto', 'bf16' or 'off', got {autocast!r}")
        products = Products(forward, grad_input, grad_weight, save_inputs, gradient_rounding, rotation)
        overrides = dict(overrides or {})
        check_overrides(products, overrides, Products.changed)
        if not products.int8:
            rank_zero_warn("int8-mixed with forward, grad_input and grad_weight all 'high' runs nothing in int8")
        elif gradient_rounding == "stochastic" and products.int8 == ("forward",):
            rank_zero_warn("gradient_rounding='stochastic' does nothing where grad_input and grad_weight are 'high'")
        self.autocast, self.swap = autocast, swap
        self.report: Report | None = None
        self._swap: Callable[[nn.Module], Report] = functools.partial(
            swap_linears,
            include=include if isinstance(include, str) else tuple(include),
            exclude=exclude if isinstance(exclude, str) else tuple(exclude),
            filter=filter,
            output_layer=output_layer,
            min_features=min_features,
            overrides=overrides,
            **vars(products),
        )
        self._module: weakref.ref[nn.Module] | None = None
        self._swapped: Report | None = None  # the report without the note on autocast
        self._choice: Choice | None = None
        self._resumed = False  # the choice is a checkpoint's
        self._slower = Slower()
        self._warned = self._found_nothing = self._said_weak = False
        self._lent: list[weakref.ref[nn.Module]] = []  # layers to turn back

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Swap the layers in place (again: Lightning calls this for every fit, validate, test and predict)."""
        before = {m for m in module.modules() if isinstance(m, Int8Layer)}
        try:
            report: Report | None = self._swap(module)
        except NothingToSwap as error:
            if not self.by_name:
                raise
            report = None
            if not self._found_nothing:
                rank_zero_warn(f"precision={NAME!r} runs nothing of this model in int8: {error}")
            self._found_nothing = True
        if self.autocast == "auto" and not self._resumed:
            self._choice = choose(module, self.device_type or _device(module))
        if report is not None:
            self._say(self._slower.apply(module, report))
            self._warn_of_weak_int8(module)
        self._module = weakref.ref(module)
        new = (m for m in module.modules() if isinstance(m, Int8Layer) and m not in before)
        self._lent += [weakref.ref(m) for m in new]
        return module

    def _warn_of_weak_int8(self, module: nn.Module) -> None:
        if (self.device_type or _device(module)) == "cuda" and not self._said_weak:
            self._said_weak = True
            if (weak := weakness(torch.cuda.current_device())) is not None:
                rank_zero_warn(weak)

    def optimizer_step(self, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        """After the first step, layers that are slower in int8 go on in high precision."""
        result = super().optimizer_step(optimizer, *args, **kwargs)  # type: ignore[misc]
        self.leave_slower_layers()
        return result

    def leave_slower_layers(self) -> None:
        """Time the layers of a model that has trained a step, and make those plain that are slower in int8.

        Nothing happens a second time, or with ``swap="all"``. All ranks call it together.
        """
        module = self._converted
        if self.swap == "faster" and not self._slower.known and module is not None and self._swapped is not None:
            self._slower.find(module, self._swapped)
            self._say(self._slower.apply(module, self._swapped))

    @property
    def _converted(self) -> nn.Module | None:
        """The module that was converted last, while it exists."""
        return None if self._module is None else self._module()

    def release_layers(self) -> None:
        """Turn the layers back that ``convert_module`` swapped: int8 is how a run computes, not what a model is.

        A layer whose class was replaced by a subclass since (by ``fully_shard`` on the layer itself) stays int8.
        """
        for layer in (reference() for reference in self._lent):
            if isinstance(layer, Int8Layer) and can_be_released(layer):
                release(layer)
        self._lent.clear()

    def forward_context(self) -> AbstractContextManager:
        """bf16 autocast for all other ops, or no autocast if bf16 is not wanted or not faster."""
        device = _device(self._converted)
        if self.autocast == "bf16" and not self._warned and not computes_in_bf16(device):
            self._warned = True
            rank_zero_warn(f"autocast='bf16' on {device}, whose hardware emulates bf16: 'auto' or 'off' is faster")
        if self.autocast == "bf16" or (self.autocast == "auto" and self._choice is not None and self._choice.bf16):
            # No cache of casts: a step of manual optimization may update weights and use them again.
            return torch.autocast(device, torch.bfloat16, cache_enabled=False)
        return nullcontext()

    def _say(self, swapped: Report) -> None:
        self._swapped = swapped
        notes = [] if self._choice is None else [str(self._choice)]
        report = replace(swapped, notes=(*swapped.notes, *notes))
        if report != self.report:
            rank_zero_info(str(report))
        self.report = report

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_module": None, "_lent": []}  # weak references can't be pickled


class Int8MixedPrecision(Int8Mixed, InStep):
    """The plugin of Lightning's Trainer for int8: ``Trainer(precision="int8-mixed")`` with your own settings.

    Args:
        include, exclude, filter, output_layer, min_features: which layers to swap; see ``swap_linears``.
        forward, grad_input, grad_weight: "int8", "hadamard" (int8 after a rotation that spreads outliers) or "high"
            (the input's dtype), for each of a layer's three products.
        save_inputs: the form in which a layer's input is saved for the backward: "int8" (a byte per element) or "high".
        gradient_rounding: of the gradients that enter int8 products: "nearest", "stochastic", or "auto", which is
            "nearest" except that convolutions dither them for ``grad_weight`` (``layers.Products``).
        rotation: "hadamard" makes every "int8" of the three products "hadamard".
        overrides: pattern -> settings for the layers that it matches, or None to leave them in high precision.
        swap: "faster" leaves layers in high precision that are slower in int8 on this device: they are timed after the
            first step, at the sizes that they have seen (``precision.slower``). "all" keeps them in int8, which may
            be slower, but saves memory for activations. A resumed run keeps the choice.
        autocast: the dtype of other ops: "auto" (bf16 autocast if bf16 is faster: known on a GPU, measured on a CPU,
            see ``precision.autocast``), "bf16" or "off" (float32). A resumed run keeps what "auto" chose at first.

    ``report`` says what was swapped, what was skipped and why, once a run has begun; it is logged too.

    Raises:
        TypeError, ValueError: an unknown setting; and, when a run begins, a pattern that matches no layer, or a
            filter that leaves nothing to swap.

    Example::

        Trainer(plugins=[Int8MixedPrecision(exclude="encoder.*", overrides={"*.down": {"grad_weight": "high"}})])
    """

    def __repr__(self) -> str:
        """What pytorch_lightning shows when it refuses the plugin as one of an invalid type."""
        return f"<{type(self).__name__} for lightning.Trainer (not pytorch_lightning.Trainer)>"

    def teardown(self) -> None:
        """Lightning calls this at the end of every fit, validate, test and predict, of failed ones too."""
        self.release_layers()
        super().teardown()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps what was chosen, so that a run resumed on another machine computes as this one does."""
        super().on_save_checkpoint(checkpoint)
        if self._choice is not None:
            checkpoint[KEPT] = {"bf16": self._choice.bf16}
        if self._slower.known:
            checkpoint[KEPT_LAYERS] = self._slower.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lightning calls this after ``convert_module``."""
        super().on_load_checkpoint(checkpoint)
        module = self._converted
        if self.swap == "faster" and KEPT_LAYERS in checkpoint and module is not None and self._swapped is not None:
            self._slower = Slower.of(checkpoint[KEPT_LAYERS])
            self._say(self._slower.apply(module, self._swapped))
        if self.autocast != "auto" or KEPT not in checkpoint:
            return
        bf16 = checkpoint[KEPT]["bf16"]
        if self._choice is None or self._choice.bf16 == bf16:
            self._resumed = True
        elif self._is_sharded():
            was, now, asked = ("bfloat16", "float32", "bf16") if bf16 else ("float32", "bfloat16", "off")
            rank_zero_warn(
                f"the run that this one resumes ran other ops in {was}; here {now} is faster, and parameters have been "
                f"sharded for it, so losses will differ. Int8MixedPrecision(autocast={asked!r}) goes on in {was}"
            )
        else:
            self._resumed, self._choice = True, Choice(bf16, "so it was in the run that this one resumes")
            if self._swapped is not None:
                self._say(self._swapped)

    def _is_sharded(self) -> bool:
        module = self._converted
        return module is not None and any(isinstance(m, FSDPModule) for m in module.modules())


class DeepSpeedInt8MixedPrecision(Int8MixedPrecision, DeepSpeedPrecision):
    """What an ``Int8MixedPrecision`` becomes under a strategy whose engine runs backward and step (``fit_to``)."""

    def convert_input(self, data: Any) -> Any:
        return data


def fit_to(plugin: Int8MixedPrecision, engine: bool) -> None:
    """Make a plugin the one that the strategy wants; the same object, whoever made it."""
    forms = Int8MixedPrecision, DeepSpeedInt8MixedPrecision
    if type(plugin) in forms:
        plugin.__class__ = forms[engine]


class FabricInt8MixedPrecision(Int8Mixed, FabricPrecision):
    """``Int8MixedPrecision`` for Fabric: ``Fabric(precision="int8-mixed")`` with settings of one's own."""

    def convert_output(self, data: Any) -> Any:
        """Floating-point outputs in the default dtype, as in Fabric's "bf16-mixed"."""
        return apply_to_collection(data, Tensor, _to_default_dtype)


def _to_default_dtype(tensor: Tensor) -> Tensor:
    return tensor.to(torch.get_default_dtype()) if tensor.is_floating_point() else tensor


def _device(module: nn.Module | None) -> str:
    parameter = None if module is None else next(module.parameters(), None)
    return "cpu" if parameter is None else parameter.device.type
