"""Which training loaders ``DeterministicResume`` can resume, and what decides the order of their data."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset


def is_stateful(loader: Any) -> bool:
    """Whether Lightning saves and loads its position itself."""
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


def check(loader: Any) -> None:
    """Raise TypeError or ValueError for a loader that can't be resumed, and say what to change."""
    remedy = "give the loader state_dict and load_state_dict (Lightning then saves it), or leave the callback out"
    name = f"DeterministicResume can't resume {type(loader).__name__}"
    if not isinstance(loader, DataLoader):
        raise TypeError(f"{name}: it is not a torch.utils.data.DataLoader; {remedy}")
    if isinstance(loader.dataset, IterableDataset):
        raise TypeError(f"{name}: {type(loader.dataset).__name__} is an IterableDataset, which has no index; {remedy}")
    try:
        len(loader)
    except TypeError as error:
        raise TypeError(f"{name}: its length is unknown ({error}); give its sampler a __len__") from error
    if loader.num_workers > 0 and loader.persistent_workers:
        raise ValueError(f"{name}: workers keep random states over epochs; set persistent_workers=False")
    if not getattr(loader, "in_order", True):
        raise ValueError(f"{name}: its batches come in any order; set in_order=True")
    for sampler in samplers(loader):
        for attribute, value in vars(sampler).items():
            if isinstance(value, (np.random.Generator, np.random.RandomState, random.Random)):
                raise TypeError(
                    f"{name}: {type(sampler).__name__}.{attribute} is a {type(value).__name__}; let the sampler draw "
                    f"from a torch.Generator in its attribute 'generator', or {remedy}"
                )


def samplers(loader: DataLoader) -> list[Any]:
    chain = [loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None)]
    return [s for s in chain if s is not None and hasattr(s, "__dict__")]


def generators(loader: DataLoader) -> list[torch.Generator]:
    """The generators that the loader and its samplers own."""
    found = [loader.generator, *(value for s in samplers(loader) for value in vars(s).values())]
    unique = {id(g): g for g in found if isinstance(g, torch.Generator)}
    return list(unique.values())
