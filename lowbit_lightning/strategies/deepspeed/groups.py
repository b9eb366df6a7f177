"""Which parameters keep 32-bit states under ZeRO, and how this is hidden from schedulers.

ZeRO concatenates all parameters of a group into one flat vector and cuts it. This vector has no rows, and a block of
256 elements may hold the end of a matrix and the biases after it, under one scale. So embeddings, and parameters that
have 32-bit states everywhere else (vectors, small parameters, short rows), get a separate group with ``bits=32``.

A scheduler counted the groups when it was built. It continues to see only those groups; the new groups follow them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lowbit_lightning.optim import LowBitOptimizer
from lowbit_lightning.state.form import fits_grid

OWN = ("params", "param_names", "bits", "state_format")
"""What a new group doesn't take from the one that it was split off."""


class SplitGroups:
    """The groups of an optimizer, split in place; ``follow`` before each step.

    Groups are known by their numbers: ``load_state_dict`` makes new ones. ``names`` are those of their parameters,
    ``split`` says whether there are more than before.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module) -> None:
        self._optimizer, self._given = optimizer, len(optimizer.param_groups)
        self._pairs: list[tuple[int, int]] = []
        self._split(optimizer, model)
        names = {p: name for name, p in model.named_parameters()}
        self.names = [[names[p] for p in group["params"] if p in names] for group in optimizer.param_groups]
        self.split = bool(self._pairs)

    def _split(self, optimizer: Optimizer, model: nn.Module) -> None:
        if not isinstance(optimizer, LowBitOptimizer):
            return
        embeddings = {m.weight for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
        for number, group in enumerate(list(optimizer.param_groups)):
            if group["bits"] != 8:
                continue
            low: list[int] = []
            high: list[int] = []
            for i, p in enumerate(group["params"]):
                if p.requires_grad:  # ZeRO fails on a group without any
                    (low if p not in embeddings and _fits(p, group["min_size"]) else high).append(i)
            if not low:
                group["bits"] = 32
            elif high:
                new = {**group, **_picked(group, high), "bits": 32}
                group.update(_picked(group, low))
                optimizer.add_param_group(new)
                self._pairs.append((number, len(optimizer.param_groups) - 1))

    def follow(self) -> None:
        """Give the new groups the current hyperparameters of the groups that they were split from."""
        groups = self._optimizer.param_groups
        for number, new in self._pairs:
            groups[new].update({key: value for key, value in groups[number].items() if key not in OWN})

    def extend(self, settings: dict[str, Any]) -> None:
        """Lists with a value for each group, such as a scheduler's, get what the new groups' own groups have."""
        for key, values in settings.items():
            if isinstance(values, list) and len(values) == self._given:
                settings[key] = values + [values[number] for number, _ in self._pairs]

    def hide_from(self, scheduler: Any) -> None:
        """Let a scheduler, and schedulers that it holds (in lists too), see only the groups that it was built for."""
        if not self._pairs:
            return
        if getattr(scheduler, "optimizer", None) is self._optimizer:
            scheduler.optimizer = _View(self._optimizer, self._given)
        for value in list(vars(scheduler).values()):
            for inner in value if isinstance(value, (list, tuple)) else (value,):
                if getattr(inner, "optimizer", None) is self._optimizer and not isinstance(inner, nn.Module):
                    self.hide_from(inner)


def _picked(group: dict[str, Any], indices: list[int]) -> dict[str, Any]:
    return {key: [group[key][i] for i in indices] for key in ("params", "param_names") if key in group}


def _fits(p: Tensor, min_size: int) -> bool:
    shape = getattr(p, "ds_shape", p.shape)  # what stage 3 has cut already
    return len(shape) > 1 and fits_grid(shape, min_size)


class _View:
    """An optimizer of which the first ``count`` groups are seen."""

    def __init__(self, optimizer: Optimizer, count: int) -> None:
        self._optimizer, self._count = optimizer, count

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups[: self._count]

    def __eq__(self, other: object) -> bool:  # callbacks look schedulers' optimizers up among the Trainer's
        return other is self or other is self._optimizer

    def __hash__(self) -> int:
        return hash(self._optimizer)

    def __getattr__(self, name: str) -> Any:
        if name == "_optimizer":  # while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self._optimizer, name)

    @property  # type: ignore[misc]  # callbacks name learning rates after it
    def __class__(self) -> Any:
        return type(self._optimizer)
