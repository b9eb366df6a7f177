"""Checks a config before anything is built: every key, name and type. What is wrong is said in one line: the key and
where it stands, what was found, what is allowed, and what may have been meant."""

from __future__ import annotations

import copy
import re
import sys
import warnings
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from typing import Any

import lightning as L
from jsonargparse import ArgumentError
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.model_helpers import is_overridden

from lowbit_lightning.cli.config import CLASS, Config, ConfigError, meant
from lowbit_lightning.cli.names import (
    PLACES,
    Place,
    accelerators,
    find,
    precisions,
    registered_strategy,
    strategies,
)

OWN = {
    "name": "of the run: it lies in RUNS/NAME/DATE-TIME; default: the name of the first file",
    "runs": "folder of all runs; default: runs",
    "vars": "variables for interpolation: ${vars.NAME}",
    "parameter_groups": "name pattern -> options of the optimizer: {'*norm*': {weight_decay: 0.0}}",
}
KEYS = ("seed_everything", "trainer", "model", "data", "optimizer", "lr_scheduler")
LISTS = ("trainer.callbacks", "trainer.plugins", "trainer.logger")


def checked(config: Config, loop: str = "fit") -> dict[str, Any]:
    """The config with all interpolations replaced and class names in full, as LightningCLI takes it; ``OWN`` keys
    included. ``loop``: what is to run; a ``fit`` needs an optimizer.

    Raises:
        ConfigError: for the first thing that is wrong.
    """
    for key in config.values:
        if key not in (*KEYS, *OWN):
            raise ConfigError(f"{config.at(key)}: unknown key; {meant(key, (*KEYS, *OWN), others=True)}")
    values = config.resolved()
    _own(config, values)
    trainer = values.setdefault("trainer", {}) or {}
    if not isinstance(trainer, dict):
        raise ConfigError(f"{config.at('trainer')}: a mapping of the Trainer's arguments, got {trainer!r}")
    values["trainer"] = trainer
    _trainer(config, trainer)
    for name in ("model", "data", "optimizer", "lr_scheduler"):
        if values.get(name) is not None:
            values[name] = class_node(config, PLACES[name], name, values[name])
    if values.get("model") is None:
        raise ConfigError("model: none is given; model: {class_path: my_module.MyModel} or a short name, such as GPT")
    _optimizer(config, values, loop)
    return values


def _own(config: Config, values: Mapping[str, Any]) -> None:
    for key in ("name", "runs"):
        value = values.get(key)
        if value is not None and (not isinstance(value, (str, int)) or (key == "name" and "/" in str(value))):
            raise ConfigError(f"{config.at(key)}: {OWN[key]}; got {value!r}")
    groups = values.get("parameter_groups") or {}
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise ConfigError(f"{config.at('parameter_groups')}: {OWN['parameter_groups']}; got {groups!r}")


def _optimizer(config: Config, values: Mapping[str, Any], loop: str) -> None:
    if values.get("optimizer") is None:
        for key in ("lr_scheduler", "parameter_groups"):
            if values.get(key):
                raise ConfigError(f"{config.at(key)}: needs an optimizer in the config, and there is none")
        cls = find(PLACES["model"], values["model"]["class_path"], "model")
        own: Any = cls
        if loop == "fit" and not is_overridden("configure_optimizers", own, L.LightningModule):
            raise ConfigError(
                f"optimizer: none is given, and {cls.__name__} configures none: optimizer: AdamW, or any of "
                f"{', '.join(sorted(PLACES['optimizer'].names))}"
            )


# -- the Trainer -----------------------------------------------------------------------------------------------------


def _trainer(config: Config, trainer: dict[str, Any]) -> None:
    known = arguments(L.Trainer)
    for key in trainer:
        if key not in known:
            near = meant(key, known)
            raise ConfigError(f"{config.at(f'trainer.{key}')}: the Trainer has no {key!r}; {near}".rstrip("; "))
    for key, allowed in (("precision", precisions()), ("accelerator", accelerators())):
        value = trainer.get(key)
        if isinstance(value, (str, int)) and str(value) not in allowed:
            raise ConfigError(
                f"{config.at(f'trainer.{key}')}: unknown {key} {value!r}; {meant(str(value), allowed, others=True)}"
            )
    if trainer.get("strategy") is not None:
        trainer["strategy"] = _strategy(config, trainer["strategy"])
    for key in ("trainer.callbacks", "trainer.plugins", "trainer.logger", "trainer.profiler"):
        name = key.partition(".")[2]
        value = trainer.get(name)
        if value is None or isinstance(value, bool):
            continue
        if key == "trainer.profiler" and value in ("simple", "advanced", "pytorch", "xla"):
            continue
        items = value if isinstance(value, list) else [value]
        nodes = [class_node(config, PLACES[key], f"{key}.{i}", item) for i, item in enumerate(items)]
        trainer[name] = nodes if key in LISTS else nodes[0]
    types(config, L.Trainer, "trainer", trainer)


