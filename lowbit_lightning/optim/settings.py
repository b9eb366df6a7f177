"""A param group as a step sees it: the forms and scalars that follow from its keys.

A parameter may decide about its own states: ``parameter.state_bits = 32`` (or 8) overrules the ``bits`` of its group.
``layers.StableEmbedding`` sets it on its table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowbit_lightning.kernels import StepScalars
from lowbit_lightning.kernels.rules import Rule
from lowbit_lightning.optim import partitions
from lowbit_lightning.optim.factors import Factors
from lowbit_lightning.optim.options import parse_bytes
from lowbit_lightning.state import shards
from lowbit_lightning.state.form import Form, Paging, StateFormat, fits_grid
from lowbit_lightning.state.store import Store

_form = itemgetter("bits", "min_size", "block_size", "master", "stochastic_rounding", "paged", "resident", "page_dir")
"""Gets the values of those keys of a group that decide its launches."""
_BETAS = "beta1", "beta2", "beta3"


def state_bits(p: Tensor) -> int | None:
    """The bits that a parameter wants its states kept in; None: those of its group.

    Raises:
        ValueError: for other values than 8, 32 and None.
    """
    bits = getattr(p, "state_bits", None)
    if bits not in (None, 8, 32):
        raise ValueError(f"state_bits of a parameter of shape {tuple(p.shape)} must be 8, 32 or None, got {bits!r}")
    return bits


def nothing_derived(group: dict[str, Any], bits: int) -> dict[str, float]:
    """All hyperparameters of the rule are keys of the group."""
    return {}


class Settings(NamedTuple):
    """A group, and what its optimizer derives from it.

    ``derived``: gives hyperparameters of the rule that are not keys of the group, by the bits of the parameters'
    states.
    """

    group: dict[str, Any]
    rule: Rule
    derived: Callable[[dict[str, Any], int], dict[str, float]]

    @property
    def key(self) -> tuple:
        """Two settings with equal keys have the same plan."""
        return self.rule.name, *_form(self.group)

    @property
    def format(self) -> StateFormat:
        """The format that the group asks for its 8-bit states."""
        return StateFormat.of(self.rule, self.group["block_size"])

    def form(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        keeps_grid: bool = True,
        partition: bool = False,
        own_bits: int | None = None,
    ) -> Form:
        """How the states of a parameter are kept.

        ``shape``: the shape of the whole parameter, not of a rank's part. ``keeps_grid``: whether the parameter is cut
        only between blocks, or not at all; see ``shards.keeps_grid``. ``partition``: whether it is a flat partition of
        DeepSpeed's. ``own_bits``: the parameter's ``state_bits``.
        """
        group = self.group
        low = (own_bits or group["bits"]) == 8 and keeps_grid and fits_grid(shape, group["min_size"])
        paging = Paging(group["paged"], parse_bytes(group["resident"]), group["page_dir"]) if group["paged"] else None
        return Form(
            self.rule,
            tuple(8 if low and not state.slow else 32 for state in self.rule.states),
            group["block_size"],
            initial=group.get("initial_accumulator_value", 0.0),
            master=group["master"] is not None and dtype == torch.bfloat16,
            paging=paging,
            partition=partition,
        )

    def forms(self, params: Iterable[Tensor]) -> Iterator[tuple[Tensor, Form]]:
        """Parameters of the group with their forms."""
        made: dict[tuple, Form] = {}
        for p in params:
            key = p.shape, p.dtype, shards.keeps_grid(p), partitions.is_partition(p), state_bits(p)
            if key not in made:
                made[key] = self.form(*key[:2], keeps_grid=key[2], partition=key[3], own_bits=key[4])
            yield p, made[key]

    def keep_format(self, store: Store) -> None:
        """Requantise all states of the group if its ``block_size`` was changed.

        Raises:
            ValueError: for scales that fit no block size; nothing has been changed then.
        """
        changed = self.group["state_format"]["block_size"] != self.group["block_size"]
        # DeepSpeed may show only some of its partitions at a time. The scales tell the block size of each.
        if changed or partitions.are_partitions(self.group["params"]):
            store.requantise(self.forms(self.group["params"]))
        self.group["state_format"] = self.format.to_dict()

    def scalars(self, device: torch.device, bits: int, asked: Factors) -> StepScalars:
        """The scalars of a step for parameters on ``device`` whose states have ``bits`` bits."""
        values = {**self.group, **self.derived(self.group, bits)}
        values |= zip(_BETAS, values.get("betas", ()), strict=False)
        lr = values["lr"]
        on_device = isinstance(lr, Tensor) and lr.device == device
        if on_device:
            values["lr"] = 0.0
        unscale, clip, skip = [factor if factor is None else factor.to(device) for factor in asked]
        hyper, lr = [float(values[name]) for name in self.rule.hyper], lr.detach().float() if on_device else None
        return StepScalars(hyper, lr, unscale, clip, skip, self.group["seed"], self.group["maximize"])
