"""A JSON schema of configs, for editors: keys, types, names of classes and their arguments.

    lowbit schema > lowbit.schema.json

A config whose first line is "# yaml-language-server: $schema=lowbit.schema.json" is then completed and checked."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Union, get_args, get_origin

import lightning as L

from lowbit_lightning.cli.check import KEYS, LISTS, OWN, parser_of
from lowbit_lightning.cli.names import PLACES, Place, accelerators, precisions, strategies

Schema = dict[str, Any]
INTERPOLATION: Schema = {"type": "string", "pattern": r"\$\{"}
_PLAIN = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(args: argparse.Namespace) -> int:
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed talks while it is imported
        made = schema()
    print(json.dumps(made, indent=1))
    return 0


def schema() -> Schema:
    """Draft 7, which all editors know."""
    own: Schema = {key: {"description": what} for key, what in OWN.items()}
    own["vars"]["type"] = own["parameter_groups"]["type"] = "object"
    found = {key: {**_classes(place), "description": f"a {place.what}"} for key, place in PLACES.items()}
    trainer = arguments(L.Trainer, frozenset())
    for key, names in (("precision", precisions()), ("accelerator", accelerators())):
        trainer[key] = {"anyOf": [{"enum": [*names, *(int(n) for n in names if n.isdigit()), None]}, INTERPOLATION]}
    trainer["strategy"] = {"anyOf": [{"enum": strategies()}, *found["trainer.strategy"]["anyOf"]]}
    for key in (*LISTS, "trainer.profiler"):
        name, one = key.partition(".")[2], found[key]["anyOf"]
        several = [{"type": "array", "items": {"anyOf": one}}] if key in LISTS else []
        trainer[name] = {"anyOf": [{"type": ["boolean", "null"]}, *several, *one]}
    whole = {"type": "object", "properties": trainer, "additionalProperties": False}
    sections: Schema = {"seed_everything": {"type": ["boolean", "integer", "string"]}, "trainer": _or_file([whole])}
    for key in KEYS[2:]:
        sections[key] = _or_file([*found[key]["anyOf"], {"type": "null"}])
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "a config of lowbit fit",
        "type": "object",
        "properties": {**own, **sections},
        "additionalProperties": False,
    }


def _or_file(kinds: list[Schema]) -> Schema:
    return {"anyOf": [*kinds, {"type": "string", "pattern": r"\.ya?ml$"}]}


def _classes(place: Place) -> Schema:
    """A name, or a mapping with ``class_path`` and the arguments of that class."""
    names = sorted(place.names)
    dotted: Schema = {"type": "string", "pattern": r"\."}
    cases = [
        {
            "if": {"properties": {"class_path": {"const": name}}},
            "then": {
                "properties": {
                    "init_args": {
                        "type": "object",
                        "properties": arguments(place.names[name], place.given),
                        "additionalProperties": False,
                    }
                }
            },
        }
        for name in names
        if place.base != (object,)  # of plugins: their names do
    ]
    node: Schema = {
        "type": "object",
        "required": ["class_path"],
        "properties": {
            "class_path": {"anyOf": [{"enum": names}, dotted]},
            "init_args": {"type": "object"},
            "dict_kwargs": {"type": "object"},
        },
        "additionalProperties": False,
    }
    return {"anyOf": [{"enum": names}, dotted, {**node, **({"allOf": cases} if cases else {})}]}


def arguments(cls: type, given: frozenset[str]) -> Schema:
    """The constructor's arguments, by name."""
    parser, names = parser_of(cls, given)
    found: Schema = {}
    for action in parser._actions:
        name = action.dest.removeprefix("it.")
        if name in names:
            hint = getattr(action, "_typehint", None) or action.type
            found[name] = {"anyOf": [kind, INTERPOLATION]} if (kind := _kind(hint)) else {}
    return found


def _kind(hint: Any) -> Schema:
    """A type as a schema; empty, which allows all, for what a schema cannot say."""
    if hint in _PLAIN:
        return {"type": _PLAIN[hint]}
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return {"enum": list(inner)}
    if origin in (Union, types.UnionType):
        kinds: list[Schema] = []
        for one in map(_kind, inner):
            kinds += [] if one in kinds else [one]
        return {} if {} in kinds else {"anyOf": kinds}
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {"type": "object"}
    if isinstance(origin, type) and issubclass(origin, Iterable):
        return {"type": "array"}
    return {}
