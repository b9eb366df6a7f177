"""Parameters that FSDP2 gathers as int8: ``ShardedStrategy(all_gather="int8")``.

How it works
    Before a gather each rank quantises its rows, one float32 scale ``absmax / 127`` per row, and sends codes and scales
    as one byte tensor. Then every rank dequantises them. A row of n elements takes n + 4 bytes; in float32 it takes 4
    n. Sharded parameters, gradients and optimizer states do not change: only the weights that
    forward and backward compute with are rounded, each element by at most half its row's scale.

Interactions
    With ``precision="int8-mixed"`` a layer quantises its weight by rows for the forward. This gives the same numbers
    that were gathered, so the forward product does not change at all.

Limitations
    Vectors and rows shorter than 16 elements are gathered unquantised.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from lowbit_lightning import kernels
from lowbit_lightning.sharding import int8_share, travels_in_int8
from lowbit_lightning.state import shards
from lowbit_lightning.strategies.blocks import needs_torch


@dataclass(frozen=True)
class Int8Rows:
    """FSDP2's two extension points for a parameter of ``rows`` by ``length`` (all other dimensions together)."""

    rows: int
    length: int

    def pack(self, part: Tensor, ranks: int) -> Tensor:
        """This rank's rows as uint8, of equal length on every rank: codes, then scales, both padded."""
        scales_at, size = self._share(ranks)
        packed = torch.zeros(size, dtype=torch.uint8, device=part.device)
        if part.numel():
            codes, scales = kernels.quantize_rowwise(part.detach().reshape(-1, self.length))
            packed[: codes.numel()] = codes.view(torch.uint8).flatten()
            packed[scales_at:][: 4 * len(scales)] = scales.view(torch.uint8)
        return packed

    def unpack(self, packed: Tensor, ranks: int, out: Tensor) -> None:
        """Dequantise what ``ranks`` ranks packed, into ``out [ranks * share, length]``."""
        share, (scales_at, _) = -(-self.rows // ranks), self._share(ranks)
        pieces = packed.view(ranks, -1)
        codes = pieces[:, : share * self.length].view(torch.int8).unflatten(1, (share, self.length))
        scales = pieces[:, scales_at:].contiguous().view(torch.float32)
        torch.mul(codes, scales.unsqueeze(-1), out=out.view(ranks, share, self.length))

    def _share(self, ranks: int) -> tuple[int, int]:
        return int8_share(-(-self.rows // ranks), self.length)


@dataclass(frozen=True)
class _Extension:
    """What FSDP2 looks for on a parameter's local tensor; it asks by the number of arguments what it may pass."""

    form: Int8Rows
    tensor: weakref.ref[Tensor]

    def pre_all_gather(self, mesh: DeviceMesh) -> tuple[tuple[Tensor, ...], int]:
        part = self.tensor()
        assert part is not None  # it is asking
        return (self.form.pack(part, mesh.size()),), mesh.size()

    def post_all_gather(
        self, outputs: tuple[Tensor, ...], ranks: int, dtype: torch.dtype, *, out: Tensor | None = None
    ) -> Any:
        rows = ranks * -(-self.form.rows // ranks)
        if out is None:
            full = torch.empty(rows, self.form.length, dtype=dtype, device=outputs[0].device)
            self.form.unpack(outputs[0], ranks, full)
            return full, (full,)
        # Gathered again into the same memory, which may hold more rows than the parameter. Autograd has saved the
        # parameter in the forward: its version has to stay.
        with torch.autograd._unsafe_preserve_version_counter(out):
            local = shards.local(out).detach()
            self.form.unpack(outputs[0], ranks, local.as_strided((rows, self.form.length), (self.form.length, 1)))
        return None


def gather_in_int8(module: nn.Module) -> None:
    """Gather a sharded module's matrices as int8, from its next forward on.

    Raises:
        RuntimeError: with torch 2.7.
    """
    needs_torch("2.8", 'all_gather="int8"', "FSDP2 forgets before how parts of unequal length are gathered")

    def attach(*_: Any) -> None:
        for p in module.parameters():
            if isinstance(p, DTensor) and _travels(p):
                part = p._local_tensor
                if not hasattr(part, "fsdp_pre_all_gather"):
                    extension = _Extension(Int8Rows(p.shape[0], prod(p.shape[1:])), weakref.ref(part))
                    part.fsdp_pre_all_gather = extension.pre_all_gather  # type: ignore[attr-defined]
                    part.fsdp_post_all_gather = extension.post_all_gather  # type: ignore[attr-defined]

    attach()
    module.register_forward_pre_hook(attach, prepend=True)  # .to() and load_state_dict make new local tensors


def _travels(p: DTensor) -> bool:
    return travels_in_int8(tuple(p.shape)) and p.is_floating_point() and shards.keeps_grid(p)
