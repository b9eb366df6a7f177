"""The file format of bitsandbytes' low-bit weights (version 0.50), read and written without bitsandbytes.

A 4-bit weight has these entries (``NAME`` ends in ``weight``). ``NAME``: the codes, two in a byte, the first in the
higher half. Blocks run over the whole tensor, and may cross rows. The codes may be stored as another dtype with the
same bytes (``quant_storage``). ``NAME.absmax``: float32 scales, or uint8 if the scales are quantised themselves; then
there are also ``NAME.nested_absmax`` and ``NAME.nested_quant_map``. ``NAME.quant_map``: the 16 values.
``NAME.quant_state.bitsandbytes__nf4`` (or ``fp4``): JSON as bytes. An 8-bit weight has ``NAME``, int8 ``[N, K]``, and
``SCB`` beside it, float32 ``[N]``: the largest magnitude of each row.

If rows are multiples of a block, blocks lie inside rows, and the codes are taken over unchanged. Otherwise the weight
is decoded and quantised again, with a warning.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_lightning import kernels
from lowbit_lightning.kernels.formats import Format, weight_format
from lowbit_lightning.kernels.reference.lowbit import decode_scales
from lowbit_lightning.layers.lowbit import LowBitLinear, Weights

Read = Callable[[], Tensor]

STATE = "quant_state.bitsandbytes__"
KINDS = ("nf4", "fp4")
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
NESTED_BLOCK = 256


def is_weight(name: str, found: Mapping[str, Any]) -> bool:
    """Whether ``name`` is a weight of bitsandbytes. The entries beside it tell."""
    prefix = name.removesuffix("weight")
    return f"{prefix}SCB" in found or any(f"{name}.{STATE}{kind}" in found for kind in KINDS)


def weights_of(found: Iterable[str]) -> list[str]:
    names = set(found)
    return [name for name in names if name.endswith("weight") and is_weight(name, dict.fromkeys(names))]


def parts_of(name: str, found: Iterable[str]) -> list[str]:
    """All entries that belong to a weight, without the weight itself."""
    prefix = name.removesuffix("weight")
    return [key for key in found if key.startswith(f"{name}.") or key in (f"{prefix}SCB", f"{prefix}weight_format")]


def read(
    name: str, found: Mapping[str, Read], shape: torch.Size, weights: Weights, device: torch.device
) -> tuple[Tensor, Tensor, Weights]:
    """Codes (uint8), scales (float32) and settings of a weight ``[N, K]``, in the format of the file.

    Raises:
        ValueError: for a part that is missing or damaged, or another shape.
    """
    prefix = name.removesuffix("weight")
    if f"{prefix}SCB" in found:
        codes, rows = found[name](), found[f"{prefix}SCB"]()
        if codes.dtype != torch.int8 or codes.shape != shape or rows.shape != shape[:1]:
            raise ValueError(
                f"{name} must be int8 of shape {tuple(shape)} with an SCB for each row, got {codes.dtype} "
                f"{tuple(codes.shape)} and {tuple(rows.shape)}; only bitsandbytes' row layout can be read"
            )
        scales = (rows.float() / 127).unsqueeze(1)
        form = weight_format("int8")
        kept = weights if weights.format == form else weights.changed("int8")
        return codes.view(torch.uint8).clone().to(device), scales.to(device), kept
    return _read_4bit(name, found, shape, weights, device)


def _read_4bit(
    name: str, found: Mapping[str, Read], shape: torch.Size, weights: Weights, device: torch.device
) -> tuple[Tensor, Tensor, Weights]:
    kind = next(kind for kind in KINDS if f"{name}.{STATE}{kind}" in found)
    state = _state(name, found[f"{name}.{STATE}{kind}"]())
    missing = [part for part in PARTS[:2] if f"{name}.{part}" not in found]
    if missing:
        raise ValueError(f"{name} of bitsandbytes lacks {missing}: the file was saved without its scales")
    block, numel = state["blocksize"], math.prod(shape)
    if tuple(state["shape"]) != tuple(shape):
        raise ValueError(f"{name} must be of shape {tuple(shape)}, bitsandbytes saved {tuple(state['shape'])}")
    absmax = _absmax(name, found, state)
    packed = found[name]().contiguous().view(torch.uint8).reshape(-1)
    if packed.numel() != -(-numel // 2) or absmax.numel() != -(-numel // block):
        raise ValueError(
            f"{name} must have {-(-numel // 2)} bytes of codes and {-(-numel // block)} scales, got {packed.numel()} "
            f"and {absmax.numel()}: damaged, or repacked for a CPU by bitsandbytes, which can't be read"
        )
    form = weight_format(kind, block_size=block)
    if shape[-1] % block == 0:
        rows = packed.reshape(*shape[:-1], -1).clone().to(device)
        return rows, absmax.reshape(*shape[:-1], -1).to(device), _same(weights, form)
    warnings.warn(
        f"{name}: rows of {shape[-1]} are not multiples of bitsandbytes' block of {block}; its weight is decoded and "
        f"quantised again to {weights.format}, which adds a second rounding",
        stacklevel=4,
    )
    decoded = kernels.lowbit_dequantize(packed[None], absmax[None], form, numel + numel % 2)[0, :numel]
    return *kernels.lowbit_quantize(decoded.reshape(shape).to(device), weights.format, weights.fit), weights


def _same(weights: Weights, form: Format) -> Weights:
    return weights if weights.format == form else weights.changed({"weights": form})


def _state(name: str, raw: Tensor) -> dict[str, Any]:
    try:
        state = json.loads(bytes(raw.tolist()).decode())
        state["blocksize"] = int(state["blocksize"])
        state["shape"] = [int(n) for n in state["shape"]]
        return state
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{name}: its quant_state is damaged: {error!r}") from None


def _absmax(name: str, found: Mapping[str, Read], state: Mapping[str, Any]) -> Tensor:
    """The scales as a float32 vector. Quantised scales are decoded."""
    absmax = found[f"{name}.absmax"]().reshape(-1)
    if absmax.dtype != torch.uint8:
        return absmax.float()
    parts = [f"{name}.{part}" for part in PARTS[2:]]
    if missing := [part for part in parts if part not in found]:
        raise ValueError(f"{name} of bitsandbytes has quantised scales but lacks {missing}")
    nested, values = (found[part]().float() for part in parts)
    block = int(state.get("nested_blocksize", NESTED_BLOCK))
    if nested.numel() * block < absmax.numel():
        raise ValueError(f"{name} has {absmax.numel()} quantised scales but only {nested.numel()} nested ones")
    return decoded_scales(absmax, values, nested, block) + float(state["nested_offset"])


def decoded_scales(codes: Tensor, values: Tensor, absmax: Tensor, block_size: int) -> Tensor:
    """float32 ``values[code] * absmax`` of 8-bit codes ``[n]`` in blocks; where scales are quantised themselves."""
    return values[codes.int()] * absmax.repeat_interleave(block_size)[: codes.numel()]


def to_bitsandbytes(module: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The module's state_dict in the format that bitsandbytes' layers, and readers of its files in Transformers, take.

    4-bit weights are written with float32 scales, int8 weights with one scale for each row. All other entries are
    written unchanged.

    Args:
        dtype: the dtype to which readers decode 4-bit weights; None: the dtype that each weight had.

    Raises:
        ValueError: for a format that bitsandbytes lacks (int4, int3, int2), and where blocks do not divide a row.
    """
    state = dict(module.state_dict())
    for name, layer in module.named_modules():
        if not isinstance(layer, LowBitLinear):
            continue
        prefix = f"{name}." if name else ""
        form, (rows, length) = layer.format, layer.weight_shape
        if form.kind not in (*KINDS, "int8") or (form.bits == 4 and length % form.block_size):
            raise ValueError(
                f"{prefix}weight is {form} of rows of {length}: bitsandbytes knows int8, nf4 and fp4, with blocks that "
                "divide a row; dequantize() the layer, or quantize it so"
            )
        for part in ("weight", "weight_scales", "weight_format"):
            state.pop(f"{prefix}{part}")
        scales = decode_scales(layer.scales, form)[0]
        if form.kind == "int8":
            state[f"{prefix}weight"] = layer.weight.detach().view(torch.int8)
            state[f"{prefix}SCB"] = scales.flatten() * 127
            state[f"{prefix}weight_format"] = torch.zeros((), dtype=torch.uint8)
            continue
        about = {
            "quant_type": form.kind,
            "blocksize": form.block_size,
            "dtype": str(dtype or layer.dtype).removeprefix("torch."),
            "shape": [rows, length],
        }
        key = f"{prefix}weight"
        state[key] = layer.weight.detach().reshape(-1, 1)
        state[f"{key}.absmax"] = scales.flatten()
        state[f"{key}.quant_map"] = form.table()
        state[f"{key}.{STATE}{form.kind}"] = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)
    return state
