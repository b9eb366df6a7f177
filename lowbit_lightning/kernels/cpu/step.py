"""The optimizer step on CPU: src/optimizer_step.cpp.

It is compiled for each combination of rule, dtypes, coded states and block size that occurs, so its loop takes no
decisions. The cache keeps the results, so a machine compiles each combination once.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from functools import cache
from math import prod

import torch
from torch import Tensor

from lowbit_lightning.kernels import rules
from lowbit_lightning.kernels.arguments import StepArguments, StepScalars
from lowbit_lightning.kernels.compile import host_library
from lowbit_lightning.kernels.sources import StepVariant
from lowbit_lightning.kernels.structs import StepSettings, hyper_values, parameter_rows, settings_values


class _Call(StepSettings):
    """``struct Call`` of src/optimizer_step.cpp."""

    _fields_ = [  # noqa: RUF012
        ("parameters", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("hyper", ctypes.POINTER(ctypes.c_double)),
        ("square_sums", ctypes.c_void_p),
        ("taps", ctypes.c_void_p),
        ("threads", ctypes.c_int32),
    ]


@cache
def library(variant: StepVariant) -> ctypes.CDLL:
    return host_library(variant.text("optimizer_step.cpp"))


def optimizer_step(
    arguments: StepArguments, grads: Sequence[Tensor], scalars: StepScalars, norms: Tensor | None
) -> None:
    _run("optimizer_step", arguments, grads, scalars, None if norms is None else norms.data_ptr())


def optimizer_norms(arguments: StepArguments, grads: Sequence[Tensor], scalars: StepScalars) -> Tensor:
    out = torch.empty(len(arguments.params), len(rules.get(arguments.rule).norms), dtype=torch.float64, device="cpu")
    if out.numel():
        _run("optimizer_norms", arguments, grads, scalars, None, out.data_ptr())
    return out


def _run(
    function: str,
    arguments: StepArguments,
    grads: Sequence[Tensor],
    scalars: StepScalars,
    square_sums: int | None,
    *more: int,
) -> None:
    rows, hyper, threads = parameter_rows(arguments, grads), hyper_values(scalars), torch.get_num_threads()
    (address, _), taps = rows.buffer_info(), _taps(arguments.params)
    shared = hyper, square_sums, None if taps is None else taps.buffer_info()[0], threads
    call = _Call(*settings_values(scalars), address, len(arguments.params), *shared)
    getattr(library(StepVariant.of(arguments, grads[0].dtype)), function)(
        ctypes.byref(call), *map(ctypes.c_void_p, more)
    )


def _taps(params: Sequence[Tensor]) -> array | None:
    """``Call.taps``."""
    if all(map(Tensor.is_contiguous, params)):
        return None
    return array("q", [1 if p.is_contiguous() else prod(p.shape[2:]) for p in params])
