"""Lightning's own precision plugins, with unscaling, clipping and skipping done by the step of this package's
optimizers.

How it works
    Lightning unscales (16-mixed), calls its hooks, clips, and steps. Each of these is a pass over the gradients'
    memory, and the host waits for the device before the step. Our optimizers do all of this in the step, from scalars
    on the device. So the Trainer's plugin becomes the subclass below of the same name, which uses the step if no user
    code can see the difference:

    * by the step: unscaling, clipping by norm, skipping after an overflow.
    * by passes, as ever: unscaling, where a callback or the module has ``on_before_optimizer_step`` or
      ``configure_gradient_clipping``, or the optimizer a step pre-hook: they are to see unscaled gradients; then also
      clipping. Clipping by value, and clipping under manual optimization. Skipping costs no wait in any case.

Interactions
    For other optimizers Lightning works as usual. Plugins of other classes, including subclasses of Lightning's,
    unscale and clip by passes; ``allow_clipping`` makes this possible.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.plugins.precision import amp as fabric_amp
from lightning.fabric.plugins.precision import fsdp as fabric_fsdp
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins import Precision
from lightning.pytorch.plugins.precision import amp, fsdp
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.amp.grad_scaler import OptState
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_pre_hooks

from lowbit_lightning.optim import LowBitOptimizer
from lowbit_lightning.precision.wrapping import wrap_once

_NORM, _VALUE = GradClipAlgorithmType.NORM, GradClipAlgorithmType.VALUE


class InStep(Precision):
    """Mixed into a precision plugin of the Trainer."""

    _clips_in_step = False  # while an optimizer's step has begun, and nothing will look at its gradients before it

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Any, model: LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """The closure has run backward before hooks and clipping run."""
        if not isinstance(optimizer, LowBitOptimizer):
            return super().optimizer_step(optimizer, model=model, closure=closure, **kwargs)
        vars(self).setdefault("_stepped", weakref.WeakSet()).add(optimizer)
        seen = _are_seen(model, optimizer)
        self._clips_in_step = not seen and model.automatic_optimization
        try:
            if getattr(self, "scaler", None) is None:
                return super().optimizer_step(optimizer, model=model, closure=closure, **kwargs)
            return self._scaled_step(optimizer, model, closure, seen, kwargs)
        finally:
            self._clips_in_step = False
            optimizer.clip_next_step(None)  # there was no step, where training_step returned None

    def _scaled_step(
        self, optimizer: LowBitOptimizer, model: LightningModule, closure: Callable[[], Any], seen: bool, kwargs: Any
    ) -> Any:
        scaler: Any = self.scaler  # type: ignore[attr-defined]
        result = closure()
        if result is None and model.automatic_optimization:  # no backward
            self._after_closure(model, optimizer)
            return result
        if seen and self._is_scaled(optimizer):
            scaler.unscale_(optimizer)
        self._after_closure(model, optimizer)
        result = scaler.step(optimizer, **kwargs)
        scaler.update()
        return result

    def clip_gradients(
        self,
        optimizer: Optimizer,
        clip_val: int | float = 0.0,
        gradient_clip_algorithm: GradClipAlgorithmType = _NORM,
    ) -> None:
        inner = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        if not isinstance(inner, LowBitOptimizer) or clip_val <= 0:
            super().clip_gradients(optimizer, clip_val, gradient_clip_algorithm)
        elif inner.releases_gradients:
            raise RuntimeError(
                f"gradient_clip_val={clip_val} comes too late for gradients that release_gradients freed during "
                "backward: parameters have been updated already; use no clipping, or do not release"
            )
        elif self._clips_in_step and gradient_clip_algorithm == _NORM:
            inner.clip_next_step(clip_val)
        elif self._is_scaled(inner):
            self._clip_scaled(inner, clip_val, gradient_clip_algorithm)
        elif gradient_clip_algorithm == _VALUE:
            self.clip_grad_by_value(inner, clip_val)
        else:
            self.clip_grad_by_norm(inner, clip_val)

    def teardown(self) -> None:
        """Lightning has just moved the states to the CPU. Plans would keep their old memory alive."""
        for optimizer in vars(self).pop("_stepped", ()):
            optimizer.forget_plans()
        super().teardown()

    def _is_scaled(self, optimizer: LowBitOptimizer) -> bool:
        """Whether the gradients are still multiplied by a scaler's scale."""
        scaler = getattr(self, "scaler", None)
        if scaler is None or not scaler.is_enabled():
            return False
        return scaler._per_optimizer_states[id(optimizer)]["stage"] is OptState.READY

    def _clip_scaled(self, optimizer: LowBitOptimizer, clip_val: float, algorithm: GradClipAlgorithmType) -> None:
        """Clip gradients that the step will unscale, to what the unscaled ones would be clipped to."""
        params = [p for p in self.main_params(optimizer) if p.grad is not None]
        scale = self.scaler.get_scale()  # type: ignore[attr-defined]
        if algorithm == _VALUE:
            torch.nn.utils.clip_grad_value_(params, clip_val * scale)
        else:
            norm = get_total_norm([p.grad for p in params if p.grad is not None])
            clip_grads_with_norm_(params, clip_val, norm / scale)


def _are_seen(model: Any, optimizer: LowBitOptimizer) -> bool:
    """Whether any user code can read the gradients between backward and step."""
    if not isinstance(model, LightningModule):
        return True
    trainer: Any = model.trainer
    return (
        trainer.gradient_clip_algorithm == _VALUE
        or is_overridden("on_before_optimizer_step", model)
        or is_overridden("configure_gradient_clipping", model)
        or any(map(_overrides_hook, trainer.callbacks))
        or bool(optimizer._optimizer_step_pre_hooks or _global_optimizer_pre_hooks)
    )


def _overrides_hook(callback: Any) -> bool:
    try:
        return is_overridden("on_before_optimizer_step", callback)
    except AttributeError:  # a LambdaCallback may hold a callable without code of its own
        return True


# -- other plugins ---------------------------------------------------------------------------------------------------


def allow_clipping() -> None:
    """Let Lightning unscale and clip for our optimizers in plugins that know nothing of ``InStep``: Fabric's, FSDP1's
    and subclasses of users.

    Both ``GradScaler`` and Lightning read ``_step_supports_amp_scaling``. To the one it says that the step *can*
    unscale; the other takes it for *must*, and refuses clipping. Lightning's question is answered for ours as for any
    other optimizer; idempotent.
    """
    for module in (fabric_amp, fabric_fsdp, amp, fsdp):  # three of them have imported the function from the first
        wrap_once(module, "_optimizer_handles_unscaling", _handles_unscaling)


def _handles_unscaling(original: Callable[[Any], bool], optimizer: Any) -> bool:
    return original(optimizer) and not isinstance(getattr(optimizer, "optimizer", optimizer), LowBitOptimizer)
