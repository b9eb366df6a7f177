"""Run a config: train it (fit), or run its validation, test or predict loop.

    lowbit fit --config gpt.yaml trainer.max_steps=100 optimizer=Lion model.width=64
    lowbit fit --config gpt.yaml --config mine.yaml --resume
    lowbit validate --config gpt.yaml --resume

Settings are key=value; list+=value appends. The run lies in RUNS/NAME/DATE-TIME. docs/configs.md has the rest."""

from __future__ import annotations

import argparse
import sys
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lowbit_lightning.callbacks import RunReport
from lowbit_lightning.cli import runs
from lowbit_lightning.cli.build import Builder
from lowbit_lightning.cli.check import checked
from lowbit_lightning.cli.config import Config, ConfigError, load
from lowbit_lightning.cli.resume import ConfigHolds, check_checkpoint, list_differences


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that go over the files")
    parser.add_argument(
        "-c", "--config", action="append", default=[], metavar="FILE", help="YAML; several go over each other"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of this config's name")
    parser.add_argument("--ckpt_path", type=Path, metavar="PATH", help="go on from this checkpoint")
    parser.add_argument("--print_config", action="store_true", help="print the config with all defaults, run nothing")


def run(args: argparse.Namespace) -> int:
    config, values = _checked(args)
    if args.print_config:
        print(Builder(values).resolved(values), end="")
        return 0
    name, home = values["name"], values["runs"]
    checkpoint = args.ckpt_path
    if args.resume:
        if checkpoint is not None:
            raise ConfigError("--resume and --ckpt_path: give one of the two")
        checkpoint = runs.newest_checkpoint(home, name)
    folder = runs.new_folder(home, name)
    try:
        built = Builder(values, folder, (ConfigHolds(), *_report(values)))
        resolved = built.resolved(values)
        limit = built.trainer.max_steps if args.command == "fit" else -1
        done = 0 if checkpoint is None else check_checkpoint(checkpoint, built.model, resolved, limit)
    except BaseException:
        if runs.first_rank():
            folder.rmdir()
        raise
    if runs.first_rank():
        runs.write_inputs(folder, config, args.overrides, resolved, built.trainer)
        if checkpoint is not None:
            print(f"lowbit {args.command}: from {checkpoint}")
            list_differences(checkpoint, resolved, f"lowbit {args.command}")
            if 0 < done == limit:
                print(f"lowbit fit: nothing is left to train: it has done all {done} steps", file=sys.stderr)
        elif args.command != "fit":
            print(f"lowbit {args.command}: no checkpoint is given: the model is as it was built", file=sys.stderr)
    return _run(args.command, built, folder, checkpoint)


def _checked(args: argparse.Namespace) -> tuple[Config, dict[str, Any]]:
    config = load(args.config, args.overrides)
    values = checked(config, args.command)
    values["name"], values["runs"] = name_of(values, args.config)
    return config, values


def name_of(values: Mapping[str, Any], files: Sequence[str]) -> tuple[str, str]:
    """The name of a config's runs, and the folder of all runs."""
    stem = Path(files[0]).stem if files else "run"
    return str(values.get("name") or stem), str(values.get("runs") or "runs")


def _report(values: Mapping[str, Any]) -> tuple[RunReport, ...]:
    """A report of each training, unless the config has one of its own. Other loops have it because checkpoints do."""
    own = [node["class_path"] for node in values["trainer"].get("callbacks") or ()]
    return () if any(path.endswith(".RunReport") for path in own) else (RunReport(),)


def _run(command: str, built: Builder, folder: Path, checkpoint: Path | None) -> int:
    trainer: Any = built.trainer
    began, status, error = time.time(), "interrupted", None
    try:
        given = {"datamodule": built.datamodule, "ckpt_path": None if checkpoint is None else str(checkpoint)}
        with warnings.catch_warnings():
            _quiet()
            made = getattr(trainer, command)(built.model, **given)
        if command == "predict" and runs.first_rank():
            torch.save(made, folder / "predictions.pt")
        status = "done" if trainer.state.finished else "interrupted"
    except MisconfigurationException as wrong:
        status, error = "failed", " ".join(str(wrong).split())
        raise ConfigError(error) from wrong
    except Exception as wrong:  # whatever the user's code raises in the run
        status, error = "failed", f"{type(wrong).__name__}: {' '.join(str(wrong).split())}"
        if str(wrong).startswith("Error(s) in loading state_dict"):
            raise ConfigError(f"ckpt_path={checkpoint}: it holds another model: {error}") from wrong
        traceback.print_exc()
        print(f"lowbit {command}: {error}", file=sys.stderr)
    finally:
        if runs.first_rank():
            metrics = runs.plain(trainer.callback_metrics)
            runs.write_result(
                folder,
                command=command,
                status=status,
                error=error,
                steps=trainer.global_step,
                seconds=round(time.time() - began, 3),
                metrics=metrics,
                resumed_from=None if checkpoint is None else str(checkpoint),
            )
            _last_lines(folder, status, metrics, trainer.global_step)
    return {"done": 0, "failed": 1}.get(status, 130)


def _last_lines(folder: Path, status: str, metrics: dict[str, float], steps: int) -> None:
    shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if "/" not in name)
    print(f"{status}: {steps} steps{f', {shown}' if shown else ''}")
    report = folder / "report.html"
    print(f"{report if report.exists() else folder}")


def _quiet() -> None:
    """Warnings that tell a user nothing about the run."""
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)  # Lightning 2.6.6 with torch 2.13
    warnings.filterwarnings("ignore", message="`torch.distributed.*` is deprecated")  # DeepSpeed 0.19 with torch 2.13
    warnings.filterwarnings("ignore", message="The dirpath has changed")  # each run has a folder of its own
    warnings.filterwarnings("ignore", message="(?s)Experiment logs directory .* exists and is not empty")
