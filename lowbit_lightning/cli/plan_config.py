"""What a config says of a run's memory: its model on the meta device, and the options of ``memory.Run``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lowbit_lightning.cli.build import instantiate, optimizer_of
from lowbit_lightning.cli.check import checked
from lowbit_lightning.cli.config import ConfigError, load
from lowbit_lightning.cli.factory import on_meta

_PRECISION = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed", "None": "32-true"}
_OF_STRATEGY = ("replicas", "reshard_after_forward", "all_gather")


def planned(files: Sequence[str], overrides: Sequence[str]) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a config, and the options of the run.

    Raises:
        ConfigError: for a mistake in the config, and for what a plan does not count.
    """
    values = checked(load(files, overrides))
    trainer: dict[str, Any] = values["trainer"]
    world_size = _devices(trainer.get("devices", "auto")) * int(trainer.get("num_nodes") or 1)
    found = {**_strategy(trainer.get("strategy") or "auto", world_size), "world_size": world_size}
    model = on_meta(lambda: instantiate(values["model"], L.LightningModule), f"model: {values['model']['class_path']}")
    return model, {
        **found,
        "precision": _precision(trainer),
        "accumulate": int(trainer.get("accumulate_grad_batches") or 1),
        "batch": _batch(values, model),
        "optimizer": _optimizer(values, model),
    }


def _precision(trainer: Mapping[str, Any]) -> str:
    plugins = [node["class_path"].rpartition(".")[2] for node in trainer.get("plugins") or ()]
    precision = "int8-mixed" if "Int8MixedPrecision" in plugins else str(trainer.get("precision"))
    return _PRECISION.get(precision, precision)


def _devices(devices: Any) -> int:
    if devices in (None, "auto", -1, "-1"):
        return max(1, torch.cuda.device_count())
    return len(devices) if isinstance(devices, list) else int(devices)


def _strategy(strategy: Any, world_size: int) -> dict[str, Any]:
    node = strategy if isinstance(strategy, Mapping) else {"class_path": strategy}
    name, args = node["class_path"].rpartition(".")[2], node.get("init_args") or {}
    if name.startswith("lowbit_sharded") or name == "ShardedStrategy":
        paged = args.get("paged", name.endswith("_paged"))
        given = {key: args[key] for key in _OF_STRATEGY if key in args} if world_size > 1 else {}
        paging = {"paged": paged, "resident": args.get("resident", 0)} if paged else {}
        return {"strategy": "sharded", "bits": args.get("optimizer_bits", 8), **given, **paging}
    if name == "auto" or name.startswith(("ddp", "DDP", "single_device", "SingleDevice")):
        return {"strategy": "single" if world_size == 1 else "ddp"}
    raise ConfigError(f"trainer.strategy: a plan counts auto, ddp and lowbit_sharded, got {name!r}")


def _optimizer(values: Mapping[str, Any], model: nn.Module) -> Any:
    """The config's, over the model's parameters, or the model's own."""
    if values.get("optimizer") is not None:
        return optimizer_of(model, values["optimizer"], values.get("parameter_groups") or {})
    try:
        made: Any = model.configure_optimizers()  # type: ignore[operator]
    except Exception as error:
        raise ConfigError(
            f"optimizer: the config names none, and {type(model).__name__}.configure_optimizers raised "
            f"{type(error).__name__} without a Trainer: {error}"
        ) from error
    while isinstance(made, (tuple, list)):
        made = made[0]
    return made["optimizer"] if isinstance(made, Mapping) else made


def _batch(values: Mapping[str, Any], model: nn.Module) -> Any:
    """The first batch to train on, without its values; None where neither the config nor the model has data."""
    if values.get("data") is not None:
        data = instantiate(values["data"], L.LightningDataModule)
        data.prepare_data()
        data.setup("fit")
        loader = data.train_dataloader()
    elif is_overridden("train_dataloader", model, L.LightningModule):  # type: ignore[arg-type]
        loader = model.train_dataloader()  # type: ignore[operator]
    else:
        return None
    batch = next(iter(loader))
    return tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, batch)
