"""``QuantState``: what beside the codes a quantised tensor needs, under bitsandbytes' names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowbit_lightning.convert.bitsandbytes import KINDS, NESTED_BLOCK, STATE
from lowbit_lightning.kernels.formats import Format, weight_format

_KNOWN = {
    *("quant_type", "absmax", "blocksize", "quant_map", "dtype", "shape"),
    *("nested_absmax", "nested_blocksize", "nested_quant_map", "nested_dtype", "nested_offset"),
}
_REQUIRED = {"absmax", "quant_map", "blocksize", "dtype", "quant_type"}


@dataclass(eq=False)
class QuantState:
    """The scales of a tensor that was quantised in flat blocks: blocks of its elements in order, across rows.

    ``absmax``: float32 ``[blocks]``, or uint8 if the scales are quantised themselves; then ``state2`` has theirs, and
    ``offset``, a 0-d tensor, is added. ``code``: the table of values. ``shape`` and ``dtype``: of the tensor. Scales of
    8-bit codes have the sign of their block's largest element, so that quantising again changes nothing; reading is
    the same product.
    """

    absmax: Tensor
    shape: Any = None
    code: Any = None
    blocksize: Any = None
    quant_type: str | None = None
    dtype: Any = None
    offset: Any = None
    state2: QuantState | None = None
    format: Format = field(init=False, repr=False)
    """Of 4-bit codes."""

    def __post_init__(self) -> None:
        if self.quant_type is not None:
            self.format = form_of(self.quant_type, self.blocksize)

    @property
    def nested(self) -> bool:
        return self.state2 is not None

    def __getattr__(self, name: str) -> Any:
        """``bitsandbytes__nf4``: FSDP1 looks names of a state_dict up as attributes."""
        if name.removeprefix("bitsandbytes__") in KINDS:
            packed = self.as_dict(packed=True)
            if f"quant_state.{name}" in packed:
                return packed[f"quant_state.{name}"]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __getitem__(self, index: Any) -> Any:
        """As a list, the form of old versions: absmax, shape, dtype, blocksize, nested, quant_type."""
        nested = [self.offset, self.state2] if self.nested else None
        return [self.absmax, self.shape, self.dtype, self.blocksize, nested, self.quant_type][index]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QuantState):
            return False
        mine, theirs = self.as_dict(), other.as_dict()
        return mine.keys() == theirs.keys() and all(_equal(mine[key], theirs[key]) for key in mine)

    __hash__ = None  # type: ignore[assignment]

    def to(self, device: Any) -> None:
        """Move the tensors, in place."""
        self.absmax, self.code = self.absmax.to(device), self.code.to(device)
        if self.state2 is not None:
            self.offset = self.offset.to(device)
            self.state2.to(device)

    def as_dict(self, packed: bool = False) -> dict[str, Any]:
        """Its parts by the names of a state_dict. ``packed``: only tensors, as files have them: what is no tensor
        becomes the bytes of ``quant_state.bitsandbytes__nf4`` (or ``fp4``)."""
        found: dict[str, Any] = {
            "quant_type": self.quant_type,
            "absmax": self.absmax,
            "blocksize": self.blocksize,
            "quant_map": self.code,
            "dtype": _name(self.dtype),
            "shape": None if self.shape is None else tuple(self.shape),
        }
        if self.state2 is not None:
            inner = self.state2
            found |= {
                "nested_absmax": inner.absmax,
                "nested_blocksize": inner.blocksize,
                "nested_quant_map": inner.code.clone(),  # safetensors refuses tensors that share memory
                "nested_dtype": _name(inner.dtype),
                "nested_offset": float(self.offset),
            }
        if not packed or self.quant_type is None:
            return found
        tensors = {key: value for key, value in found.items() if isinstance(value, Tensor)}
        rest = {key: value for key, value in found.items() if key not in tensors}
        data = torch.tensor(list(json.dumps(rest).encode()), dtype=torch.uint8)
        return {**tensors, f"quant_state.bitsandbytes__{self.quant_type}": data}

    @classmethod
    def from_dict(cls, qs_dict: Mapping[str, Any], device: Any) -> QuantState:
        """The inverse of ``as_dict``, packed or not; keys may have a prefix (``layer.weight.absmax``).

        Raises:
            ValueError: for entries that are missing, unknown or damaged.
        """
        found = {key.rsplit(".", 1)[-1]: value for key, value in qs_dict.items()}
        for kind in KINDS:
            data = found.pop(f"{STATE.split('.')[-1]}{kind}", None)
            if data is not None:
                found |= _unpacked(data, kind)
        missing, unknown = sorted(_REQUIRED - found.keys()), sorted(found.keys() - _KNOWN)
        if missing or unknown:
            raise ValueError(
                f"a quant_state must have {sorted(_REQUIRED)}: {missing} are missing, {unknown} are unknown"
            )
        offset = state2 = None
        if "nested_absmax" in found:
            offset = torch.tensor(float(found["nested_offset"]), dtype=torch.float32, device=device)
            state2 = cls(
                found["nested_absmax"].to(device),
                code=found["nested_quant_map"].to(device),
                blocksize=found.get("nested_blocksize", NESTED_BLOCK),
                dtype=getattr(torch, found["nested_dtype"]),
            )
        shape = found.get("shape")
        return cls(
            found["absmax"].to(device),
            shape=None if shape is None else torch.Size(shape),
            code=found["quant_map"].to(device),
            blocksize=found["blocksize"],
            quant_type=found["quant_type"],
            dtype=getattr(torch, found["dtype"]),
            offset=offset,
            state2=state2,
        )


def form_of(quant_type: str, blocksize: int | None) -> Format:
    """The format of 4-bit codes.

    Raises:
        ValueError: for another type or block size.
    """
    if quant_type not in KINDS:
        raise ValueError(f"quant_type must be 'nf4' or 'fp4', got {quant_type!r}")
    return weight_format(quant_type, block_size=64 if blocksize is None else blocksize)


def _unpacked(data: Tensor, kind: str) -> dict[str, Any]:
    try:
        found = json.loads(bytes(data.tolist()).decode())
        return {**found, "shape": torch.Size(found["shape"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the quant_state of {kind} is damaged: {error!r}") from None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.allclose(a.float(), b.float(), atol=1e-6)
    return a == b
