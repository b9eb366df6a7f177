"""Run folders: ``RUNS/NAME/DATE-TIME/`` holds all that a run reads and leaves.

source/*.yaml      the files as they were written, and overrides.txt
config.yaml        the config with every interpolation and default; lowbit fit --config takes it
environment.json   versions, machine, commit, command line
checkpoints/       last.ckpt and what ModelCheckpoint keeps
metrics.csv        what the run logged
run.json           how it ended: status, steps, seconds, metrics
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.utilities.rank_zero import rank_zero_only

from lowbit_lightning.callbacks import observed
from lowbit_lightning.cli.config import Config, ConfigError

FOLDER_VARIABLE = "LOWBIT_RUN_FOLDER"  # the folder, for the ranks that Lightning starts


def first_rank() -> bool:
    return not getattr(rank_zero_only, "rank", 0)


def new_folder(runs: str, name: str) -> Path:
    """A run's folder, made by the first rank.

    Raises:
        ConfigError: if it cannot be made.
    """
    if not first_rank() and FOLDER_VARIABLE in os.environ:
        return Path(os.environ[FOLDER_VARIABLE])
    stem = Path(runs, name, time.strftime("%Y-%m-%d-%H-%M-%S"))
    folder, number = stem, 1
    while folder.exists():
        number += 1
        folder = stem.with_name(f"{stem.name}-{number}")
    if first_rank():
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise ConfigError(
                f"runs: the run folder {folder} cannot be made: {error.strerror}; runs=FOLDER names another place"
            ) from None
        os.environ[FOLDER_VARIABLE] = str(folder)
    return folder


def write_inputs(folder: Path, config: Config, overrides: Sequence[str], resolved: str, trainer: L.Trainer) -> None:
    source = folder / "source"
    source.mkdir()
    for i, file in enumerate(config.files):
        target = source / file.name
        shutil.copyfile(file, target if not target.exists() else source / f"{i}-{file.name}")
    if overrides:
        (source / "overrides.txt").write_text("".join(f"{override}\n" for override in overrides))
    (folder / "config.yaml").write_text(resolved)
    found = {"command": sys.argv, **observed.environment(trainer.strategy.root_device, trainer.world_size)}
    (folder / "environment.json").write_text(json.dumps(found, indent=1))


def write_result(folder: Path, **found: Any) -> None:
    (folder / "run.json").write_text(json.dumps(found, indent=1))


def plain(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def newest_checkpoint(runs: str, name: str) -> Path:
    """The newest checkpoint of the newest run that has one.

    Raises:
        ConfigError: if there is none.
    """
    home = Path(runs, name)
    folders = sorted((p.parent for p in home.glob("*/checkpoints")), key=lambda p: p.name, reverse=True)
    for folder in folders:
        found = sorted(
            (folder / "checkpoints").glob("*.ckpt"), key=lambda p: (p.stat().st_mtime, p.name == "last.ckpt")
        )
        if found:
            return found[-1]
    tried = "it has none" if not home.is_dir() else f"none of its {len(list(home.iterdir()))} runs has a checkpoint"
    raise ConfigError(f"--resume: no run of {home} to go on with: {tried}; leave --resume out, or give --ckpt_path")


def run_of(checkpoint: Path) -> Path | None:
    """The run folder that a checkpoint lies in."""
    folder = checkpoint.resolve().parent.parent
    return folder if (folder / "config.yaml").is_file() else None
