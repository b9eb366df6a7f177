"""``LowBitWeights``: a plugin that quantises a model's weights, under any precision of the Trainer and Fabric.

How it works
    A precision says how a run computes; these weights say how what is frozen is stored. So the plugin stands beside a
    precision, not in its place: ``Trainer(precision="bf16-mixed", plugins=[LowBitWeights("nf4")])``. The wrapped
    connectors (``registration``) take it out of the list, let Lightning choose the precision plugin as ever, and
    have that one's ``convert_module`` quantise first. Under strategies that restore a checkpoint before they set
    the model up, the model is quantised before it is restored, so that saved codes find their layers.

Which layers
    Those of ``quantize``, with its arguments. If some linear layer of the model is frozen, those that train stay as
    they are: they are adapters, or a new head. If none is, all are quantised.

Interactions
    Weights stay quantised when the run ends: the next ``fit``, ``validate`` or ``predict`` finds them so.
    A ``configure_model`` that shards the model itself calls ``quantize`` before ``fully_shard``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_info
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import Precision
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.distributed.tensor import DTensor

from lowbit_lightning.convert import WeightReport, quantize, weight_report
from lowbit_lightning.convert.lowbit import NothingToQuantize, low_bit_layers
from lowbit_lightning.layers.int8 import is_conv1d
from lowbit_lightning.layers.lowbit import Weights
from lowbit_lightning.layers.select import Overrides, Patterns, check_overrides

ATTRIBUTE = "low_bit_weights"
"""The attribute in which a precision plugin that quantises first holds its ``LowBitWeights``."""


class LowBitWeights(Precision):
    """Weights in low bits for the Trainer and Fabric, on any device: ``plugins=[LowBitWeights("nf4")]``.

    Args:
        weights: the format: ``"int8"``, ``"nf4"``, ``"fp4"``, ``"int4"``, ``"int3"``, ``"int2"``, with ``-dq`` and
            ``-g128`` as ``kernels.formats.weight_format`` says.
        include, exclude, filter, output_layer, overrides, embeddings, experts: which layers; see ``quantize``.
        fit, compute_dtype, threshold: see ``layers.Weights``.

    ``report`` is the ``WeightReport`` of the model, once a run has begun; it is logged too. Optimizers are built from
    the quantised model: in ``configure_optimizers``, or after ``fabric.setup``.

    Raises:
        TypeError, ValueError: for a bad setting; and, when a run begins, for a pattern that matches no layer, nothing
            to quantise, nothing left to train under ``fit``, or a model that is sharded already.

    Example::

        Trainer(precision="int8-mixed", strategy="lowbit_sharded", plugins=[LowBitWeights("nf4", exclude="router.*")])
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
        compute_dtype: torch.dtype | None = None,
        threshold: float = 0.0,
    ) -> None:
        own: dict[str, Any] = {"fit": fit, "compute_dtype": compute_dtype, "threshold": threshold}
        check_overrides(Weights.of(weights, **own), overrides or {}, Weights.changed)
        self.report: WeightReport | None = None
        self._exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
        self._arguments = {
            "weights": weights,
            "include": include if isinstance(include, str) else tuple(include),
            "filter": filter,
            "output_layer": output_layer,
            "overrides": dict(overrides or {}),
            "embeddings": embeddings,
            "experts": experts,
            **own,
        }

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Quantise in place; what is quantised already stays as it is."""
        quantised = any(True for _ in low_bit_layers(module))
        if any(isinstance(p, DTensor) for p in module.parameters()):
            if not quantised:
                raise ValueError(
                    f"{type(module).__name__} is sharded already, and its weights are not quantised: call "
                    "lowbit_lightning.quantize(model, ...) in configure_model before fully_shard, or let "
                    'strategy="lowbit_sharded" shard it'
                )
        else:
            try:
                quantize(module, exclude=(*self._exclude, *_trained(module)), **self._arguments)
            except NothingToQuantize:
                if not quantised:
                    raise
        _check_training(module)
        self._say(weight_report(module))
        return module

    def _say(self, report: WeightReport) -> None:
        if report != self.report:
            rank_zero_info(str(report))
        self.report = report


def attach(weights: LowBitWeights, plugin: Any, strategy: Any) -> None:
    """Have a precision plugin quantise first, and a strategy of the Trainer that restores before it converts too."""
    setattr(plugin, ATTRIBUTE, weights)
    plugin.convert_module = _First(weights, plugin, "convert_module")
    if getattr(strategy, "restore_checkpoint_after_setup", True) is False:
        strategy.load_model_state_dict = _First(weights, strategy, "load_model_state_dict")


class _First:
    """A method that quantises before it does what it does. An object, because strategies are pickled."""

    def __init__(self, weights: LowBitWeights, owner: Any, method: str) -> None:
        self.weights, self.owner, self.method = weights, owner, method

    def __call__(self, first: Any, *args: Any, **kwargs: Any) -> Any:
        self.weights.convert_module(first if isinstance(first, nn.Module) else self.owner.lightning_module)
        return getattr(type(self.owner), self.method)(self.owner, first, *args, **kwargs)


def _check_training(module: nn.Module) -> None:
    """Raise for a module that is to be fitted and has nothing to train."""
    trainer = module._trainer if isinstance(module, LightningModule) else None
    if trainer is None or trainer.state.fn != TrainerFn.FITTING or any(p.requires_grad for p in module.parameters()):
        return
    raise ValueError(
        f"nothing is left to train in {type(module).__name__}: quantised weights are frozen. Freeze the model by "
        "requires_grad_(False) before adapters are added, so that LowBitWeights can tell them apart; or exclude= what "
        "is to be trained"
    )


def _trained(module: nn.Module) -> list[str]:
    """The linear layers that train beside frozen ones: adapters, or a new head."""
    weights = {name: m.weight for name, m in module.named_modules() if isinstance(m, nn.Linear) or is_conv1d(m)}
    trained = [name for name, weight in weights.items() if weight.requires_grad]  # type: ignore[union-attr]
    return trained if len(trained) < len(weights) else []
