"""Bytes per device of a training run, before anything is allocated. Exit status: 0, or 1 if the plan does not fit in
--memory. docs/memory.md says what is exact and what is estimated.

    lowbit plan --config gpt.yaml trainer.devices=8 --memory 24GiB
    lowbit plan my_models:make_gpt --world-size 8 --batch 8x1024:int64

A config gives model, data (its first batch), optimizer, precision and strategy; options go over it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import Field, fields
from typing import Any

from lowbit_lightning import memory
from lowbit_lightning.cli.factory import make_model
from lowbit_lightning.memory.run import default_of, option_of
from lowbit_lightning.optim.options import parse_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "given",
        nargs="*",
        metavar="MODEL | key=value",
        help="package.module:factory, a callable or class that makes the model; with --config: settings",
    )
    parser.add_argument("-c", "--config", action="append", default=[], metavar="FILE", help="as for lowbit fit")
    for declared in fields(memory.Run):
        _add(parser, declared)
    parser.add_argument("--memory", help="a device's, as 80GiB or 80e9; says what to change if it does not fit")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")


def _add(parser: argparse.ArgumentParser, declared: Field) -> None:
    """The flag of an option of ``Run``. One that is True or False has no value: it says that it is not the default."""
    option, default, name = option_of(declared), default_of(declared), declared.name
    if option.flag == "":
        return
    flag = f"--{option.flag or name.replace('_', '-')}"
    told: dict[str, Any] = {"dest": name, "help": option.help, "default": argparse.SUPPRESS}
    if isinstance(default, bool) and option.words is None:
        parser.add_argument(flag, action="store_const", const=not default, **told)
        return
    if default is not None and default is not False:
        told["help"] = f"{option.help} (default {default})"
    if option.words or option.allowed:
        told["choices"] = tuple(option.words or option.allowed)
    parser.add_argument(flag, type=int if option.least is not None else str, metavar=option.metavar, **told)


def _told(args: argparse.Namespace) -> dict[str, Any]:
    """The options of ``Run`` that were given."""
    found: dict[str, Any] = {}
    for declared in fields(memory.Run):
        if hasattr(args, declared.name):
            option, value = option_of(declared), getattr(args, declared.name)
            if option.words is not None:
                value = option.words[value]
            elif option.parse is not None:
                value = _parsed(declared.name, value, option.parse)
            found[declared.name] = value
    return found


def _parsed(name: str, value: str, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(value)
    except ValueError as error:
        said = str(error)
        raise ValueError(said if name in said else f"{name}={value!r}: {said}") from error


def run(args: argparse.Namespace) -> int:
    limit = None if args.memory is None else parse_bytes(args.memory, "memory")
    if args.config:
        from lowbit_lightning.cli.plan_config import planned  # imports jsonargparse and OmegaConf

        model, found = planned(args.config, args.given)
    else:
        model, found = make_model(" ".join(args.given)), {}
    result = memory.plan(model, memory.Run(**{**found, **_told(args)}))
    fits = limit is None or result.fits(limit)
    if args.json:
        told: dict[str, Any] = result.to_dict()
        if limit is not None:
            advice = [vars(advice) for advice in result.advice(limit)]
            told |= {"memory": limit, "fits": fits, "advice": advice}
        print(json.dumps(told, indent=2))
    else:
        print(result.table(limit))
    return 0 if fits else 1
