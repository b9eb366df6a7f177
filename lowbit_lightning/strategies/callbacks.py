"""What a sharded run asks of the Trainer's callbacks.

Finetuning callbacks add parameter groups in mid-run. They save the names of the parameters, and add the groups of a
checkpoint in ``on_fit_start``. Lightning calls that before it loads checkpoints for strategies that, like ours, load
into a model that is set up; so the strategy calls it again, before optimizers are loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BaseFinetuning


def add_groups(trainer: L.Trainer, checkpoint: Mapping[str, Any]) -> None:
    """Let finetuning callbacks make the groups that the checkpoint's optimizers have."""
    for callback in _finetuning(trainer):
        state = (checkpoint.get("callbacks") or {}).get(callback.state_key)
        if state:
            callback.load_state_dict({**state})
            callback.on_fit_start(trainer, trainer.lightning_module)


def forget_groups(trainer: L.Trainer) -> None:
    """Lightning has restored the callbacks once more since: the next ``fit`` is to begin without these groups."""
    for callback in _finetuning(trainer):
        callback._restarting = False


def refuse_copies(trainer: L.Trainer, strategy: str) -> None:
    """
    Raises:
        ValueError: for a callback that copies the model, of which a rank holds a part.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        kinds = {base.__name__ for base in type(callback).__mro__}
        if kinds & {"StochasticWeightAveraging", "WeightAveraging"}:
            raise ValueError(
                f"{type(callback).__name__} copies the whole model, which {strategy} has cut: leave it out, average "
                "checkpoints afterwards, or use strategy='ddp'"
            )


def _finetuning(trainer: L.Trainer) -> Iterator[BaseFinetuning]:
    return (c for c in trainer.callbacks if isinstance(c, BaseFinetuning))  # type: ignore[attr-defined]
