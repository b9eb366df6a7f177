"""DeepSpeed's configuration: where it comes from, and which of its options do not work with low-bit optimizers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from lowbit_lightning import optim
from lowbit_lightning.strategies.deepspeed.checkpoints import missed_by_converter

Config = dict[str, Any]
SUFFIXES = (".json", ".yaml", ".yml")


def read(config: Any) -> Config:
    """A configuration as a new dict, from a dict, OmegaConf's DictConfig, or a JSON or YAML file.

    Raises:
        TypeError, ValueError: for anything else, or a file that holds no configuration.
        FileNotFoundError: if the file does not exist.
    """
    if isinstance(config, (str, os.PathLike)):
        return _from_file(Path(config))
    if type(config).__module__.partition(".")[0] == "omegaconf":
        from omegaconf import OmegaConf

        config = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    if not isinstance(config, Mapping):
        raise TypeError(f"config must be a dict, an OmegaConf DictConfig or the path of a file, got {config!r}")
    try:
        return json.loads(json.dumps(config))  # DeepSpeed and Lightning write into it
    except TypeError as error:
        raise TypeError(f"config must hold what JSON can (a dtype as a string, such as 'bfloat16'): {error}") from None


def _from_file(path: Path) -> Config:
    if path.suffix not in SUFFIXES:
        raise ValueError(f"config must be a file that ends in one of {SUFFIXES}, got {path}")
    if not path.is_file():
        raise FileNotFoundError(f"config={str(path)!r}: there is no such file")
    if path.suffix == ".json":
        return read(json.loads(path.read_text()))
    from omegaconf import OmegaConf

    return read(OmegaConf.load(path))


def complete(config: Config, stage: int | None) -> Config:
    """The configuration with the keys that a client optimizer needs; with ``stage`` if it names no stage.

    Raises:
        TypeError, ValueError: for a stage that is not 1, 2 or 3, or that contradicts the configuration.
    """
    zero = config["zero_optimization"] = _section(config, "zero_optimization")
    chosen = zero.setdefault("stage", 2 if stage is None else stage)
    if chosen not in (1, 2, 3):
        raise ValueError(f"stage must be 1, 2 or 3, got {chosen!r}; without ZeRO use strategy='ddp'")
    if stage not in (None, chosen):
        raise ValueError(f"stage={stage} contradicts the config, whose zero_optimization.stage is {chosen}")
    config["zero_allow_untested_optimizer"] = True
    config["zero_force_ds_cpu_optimizer"] = False
    return config


def _section(config: Config, name: str) -> Config:
    found = config.get(name)
    if found is not None and not isinstance(found, dict):
        raise TypeError(f"config's {name} must be a dict, got {found!r}")
    return found or {}


def check_deepspeed(config: Any, optimizer: Optimizer | None = None) -> None:
    """Raise for options that DeepSpeed does not support with low-bit optimizers. ``DeepSpeedStrategy`` calls this
    itself. If you call ``deepspeed.initialize`` yourself, call this first.

    Args:
        config: as for ``DeepSpeedStrategy``: a dict, a DictConfig, or a path.
        optimizer: the client optimizer.

    Raises:
        TypeError, ValueError: the error names the setting and what to use instead.
    """
    config = read(config)
    zero = _section(config, "zero_optimization")
    offload = zero.get("offload_optimizer") or {}
    if zero.get("elastic_checkpoint"):
        raise ValueError(
            "zero_optimization.elastic_checkpoint would cut 8-bit states as if they were float32: leave it out; for "
            "another number of ranks convert the checkpoint by deepspeed.checkpoint.ds_to_universal"
        )
    if offload.get("device") == "nvme":
        raise ValueError(
            "zero_optimization.offload_optimizer.device='nvme': DeepSpeed's swapper takes states for float32; 8-bit "
            "ones are a quarter of that, so use device='cpu'"
        )
    if offload.get("ratio", 1) != 1:
        raise ValueError(
            f"zero_optimization.offload_optimizer.ratio={offload['ratio']} gives a part of the parameters to an "
            "optimizer of DeepSpeed's with float32 states: use ratio=1"
        )
    for name, owner in (("zenflow", zero), ("super_offload", offload)):
        if owner.get(name):
            raise ValueError(
                f"{name} brings a CPU optimizer of DeepSpeed's with float32 states: leave it out; "
                "offload_optimizer.device='cpu' steps 8-bit states on the host"
            )
    if "optimizer" in config:
        raise ValueError(
            "the config's optimizer section makes an optimizer of DeepSpeed's, with float32 states: take it out and "
            "return one from configure_optimizers, which becomes an 8-bit one; or use Lightning's DeepSpeedStrategy"
        )
    if optimizer is not None:
        _check_optimizer(optimizer, flat=zero.get("stage") != 0)
        missed = missed_by_converter(optimizer)
        if missed and _section(config, "checkpoint").get("load_universal"):
            raise ValueError(
                f"checkpoint.load_universal with {type(optimizer).__name__}: DeepSpeed's converter does not know its "
                f"states {missed}, but exp_avg with exp_avg_sq alone: take load_universal out, and resume on the ranks "
                "that saved; or use strategy='lowbit_sharded'"
            )


def _check_optimizer(optimizer: Optimizer, flat: bool) -> None:
    name = type(optimizer).__name__
    if flat and isinstance(optimizer, (optim.LAMB, optim.LARS)):
        raise ValueError(
            f"{name} needs the norm of each layer, and ZeRO's flat partitions have no layers: use it with "
            "strategy='lowbit_sharded' or 'ddp', or use optim.AdamW or optim.SGD here"
        )
    if any(group.get("skip_nonfinite") for group in optimizer.param_groups):
        raise ValueError(
            f"skip_nonfinite=True has {name} decide for the gradients it sees, and under ZeRO that is one rank's share "
            "of one group: leave it out. DeepSpeed skips such steps itself, on all ranks (in bf16, unless "
            "bf16.check_grad_overflow is false)"
        )
    if isinstance(optimizer, optim.LowBitOptimizer) and optimizer.releases_gradients:
        raise ValueError(
            f"release_gradients steps {name} inside backward, where ZeRO reduces gradients: build the optimizer "
            "without it; stages 2 and 3 free gradients as they are reduced"
        )
