"""A config: YAML files and overrides, merged key by key, then resolved once.

Interpolation (``${trainer.max_steps}``, ``${oc.env:HOME}``) is OmegaConf's. It happens after all files and overrides
are merged, so a key may refer to any key of any file, and follows what an override says. Each key remembers where its
value came from, for errors.

Values that name a class have the form ``{class_path: AdamW, init_args: {lr: 0.001}}``. ``optimizer=SGD`` changes the
class alone, and ``optimizer.lr=0.1`` is short for ``optimizer.init_args.lr=0.1``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

CLASS = ("class_path", "init_args", "dict_kwargs")
SECTIONS = ("model", "data", "optimizer", "lr_scheduler", "trainer")
"""Keys that may name another YAML file instead of holding a mapping."""

COMMAND_LINE = "command line"


class ConfigError(ValueError):
    """What is wrong in a config, in one line."""


@dataclass
class Config:
    """Merged values, in which interpolations stand as they were written. ``origins``: key -> where it was set, and the
    number of that source: later ones go over earlier ones."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, tuple[str, int]] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)

    def at(self, key: str) -> str:
        """The key with its place: ``trainer.max_steps (gpt.yaml line 3)``."""
        found = self.origin(key)
        return f"{key} ({found[0]})" if found else key

    def origin(self, key: str) -> tuple[str, int] | None:
        """Of the key, or else of the nearest that holds it."""
        while key not in self.origins and "." in key:
            key = key.rpartition(".")[0]
        return self.origins.get(key)

    def resolved(self) -> dict[str, Any]:
        """The values, each interpolation replaced.

        Raises:
            ConfigError: for one that refers to no key, or cannot be computed; for a ``???`` that nothing replaced.
        """
        try:
            found = OmegaConf.to_container(OmegaConf.create(self.values), resolve=True, throw_on_missing=True)
        except OmegaConfBaseException as error:
            raise self._unresolved(error) from None
        assert isinstance(found, dict)
        return {str(key): value for key, value in found.items()}

    def _unresolved(self, error: OmegaConfBaseException) -> ConfigError:
        said = str(error).partition("\n")[0]
        key = re.sub(r"\[(\w+)\]", r".\1", str(error.full_key or ""))
        missing = re.match(r"Interpolation key '(.+?)' not found", said)
        if said.startswith("Missing mandatory value"):
            said = f"??? stands for a value that must be given: {key}=VALUE"
        elif missing:
            said = f"${{{missing[1]}}} refers to no key; {meant(missing[1], dict(flat(self.values)))}".rstrip("; ")
        elif "Environment variable" in said:
            name = said.split("'")[1]
            said = f"the environment variable {name} is not set; ${{oc.env:{name},DEFAULT}} has a default"
        return ConfigError(f"{self.at(key)}: {said}")


def load(files: Sequence[Path | str], overrides: Sequence[str] = ()) -> Config:
    """Later files go over earlier ones, overrides (``key=value``, ``list+=value``) over all files.

    Raises:
        ConfigError: for a file that cannot be read or is not YAML; for two sources that do not merge.
    """
    config = Config(files=[Path(file) for file in files])
    for number, file in enumerate(config.files):
        values, lines = _read(file)
        config.values = _merged(config, config.values, values, "", lines, number)
        config.origins |= {key: (where, number) for key, where in lines.items()}
    for override in overrides:
        _override(config, override)
    return config


def flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All keys, dotted, of mappings and lists, with their values; those of the containers too."""
    if prefix:
        yield prefix, values
    pairs = values.items() if isinstance(values, Mapping) else enumerate(values) if isinstance(values, list) else ()
    for key, value in pairs:
        yield from flat(value, f"{prefix}.{key}" if prefix else str(key))


def meant(wrong: str, known: Any, others: bool = False) -> str:
    """``did you mean X?``, and with ``others`` what else there is; empty if nothing is near."""
    near = get_close_matches(wrong, [str(name) for name in known], n=1)
    said = [f"did you mean {near[0]}?"] if near else []
    if others:
        said.append(f"Allowed: {', '.join(sorted(map(str, known)))}")
    return " ".join(said)


# -- files -----------------------------------------------------------------------------------------------------------


def _read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """What a file holds, and key -> ``FILE line N``."""
    try:
        text = path.read_text()
    except OSError as error:
        packaged = f"; lowbit configs copy {path.name} may be meant" if path.parent == Path() else ""
        raise ConfigError(f"--config {path}: {error.strerror or error}{packaged}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {path}: not a text file ({error.reason})") from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None and not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{path} line 1: a config is keys with values, such as name: gpt")
        values = OmegaConf.to_container(OmegaConf.create(text)) if root is not None else {}
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: not YAML: {problem or str(error).partition(chr(10))[0]}") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {str(error).partition(chr(10))[0]}") from None
    assert isinstance(values, dict)
    plain = {str(key): value for key, value in values.items()}
    lines = {} if root is None else {key: f"{path.name} line {line}" for key, line in _lines(root)}
    for key in SECTIONS:
        value = plain.get(key)
        if isinstance(value, str) and value.endswith((".yaml", ".yml")):
            plain[key], inner = _read(path.parent / value)
            lines |= {f"{key}.{name}": where for name, where in inner.items()}
    return plain, lines


def _lines(node: yaml.Node, prefix: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        pairs = [(str(key.value), key.start_mark.line, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        pairs = [(str(i), value.start_mark.line, value) for i, value in enumerate(node.value)]
    else:
        return
    for key, line, value in pairs:
        name = f"{prefix}.{key}" if prefix else key
        yield name, line + 1
        yield from _lines(value, name)


# -- merging ---------------------------------------------------------------------------------------------------------


def _merged(config: Config, old: Any, new: Any, key: str, lines: Mapping[str, str], number: int) -> Any:
    """``new`` over ``old``: mappings key by key; a class name goes over that of a class, and keeps its arguments."""
    if isinstance(old, Mapping) and isinstance(new, str) and "class_path" in old:
        config.origins[f"{key}.class_path"] = (lines.get(key, COMMAND_LINE), number)
        return {**old, "class_path": new}
    if isinstance(old, str) and isinstance(new, Mapping) and set(new) <= set(CLASS):
        old = {"class_path": old}
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        both = dict(old)
        for name, value in new.items():
            inner = f"{key}.{name}" if key else str(name)
            both[str(name)] = _merged(config, old[name], value, inner, lines, number) if name in old else value
        return both
    if isinstance(old, Mapping) != isinstance(new, Mapping) and None not in (old, new) and not _interpolates(old, new):
        held, said = ("a mapping", f"{new!r}") if isinstance(old, Mapping) else (f"{old!r}", "a mapping")
        where = lines.get(key, COMMAND_LINE)
        raise ConfigError(f"{config.at(key)} is {held}, and {said} in {where}: these do not merge")
    return new


def _interpolates(*values: Any) -> bool:
    return any(isinstance(value, str) and value.startswith("${") for value in values)


def _override(config: Config, text: str) -> None:
    parts = re.fullmatch(r"([^\s=+]+?)(\+?)=(.*)", text, re.DOTALL)
    if parts is None:
        raise ConfigError(f"{text!r} is no override: write key=value, such as trainer.max_steps=100")
    key, append, written = parts[1], bool(parts[2]), parts[3]
    try:
        read: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={written}"]))
        value = read["value"]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise ConfigError(f"{text!r}: the value is not YAML: {problem}") from None
    path = _path(config, key)
    full, number = ".".join(path), len(config.files)
    if path[0] == "vars" and full not in dict(flat(config.values)):
        raise ConfigError(f"{text!r}: no file has {full}; {meant(full, dict(flat(config.values)))}".rstrip("; "))
    holder = _holder(config, path)
    last: Any = int(path[-1]) if isinstance(holder, list) else path[-1]
    old = holder[last] if isinstance(holder, list) else holder.get(last)
    if append:
        value = [*_listed(old), *_listed(value)]
    holder[last] = _merged(config, old, value, full, {}, number)
    for name in [name for name in config.origins if name.startswith(f"{full}.") and not isinstance(holder[last], dict)]:
        del config.origins[name]
    config.origins[full] = (COMMAND_LINE, number)


def _listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _path(config: Config, key: str) -> list[str]:
    """The steps to a key, ``init_args`` put in where a class stands."""
    path: list[str] = []
    node: Any = config.values
    for step in key.split("."):
        named = path and (isinstance(node, str) or (isinstance(node, Mapping) and "class_path" in node))
        if named and step not in CLASS:
            path.append("init_args")
            node = node.get("init_args") if isinstance(node, Mapping) else None
        path.append(step)
        if isinstance(node, list):
            if not step.isdigit() or int(step) >= len(node):
                raise ConfigError(f"{key}: {'.'.join(path[:-1])} has {len(node)} items, 0 to {len(node) - 1}")
            node = node[int(step)]
        else:
            node = node.get(step) if isinstance(node, Mapping) else None
    return path


def _holder(config: Config, path: list[str]) -> Any:
    """The mapping or list that holds the last step; what is missing on the way is made."""
    node: Any = config.values
    for i, step in enumerate(path[:-1]):
        place: Any = int(step) if isinstance(node, list) else step
        inner = node[place] if isinstance(node, list) else node.get(place)
        if isinstance(inner, str) and path[i + 1] in CLASS:
            inner = {"class_path": inner}
        elif inner is None:
            inner = {}
        elif not isinstance(inner, (dict, list)):
            so_far, rest = ".".join(path[: i + 1]), ".".join(path[i + 1 :])
            raise ConfigError(f"{config.at(so_far)} is {inner!r}, and has no {rest}")
        node[place] = inner
        node = inner
    return node
