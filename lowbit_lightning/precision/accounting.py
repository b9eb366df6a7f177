"""What Lightning's ``ModelSummary`` and ``ThroughputMonitor``, and torch's FLOP counter, say about "int8-mixed".

They know Lightning's own precisions by name and by class, and treat all others as float32. They do not count this
package's ops. So:

- ``ModelSummary``: the size in MB is that of the parameters in their own dtypes, also with ``LowBitWeights``.
- ``ThroughputMonitor`` (the Trainer's and Fabric's): utilisation is relative to the int8 peak that Lightning's table
  has for the GPU. If it has none, and on the CPU, there is no utilisation. Ops that do not run in int8 (such as
  attention) are measured by that peak too, because it is the limit of the hardware.
- ``measure_flops``, the FLOPs of a summary: an int8 product counts like the matmul it replaces, 2 M N K.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils import flop_counter

from lowbit_lightning.precision.int8 import Int8Mixed
from lowbit_lightning.precision.low_bit_weights import ATTRIBUTE
from lowbit_lightning.precision.wrapping import wrap_once


def patch_accounting() -> None:
    """Teach all three about our plugins and ops. Idempotent."""
    from lightning.fabric.utilities import throughput
    from lightning.pytorch.callbacks import throughput_monitor
    from lightning.pytorch.utilities.model_summary.model_summary import ModelSummary

    for module in (throughput, throughput_monitor):
        wrap_once(module, "_plugin_to_compute_dtype", _compute_dtype)
    wrap_once(ModelSummary, "__init__", _summarise)
    ops = torch.ops.lowbit_lightning
    for op, formula in (
        (ops.int8_linear, _forward),
        (ops.int8_linear_backward, _backward),
        (ops.int8_grouped_linear, _grouped),
        (ops.int8_grouped_linear_backward, _grouped_backward),
        (ops.int8_convolution, _convolution),
        (ops.int8_convolution_backward, _convolution_backward),
    ):
        if op not in flop_counter.flop_registry:
            flop_counter.register_flop_formula(op)(formula)


def _compute_dtype(original: Callable[[Any], torch.dtype], plugin: Any) -> torch.dtype:
    return torch.int8 if isinstance(plugin, Int8Mixed) else original(plugin)


def _summarise(original: Callable[..., None], summary: Any, model: Any, *args: Any, **kwargs: Any) -> None:
    trainer = getattr(model, "_trainer", None)
    plugin = None if trainer is None else trainer.precision_plugin
    if not isinstance(plugin, Int8Mixed) and not hasattr(plugin, ATTRIBUTE):
        original(summary, model, *args, **kwargs)
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Precision \S+ is not supported by the model summary")
        original(summary, model, *args, **kwargs)
    summary._precision_megabytes = _bytes_per_parameter(model) * 1e-6


def _bytes_per_parameter(module: nn.Module) -> float:
    parameters = [p for p in module.parameters() if not is_lazy(p)]
    count = sum(p.numel() for p in parameters)
    return sum(p.numel() * p.element_size() for p in parameters) / max(1, count)


# -- operations, as torch counts them: from the shapes of an op's arguments ------------------------------------------

Shape = torch.Size


def _forward(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * x[0] * x[1] * weight[0]


def _backward(dy: Shape, weight: Shape | None, x: Shape | None, xq: Shape | None, *_: Any, **__: Any) -> int:
    products = dy[0] * dy[1] * (weight[1] if weight is not None else 0)
    if x is not None or xq is not None:
        products += dy[0] * dy[1] * (x[1] if x is not None else xq[0])  # type: ignore[index]
    return 2 * products


def _grouped(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * x[0] * weight[1] * weight[2]


def _grouped_backward(dy: Shape, weight: Shape | None, x: Shape | None, xq: Shape | None, *_: Any, **__: Any) -> int:
    inputs = x if x is not None else xq
    products = (weight[1] * weight[2] if weight is not None else 0) + (dy[1] * inputs[1] if inputs is not None else 0)
    return 2 * dy[0] * products


def _convolution(x: Shape, weight: Shape, *_: Any, out_shape: Any, **__: Any) -> int:
    return 2 * out_shape[0].numel() * weight[1:].numel()


def _convolution_backward(
    dy: Shape, weight: Shape | None, x: Shape | None, xq: Shape | None, *rest: Any, **_: Any
) -> int:
    products = (weight is not None) + (x is not None or xq is not None)
    return 2 * products * dy.numel() * prod(rest[2][1:])
