"""The options that every optimizer takes, and what a param group may hold."""

from __future__ import annotations

import re
import warnings
from typing import Any, TypedDict

import torch

from lowbit_lightning.kernels.arguments import FLOATS
from lowbit_lightning.kernels.formats import DEFAULT_BLOCK_SIZE, check_block_size
from lowbit_lightning.kernels.rules import Rule

OWN = ("bits", "min_size", "block_size", "state_format", "paged", "resident", "page_dir")
"""Group keys that say how *this* optimizer keeps its states: a checkpoint does not overrule them."""


class OtherOptions(TypedDict, total=False):
    """``Options`` without ``bits``."""

    min_size: int
    block_size: int
    maximize: bool
    stochastic_rounding: bool
    seed: int
    master: str | None
    skip_nonfinite: bool
    paged: bool | str
    resident: int | str
    page_dir: str | None
    foreach: bool | None
    fused: bool | None
    capturable: bool
    differentiable: bool


class Options(OtherOptions, total=False):
    """Keyword arguments that every optimizer takes, for all parameters or as keys of a param group.

    ``bits`` (8): 8, or 32 for float32 states. ``min_size`` (4096): parameters with fewer elements, or rows shorter
    than 64, keep 32-bit states; a row is everything after dimension 0. ``block_size`` (256): elements that share a
    scale. ``maximize`` (False). ``stochastic_rounding`` (False): round bfloat16 parameters up or down at random,
    without bias, keyed by ``seed`` (0). ``master`` (None): ``"bf16+8"`` keeps the next eight bits of bfloat16
    parameters in an int8 state, ``master_remainder``: updates work as on a 24-bit master copy, in three bytes per
    element.
    ``skip_nonfinite`` (False): skip a whole step, on the device, if any gradient is not finite.

    ``paged`` (False): keep the states in host memory and stream them through the GPU; ``"disk"``: in a file, for
    parameters in RAM. ``resident`` (0): bytes of paged states that stay near, a number or ``"512MiB"``. ``page_dir``
    (None): the folder of the file. See docs/paging.md.

    ``foreach``, ``fused`` and ``capturable`` are accepted for compatibility with torch and have no effect: every step
    is one fused call with its step counts on the device. ``differentiable`` must be False.
    """

    bits: int


_DEFAULTS: dict[str, Any] = {
    "bits": 8,
    "min_size": 4096,
    "block_size": DEFAULT_BLOCK_SIZE,
    "maximize": False,
    "stochastic_rounding": False,
    "seed": 0,
    "master": None,
    "skip_nonfinite": False,
    "paged": False,
    "resident": 0,
    "page_dir": None,
}
_TORCH_ONLY = ("foreach", "fused", "capturable", "differentiable")


def complete_options(options: Options) -> dict[str, Any]:
    """The options with their defaults, without those that only torch knows. Raises for unsupported options."""
    unknown = set(options) - set(_DEFAULTS) - set(_TORCH_ONLY)
    if unknown:
        raise TypeError(f"unknown options {sorted(unknown)}; known: {sorted(_DEFAULTS)}")
    if options.get("differentiable"):
        raise ValueError("differentiable=True is not supported: the fused step has no gradient; use torch.optim")
    return {**_DEFAULTS, **{k: v for k, v in options.items() if k in _DEFAULTS}}


def check_form(group: dict[str, Any]) -> None:
    if group["bits"] not in (8, 32):
        raise ValueError(f"bits must be 8 or 32, got {group['bits']!r}")
    check_block_size(group["block_size"])
    if group["paged"] is not False:
        check_paging(group)


def check_group(group: dict[str, Any], rule: Rule) -> None:
    check_form(group)
    if not isinstance(group["min_size"], int) or group["min_size"] < 0:
        raise ValueError(f"min_size must be a number of elements, 0 or more, got {group['min_size']!r}")
    if group["master"] not in (None, "bf16+8"):
        raise ValueError(f'master must be None or "bf16+8", got {group["master"]!r}')
    if group["master"] and group["stochastic_rounding"]:
        raise ValueError('master="bf16+8" rounds its 24-bit copy to nearest; leave stochastic_rounding out')
    check_paging(group)
    betas = group.get("betas", ())
    wanted = sum(name.startswith("beta") for name in rule.hyper)
    if len(betas) != wanted:
        raise ValueError(f"betas must be {wanted} numbers, got {betas}")
    values = {**group, **{f"beta{i + 1}": beta for i, beta in enumerate(betas)}}
    for name, bound in rule.bounds.items():
        if values.get(name) is not None and not bound.allows(float(values[name])):
            shown = f"betas[{int(name[4:]) - 1}]" if name.startswith("beta") else name
            raise ValueError(f"{shown} must be {bound.words}, got {values[name]}")


def warn_of_inert(group: dict[str, Any], stacklevel: int) -> None:
    """Warn of options that have no effect on this group."""
    for name in ("stochastic_rounding", "master"):
        if group[name] and not any(p.dtype == torch.bfloat16 for p in group["params"]):
            message = f"{name} has no effect: no parameter of the group is bfloat16"
            warnings.warn(message, stacklevel=stacklevel + 1)
    for name, wanted in (("resident", (True, "disk")), ("page_dir", ("disk",))):
        if group[name] and group["paged"] not in wanted:
            message = f"{name} has no effect with paged={group['paged']!r}"
            warnings.warn(message, stacklevel=stacklevel + 1)


def check_dtypes(group: dict[str, Any]) -> None:
    for i, p in enumerate(group["params"]):
        if not p.requires_grad and not p.is_floating_point():
            continue  # a weight in low bits, which never gets a gradient
        if p.dtype not in FLOATS:
            raise TypeError(f"params[{i}] must be float32, float16 or bfloat16, got {p.dtype}")
        if group["stochastic_rounding"] and p.dtype == torch.float16:
            raise TypeError(f"stochastic_rounding serves bfloat16 parameters; params[{i}] is float16: leave it out")


_UNITS = {"": 1, "B": 1, **{f"{x}B": 1000**i for i, x in enumerate("KMGT", 1)}}
_UNITS |= {f"{x}IB": 1024**i for i, x in enumerate("KMGT", 1)}


def parse_bytes(value: int | str, name: str = "resident") -> int:
    """``"512MiB"``, ``"2 GB"``, ``"80e9"`` or a number, in bytes. ``name``: of the argument, for errors.

    Raises:
        ValueError: for anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:E\d+)?)\s*([KMGT]?I?B|)\s*", str(value).upper())
    if isinstance(value, bool) or not isinstance(value, (int, str)) or match is None or match[2] not in _UNITS:
        raise ValueError(f"{name} must be a number of bytes, or one with a unit such as 512MiB, got {value!r}")
    return int(float(match[1]) * _UNITS[match[2]])


def check_paging(group: dict[str, Any]) -> None:
    if not isinstance(group["paged"], bool) and group["paged"] != "disk":
        raise ValueError(f'paged must be False, True (to host memory) or "disk", got {group["paged"]!r}')
    parse_bytes(group["resident"])
    directory = group["page_dir"]
    if directory is not None and not isinstance(directory, str):
        raise ValueError(f"page_dir must be a folder's path as a str, or None for a temporary one, got {directory!r}")


def inherited_settings(groups: list[dict[str, Any]], new: dict[str, Any]) -> dict[str, Any]:
    """The settings of paging that a new paged group takes over from the paged groups before it."""
    paged = (group for group in groups if new["paged"] and group["paged"] == new["paged"])
    return next(({name: group[name] for name in ("resident", "page_dir")} for group in paged), {})
