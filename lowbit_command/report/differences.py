"""Configurations side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MISSING = "–"


def flat(config: Any, prefix: str = "") -> dict[str, str]:
    """``{"trainer.max_steps": "100"}``; lists of plain values are one entry."""
    if isinstance(config, Mapping):
        found: dict[str, str] = {}
        for key, value in config.items():
            found |= flat(value, f"{prefix}.{key}" if prefix else str(key))
        return found
    if isinstance(config, (list, tuple)) and any(isinstance(value, (Mapping, list, tuple)) for value in config):
        found = {}
        for i, value in enumerate(config):
            found |= flat(value, f"{prefix}[{i}]")
        return found
    return {prefix: "null" if config is None else _shown(config)}


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_shown(v) for v in value) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def differing(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The keys that are not alike in all configurations, with each one's value."""
    flats = [flat(config) for config in configs]
    keys = dict.fromkeys(key for found in flats for key in found)
    rows = {key: [found.get(key, MISSING) for found in flats] for key in keys if key}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}