def _strategy(config: Config, value: Any) -> Any:
    key, place = "trainer.strategy", PLACES["trainer.strategy"]
    if isinstance(value, str):
        if value in strategies():
            return value
        if "." not in value and value not in place.names:
            raise ConfigError(
                f"{config.at(key)}: unknown strategy {value!r}; {meant(value, strategies(), others=True)}"
            )
    named = registered_strategy(value["class_path"]) if isinstance(value, dict) and "class_path" in value else None
    if named is not None:
        value = {**value, **named, "init_args": {**named["init_args"], **(value.get("init_args") or {})}}
    return class_node(config, place, key, value)


# -- classes ---------------------------------------------------------------------------------------------------------


def class_node(config: Config, place: Place, key: str, node: Any) -> dict[str, Any]:
    """``{class_path, init_args}`` with the class's full path, its arguments checked."""
    if isinstance(node, str):
        node = {"class_path": node}
    if not isinstance(node, dict) or "class_path" not in node:
        raise ConfigError(f"{config.at(key)}: a {place.what} is a name, or a mapping with class_path; got {node!r}")
    for name in node:
        if name not in CLASS:
            raise ConfigError(
                f"{config.at(f'{key}.{name}')}: stands beside class_path, where only init_args may; put {name} under it"
            )
    cls = find(place, node["class_path"], config.at(key))
    args = dict(node.get("init_args") or {})
    path = f"{key}.init_args"
    for name in list(args):
        if name not in arguments(cls, place.given):
            if _set_before_the_class(config, key, name):
                print(f"{config.at(f'{path}.{name}')}: left out; {cls.__name__} takes none", file=sys.stderr)
                del args[name]
                continue
            known = arguments(cls, place.given)
            near = get_close_matches(name, known, n=1)
            has = f"did you mean {near[0]}?" if near else f"It has {', '.join(known) or 'none'}"
            raise ConfigError(f"{config.at(f'{path}.{name}')}: {cls.__name__} has no argument {name!r}; {has}")
    types(config, cls, path, args, place.given)
    made = {**node, "class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": args}
    return made if args else {k: v for k, v in made.items() if k != "init_args"}


def _set_before_the_class(config: Config, key: str, name: str) -> bool:
    """Whether an argument comes from a source before that of the class: it belonged to another."""
    own, of_class = config.origin(f"{key}.init_args.{name}"), config.origin(f"{key}.class_path")
    return own is not None and of_class is not None and own[1] < of_class[1]


@cache
def parser_of(cls: type, given: frozenset[str] = frozenset()) -> tuple[LightningArgumentParser, tuple[str, ...]]:
    parser = LightningArgumentParser(exit_on_error=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about arguments without types
        added = parser.add_class_arguments(cls, "it", skip=set(given), fail_untyped=False)
    return parser, tuple(name.removeprefix("it.") for name in added)


def arguments(cls: type, given: frozenset[str] = frozenset()) -> tuple[str, ...]:
    """The names that a class's constructor takes, those of its bases included."""
    return parser_of(cls, given)[1]


def types(config: Config, cls: type, path: str, values: Mapping[str, Any], given: frozenset[str] = frozenset()) -> None:
    """Raise for a value of another type than the constructor's annotation says, and for one that is missing."""
    try:
        parser_of(cls, given)[0].parse_object({"it": copy.deepcopy(dict(values))})
    except ArgumentError as error:
        said = str(error)
    else:
        return
    wrong = re.match(r'Parser key "it\.([\w.]+)":\s*(.*)', said, re.DOTALL)
    missing = re.search(r'"it\.([\w.]+)" is required|required.*?: it\.([\w.]+)|Key "it\.([\w.]+)" is required', said)
    if wrong:
        key, value = f"{path}.{wrong[1]}", _at(values, wrong[1])
        raise ConfigError(f"{config.at(key)}: expected {_expected(wrong[2])}, got {value!r}")
    if missing:
        name = next(group for group in missing.groups() if group)
        key = f"{path.removesuffix('.init_args')}.{name}"
        raise ConfigError(f"{config.at(path)}: {cls.__name__} needs {name}; {key}=... gives it")
    raise ConfigError(f"{config.at(path)}: {' '.join(said.split())}")


def _at(values: Any, key: str) -> Any:
    for step in key.split("."):
        values = values.get(step) if isinstance(values, Mapping) else None
    return values


def _expected(said: str) -> str:
    """jsonargparse's many lines about a value, as a type: the last that names one is about the innermost value."""
    inner = re.findall(r'Parser key "([\w.]+)":\s*(.*?)(?=Parser key|\Z)', said, re.DOTALL)
    if inner:
        name, said = inner[-1]
        return f"{name}: {_expected(said)}"
    whole = re.search(r"Subtypes: (\[.*?\])\n", said) or re.search(r"Expected an? (.*?)\. Got value", said)
    text = whole[1] if whole else said.partition("\n")[0]
    text = re.sub(r"<class '([\w.]+)'>", lambda m: m[1].rpartition(".")[2], text)
    text = text.replace("typing.", "").replace("NoneType", "null")
    return " or ".join(text[1:-1].split(", ")) if re.fullmatch(r"\[[\w, ]+\]", text) else text
