"""The optimizer step on CPU: src/optimizer_step.cpp.

It is compiled once for each combination of rule, dtypes, coded states and block size that occurs, so that nothing is
decided inside its loop; the cache makes that a matter of the first run on a machine.
"""

from __future__ import annotations

import ctypes
from array import array
from functools import cache

import torch
from torch import Tensor

from lowbit_lightning.kernels import rules
from lowbit_lightning.kernels.arguments import StepArguments
from lowbit_lightning.kernels.compile import host_library
from lowbit_lightning.kernels.sources import StepVariant


class _Call(ctypes.Structure):
    """``struct Call`` of src/optimizer_step.cpp."""

    _fields_ = [
        ("parameters", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("hyper", ctypes.POINTER(ctypes.c_double)),
        ("lr", ctypes.c_void_p),
        ("unscale", ctypes.c_void_p),
        ("clip", ctypes.c_void_p),
        ("skip", ctypes.c_void_p),
        ("square_sums", ctypes.c_void_p),
        ("seed", ctypes.c_uint64),
        ("maximize", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    ]


@cache
def library(variant: StepVariant) -> ctypes.CDLL:
    """The compiled step of a variant."""
    return host_library(variant.text("optimizer_step.cpp"))


def optimizer_step(arguments: StepArguments, norms: Tensor | None) -> None:
    """See the reference."""
    call, _keep = _call(arguments, norms)
    library(StepVariant.of(arguments)).optimizer_step(ctypes.byref(call))


def optimizer_norms(arguments: StepArguments) -> Tensor:
    """See the reference."""
    shape = len(arguments.params), len(rules.get(arguments.rule).norms)
    out = torch.empty(shape, dtype=torch.float64, device="cpu")
    call, _keep = _call(arguments, None)
    library(StepVariant.of(arguments)).optimizer_norms(ctypes.byref(call), ctypes.c_void_p(out.data_ptr()))
    return out


def _call(arguments: StepArguments, norms: Tensor | None) -> tuple[_Call, tuple]:
    """The argument structure, and what must stay alive while it is used."""
    table = _table(arguments)
    hyper = (ctypes.c_double * len(arguments.hyper))(*arguments.hyper)
    call = _Call(
        *(table.buffer_info()[0], len(arguments.params), hyper),
        *(
            None if t is None else t.data_ptr()
            for t in (arguments.lr, arguments.unscale, arguments.clip, arguments.skip)
        ),
        None if norms is None else norms.data_ptr(),
        *(arguments.seed & (2**64 - 1), arguments.maximize, torch.get_num_threads()),
    )
    return call, (table, hyper, norms)


def _table(arguments: StepArguments) -> array:
    """Rows of ``struct Parameter``, one a parameter. Addresses are looked up in every step, shapes once."""
    columns = [arguments.params, arguments.grads, arguments.steps]
    for lists in (arguments.states, arguments.scales):
        columns += [*lists, *([[]] * (3 - len(lists)))]
    columns += [arguments.remainders]
    if "cpu" not in arguments.cache:
        table = array("q")
        for i in range(len(arguments.params)):
            grid = arguments.grid(i)
            place = (grid.rows, grid.row_length, arguments.ordinals[i], arguments.offsets[i])
            table.extend((*([0] * len(columns)), *place))
        arguments.cache["cpu"] = table
    table = arguments.cache["cpu"]
    for number, tensors in enumerate(columns):
        if tensors:
            table[number :: len(columns) + 4] = array("q", map(Tensor.data_ptr, tensors))
    return table
