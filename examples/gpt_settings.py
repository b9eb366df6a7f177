"""The settings of train_gpt.py: their defaults, YAML files that change them, and the command line."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

HERE = Path(__file__).resolve().parent


@dataclasses.dataclass
class Settings:
    """Every setting; the command line (``--name value``) and ``--config FILE`` know these names and no others."""

    text: str = ""  # file or folder to train on; empty: Python's standard library
    out: str = "runs/train_gpt"
    width: int = 256
    layers: int = 3
    heads: int = 4
    context: int = 128  # bytes a prediction can look back on
    batch: int = 8  # windows per step and rank
    steps: int = 600
    warmup: int = 50
    validate_every: int = 150
    validation_batches: int = 16
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    seed: int = 1
    tolerance: float = 0.01  # allowed relative difference of the two validation losses
    bf16: bool = False  # train in bf16-mixed too
    strategy: str = "auto"  # auto, ddp, lowbit_sharded, lowbit_deepspeed_stage_2 or any other that Lightning knows
    devices: int = 1  # ranks on this node
    nodes: int = 1
    tensorboard: bool = False  # log for TensorBoard too
    progress: bool = True


def parse(arguments: list[str]) -> Settings:
    """Defaults, then ``--config``, then the command line; a name that is not in Settings is refused by name."""
    parser = argparse.ArgumentParser(description="Trains a GPT in fp32 and in int8 with an 8-bit optimizer.")
    parser.add_argument("--config", type=Path, help="YAML file with any of the settings below")
    parser.add_argument("--full", action="store_true", help="a larger model: the settings of train_gpt_full.yaml")
    for field in dataclasses.fields(Settings):
        action = argparse.BooleanOptionalAction if field.type == "bool" else None
        options: dict[str, Any] = {"action": action} if action else {"metavar": str(field.type)}
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", default=argparse.SUPPRESS, help=f"default {field.default!r}", **options
        )
    given = vars(parser.parse_args(arguments))
    files = [HERE / "train_gpt_full.yaml"] if given.pop("full") else []
    config = given.pop("config")
    files += [config] if config else []
    try:
        merged = OmegaConf.structured(Settings)
        for source in [*(OmegaConf.load(file) for file in files), given]:
            merged = OmegaConf.merge(merged, source)
        settings = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, OSError) as error:
        raise SystemExit(f"{config or 'command line'}: {error}") from None
    assert isinstance(settings, Settings)
    settings.validate_every = min(settings.validate_every, settings.steps)
    if settings.steps % settings.validate_every:
        raise SystemExit(f"steps={settings.steps} has to be a multiple of validate_every={settings.validate_every}")
    if settings.width % settings.heads:
        raise SystemExit(f"width={settings.width} has to be a multiple of heads={settings.heads}")
    return settings
