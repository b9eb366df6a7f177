"""Which of several functions with the same result is the fastest for a kind of work: measured on the GPU, once each."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowbit_lightning.kernels.cuda import launch

ROUNDS = 4
"""How often each function runs, in turns. The first time compiles, and does not count."""


class Fastest:
    """``chosen``: kinds of work that have been measured -> the name of the fastest function."""

    def __init__(self) -> None:
        self.chosen: dict[Hashable, str] = {}

    def run(
        self,
        kind: Hashable,
        functions: Mapping[str, Callable[..., Tensor]],
        arguments: Sequence[Any],
        device: torch.device,
    ) -> Tensor:
        """The result of the fastest function for this kind of work. If that is not known yet, all of them run, and the
        host waits."""
        if kind not in self.chosen:
            best = dict.fromkeys(functions, float("inf"))
            for turn in range(ROUNDS):
                for name, function in functions.items():
                    took = launch.milliseconds(partial(function, *arguments), device)
                    best[name] = min(best[name], took) if turn else best[name]
            self.chosen[kind] = min(best, key=best.__getitem__)
        return functions[self.chosen[kind]](*arguments)
