"""Going on from a checkpoint: the config beats what the checkpoint remembers, and the differences are listed.

Restoring an optimizer and a scheduler brings back their old hyperparameters. ``ConfigHolds`` therefore keeps, beside
the states, what they were when the config had just built them. After a restore it compares that with what the config
builds now, and sets what the config has changed; a learning rate that a schedule has moved is scaled.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lowbit_lightning.cli.check import OWN
from lowbit_lightning.cli.config import ConfigError, flat
from lowbit_lightning.cli.runs import run_of

_PLAIN = (bool, int, float, str, type(None), tuple, list)
_PROGRESS = ("_last_lr", "last_epoch", "_step_count", "params", "lr", "initial_lr")  # of a group and of a scheduler


class ConfigHolds(Callback):
    """What the config says of the optimizers and schedulers holds when a checkpoint is resumed."""

    def __init__(self) -> None:
        self.then: dict[str, Any] = {}
        self.now: dict[str, Any] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        self.now = {
            "groups": [[_group(group) for group in optimizer.param_groups] for optimizer in trainer.optimizers],
            "schedulers": [[_plain(vars(one)) for one in _nested(scheduler)] for scheduler in schedulers],
        }

    def state_dict(self) -> dict[str, Any]:
        return self.now

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.then = dict(state_dict)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.then:
            return
        both = zip(trainer.optimizers, self.then["groups"], self.now["groups"], strict=False)
        for optimizer, then, now in both:
            for group, before, after in zip(optimizer.param_groups, then, now, strict=False):
                _hold(group, before, after)
                if before["base"] != after["base"]:
                    factor = after["base"] / before["base"] if before["base"] else 0.0
                    group["lr"] = group["lr"] * factor if factor else after["base"]
                    if "initial_lr" in group:
                        group["initial_lr"] = after["base"]
        configs = zip(trainer.lr_scheduler_configs, self.then["schedulers"], self.now["schedulers"], strict=False)
        for config, then, now in configs:
            for one, before, after in zip(_nested(config.scheduler), then, now, strict=False):
                _hold(vars(one), before, after)


def _hold(held: Any, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    for name, value in after.items():
        if name in held and name in before and _listed(before[name]) != _listed(value):
            held[name] = value


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: float(v) if isinstance(v, Tensor) and v.numel() == 1 else v for name, v in values.items()}
    return {
        name: value
        for name, value in kept.items()
        if isinstance(value, _PLAIN) and name not in _PROGRESS and all(isinstance(x, _PLAIN) for x in _items(value))
    }


def _items(value: Any) -> Any:
    return value if isinstance(value, (tuple, list)) else ()


def _group(group: Mapping[str, Any]) -> dict[str, Any]:
    return {**_plain(group), "base": float(group.get("initial_lr", group["lr"]))}


def _nested(scheduler: Any) -> Iterator[Any]:
    yield scheduler
    for inner in getattr(scheduler, "_schedulers", ()):
        yield from _nested(inner)


# -- before the run --------------------------------------------------------------------------------------------------


def differences(checkpoint: Path, resolved: str) -> list[str]:
    """``key: OLD there, NEW here`` for all settings in which a config differs from that of the checkpoint's run."""
    folder = run_of(checkpoint)
    if folder is None:
        return []
    there, here = (_leaves(yaml.safe_load(text)) for text in ((folder / "config.yaml").read_text(), resolved))
    found = []
    for key in sorted({*there, *here}):
        if there.get(key) != here.get(key):
            old, new = (repr(side[key]) if key in side else "not set" for side in (there, here))
            found.append(f"{key}: {old} there, {new} here")
    return found


def list_differences(checkpoint: Path, resolved: str, prog: str) -> None:
    found = differences(checkpoint, resolved)
    if found:
        print(f"{prog}: this config holds where it differs from that of {checkpoint}:", file=sys.stderr)
        print("\n".join(f"  {line}" for line in found), file=sys.stderr)


def _leaves(config: Any) -> dict[str, Any]:
    own = {key: value for key, value in (config or {}).items() if key not in OWN or key == "parameter_groups"}
    return {key: value for key, value in flat(own) if not isinstance(value, (dict, list)) or not value}


def check_checkpoint(checkpoint: Path, model: nn.Module, resolved: str, max_steps: int = -1) -> int:
    """How many steps it has done; 0 where only its strategy can tell.

    Raises:
        ConfigError: for a checkpoint that is not there, is none, is past ``max_steps`` (-1: no limit), or whose tensors
            have other shapes than the model's.
    """
    if not checkpoint.exists():
        raise ConfigError(f"ckpt_path={checkpoint}: no such file or folder")
    if checkpoint.is_dir():
        return 0  # its strategy checks it, tensor by tensor
    try:
        content = torch.load(checkpoint, map_location="meta", weights_only=True)
    except UnpicklingError:
        return 0  # it holds more than plain values; Lightning says what to do
    except Exception as error:  # whatever torch makes of a file that is no checkpoint
        raise ConfigError(f"ckpt_path={checkpoint}: no checkpoint: {str(error).partition(chr(10))[0]}") from None
    _check_model(checkpoint, content, model, resolved)
    done = int(content.get("global_step", 0))
    if -1 < max_steps < done:
        said = f"{checkpoint} has already done {done} steps; give more to go on"
        raise ConfigError(f"trainer.max_steps={max_steps}: {said}")
    return done


def _check_model(checkpoint: Path, content: Any, model: nn.Module, resolved: str) -> None:
    saved = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(saved, dict):
        raise ConfigError(f"ckpt_path={checkpoint}: no checkpoint of Lightning: it has no state_dict")
    held = {name: tuple(x.shape) for name, x in model.state_dict().items() if isinstance(x, Tensor)}
    other = [name for name, x in saved.items() if name in held and tuple(x.shape) != held[name]]
    if other or (saved and held and not set(saved) & set(held)):
        first = next(iter(other or saved))
        here = list(held[first]) if first in held else "not here"
        settings = [line for line in differences(checkpoint, resolved) if line.startswith("model.")]
        raise ConfigError(
            f"ckpt_path={checkpoint}: it holds another model: {first} is {list(saved[first].shape)} there, {here}"
            + (" here" if first in held else "")
            + (f" ({'; '.join(settings)})" if settings else "")
        )
