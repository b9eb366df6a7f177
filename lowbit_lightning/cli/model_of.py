"""The model of a checkpoint, by the config of its run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import lightning as L
from torch import nn

from lowbit_lightning.cli.build import instantiate
from lowbit_lightning.cli.check import checked
from lowbit_lightning.cli.config import ConfigError, load
from lowbit_lightning.cli.runs import run_of


def model_of(checkpoint: Path, files: Sequence[str] | None) -> nn.Module:
    """The model as the config builds it, without the checkpoint's weights.

    Raises:
        ConfigError: if no config is given and the checkpoint lies in no run folder.
    """
    folder = run_of(checkpoint)
    if not files and folder is None:
        raise ConfigError(f"{checkpoint} lies in no run folder: --config FILE says which model it is of")
    chosen: list[str | Path] = list(files) if files else [folder / "config.yaml"]  # type: ignore[operator, list-item]
    values = checked(load(chosen), "convert")
    model: nn.Module = instantiate(values["model"], L.LightningModule)
    return model
