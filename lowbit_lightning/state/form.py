"""How one parameter's state is kept. This is decided once, and passed on as a value.

In 32 bits a state is one float32 tensor under its own name: ``exp_avg``. In 8 bits it is two tensors under other names,
so that nobody takes them for 32-bit values: ``exp_avg_codes`` (uint8, the parameter's shape) and ``exp_avg_scales``
(float32, one per block). ``Form`` holds this choice and all other choices that decide which tensors exist.
``StateFormat`` describes the 8-bit states of a checkpoint.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

import torch

from lowbit_lightning.kernels.formats import FOLD, MAPS, BlockGrid, check_block_size, dynamic_map
from lowbit_lightning.kernels.rules import Rule
from lowbit_lightning.state.pages.layout import Want

Shape = tuple[int, ...]

VERSION = 1
SHORTEST_ROW = 64
"""Rows shorter than this would pay more for their scales than their codes save: they stay in 32 bits."""
STEP = "step"
"""The entry that counts a parameter's steps."""
MASTER = "master_remainder"
"""The entry that holds the lower eight bits of a 24-bit master copy."""


def codes_name(name: str) -> str:
    return f"{name}_codes"


def scales_name(name: str) -> str:
    return f"{name}_scales"


def names_of(state: str) -> tuple[str, str, str]:
    """All entries that a state may have."""
    return state, codes_name(state), scales_name(state)


def is_coded(entries: Container[str], state: str) -> bool:
    """Whether a state is in its 8-bit form."""
    return codes_name(state) in entries


def fits_grid(shape: Shape, min_size: int) -> bool:
    """Whether a parameter of this *global* shape is kept in 8 bits: the same answer on every rank and world size."""
    return prod(shape) >= min_size and BlockGrid.of(shape).row_length >= SHORTEST_ROW


class Paging(NamedTuple):
    """Where paged states are kept.

    ``kind``: True for host memory, or "disk". ``resident``: bytes that stay in near memory. ``directory``: the
    directory of the page file; None for a temporary one.
    """

    kind: bool | str
    resident: int
    directory: str | None


class Entry(NamedTuple):
    """One tensor of ``optimizer.state[p]``, or of this rank's part of it.

    ``kind``: "steps", "32-bit", "codes", "scales" or "master remainders". ``value``: the value of all its elements
    before the first step. ``paged``: whether it lies in a slab.
    """

    name: str
    kind: str
    shape: Shape
    dtype: torch.dtype
    value: float
    paged: bool

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Form:
    """How one parameter's state is kept.

    ``bits``: 8 or 32 for each of the rule's states. ``initial``: their value before the first step. ``master``: whether
    the lower bits of a 24-bit master copy are kept. ``paging``: None for states on the parameter's own device.
    ``partition``: whether the parameter is one of DeepSpeed's flat partitions.
    """

    rule: Rule
    bits: tuple[int, ...]
    block_size: int
    initial: float = 0.0
    master: bool = False
    paging: Paging | None = None
    partition: bool = False

    def entries(self, shape: Shape) -> list[Entry]:
        """All that ``optimizer.state[p]`` holds for a parameter, or a part of one, of this shape."""
        paged = self.paging is not None and prod(shape) > 0
        scales_shape = BlockGrid.of(shape, self.block_size).scales_shape
        found = [Entry(STEP, "steps", (), torch.float32, 0.0, False)]
        for state, bits in zip(self.rule.states, self.bits, strict=True):
            if bits == 32:
                found.append(Entry(state.name, "32-bit", shape, torch.float32, self.initial, paged))
                continue
            code = 255 if self.initial else dynamic_map(state.codebook).zero_code  # the code of 1.0
            found.append(Entry(codes_name(state.name), "codes", shape, torch.uint8, code, paged))
            found.append(Entry(scales_name(state.name), "scales", scales_shape, torch.float32, self.initial, False))
        if self.master:
            found.append(Entry(MASTER, "master remainders", shape, torch.int8, 0, paged))
        return found

    @cached_property
    def names(self) -> frozenset[str]:
        """The names of all entries."""
        return frozenset(entry.name for entry in self.entries((1, 1)))

    def nbytes(self, shape: Shape) -> Counter[str]:
        """Bytes by kind of the entries that are not paged. ``shape``: of this rank's part of the parameter."""
        found: Counter[str] = Counter()
        for entry in self.entries(shape):
            if not entry.paged:
                found[entry.kind] += entry.nbytes
        return found

    def want(self, shape: Shape, contiguous: bool = True) -> Want | None:
        """What a slab has to hold for a parameter, or a part of one, of this shape. None if nothing of it is paged.

        ``contiguous``: whether the parameter is contiguous. Other parameters cannot be cut.
        """
        dtypes = tuple((entry.name, entry.dtype) for entry in self.entries(shape) if entry.paged)
        if not dtypes:
            return None
        grid, unit = BlockGrid.of(shape, self.block_size), prod(shape)
        if contiguous and grid.in_runs:
            unit = self.block_size * (FOLD if self.rule.norms else 1)
        elif contiguous and not self.rule.norms:  # the sums of norms continue from row to row
            unit = grid.row_length
        return Want(tuple(shape), dtypes, unit)


@dataclass(frozen=True)
class StateFormat:
    """The description of 8-bit states in a checkpoint: version, block size, and the map of each state (which says
    whether it can be negative)."""

    maps: Mapping[str, str]
    block_size: int
    version: int = VERSION

    @classmethod
    def of(cls, rule: Rule, block_size: int) -> StateFormat:
        return cls({state.name: state.codebook for state in rule.states}, block_size)

    @classmethod
    def parse(cls, saved: Mapping[str, Any]) -> StateFormat:
        """Raise ValueError for a version that this library does not know, or where something is missing."""
        if not isinstance(saved, Mapping):
            raise ValueError(f"state_format must be a dict as state_dict() gives it, got {saved!r}")
        if saved.get("version") != VERSION:
            raise ValueError(
                f"the checkpoint's optimizer state has format version {saved.get('version')!r}; this library reads "
                f"version {VERSION}: update lowbit_lightning, or save again with a version that reads it"
            )
        maps, block_size = saved.get("maps"), saved.get("block_size")
        if not isinstance(maps, Mapping) or not set(maps.values()) <= set(MAPS):
            raise ValueError(f"state_format's maps must give one of {MAPS} by state, got {maps!r}")
        if not isinstance(block_size, int):
            raise ValueError(f"state_format's block_size must be a number of elements, got {block_size!r}")
        check_block_size(block_size)
        return cls(dict(maps), block_size)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
