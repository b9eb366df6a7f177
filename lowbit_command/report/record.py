"""A run as plain values, and its file ``report.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lowbit_command.report.series import Series

FILE, PAGE = "report.json", "report.html"
VERSION = 1
RUNNING, FINISHED, INTERRUPTED, FAILED = "running", "finished", "interrupted", "failed"


@dataclass
class Record:
    """All that a report shows.

    Attributes:
        name: of the run; folder: of its files, the last two parts.
        status: one of the four above; error: ``{"type", "message", "traceback"}`` of a run that failed.
        sessions: ``{"step", "started", "status"}``: where the run began, and where it was resumed.
        steps, seconds: trained so far, over all sessions.
        series: name -> curve. "loss", "samples per second" and "lr" are drawn first.
        memory: rows of ``{"kind", "what", "bytes"}``; peak: bytes of the device, or of the process on a CPU.
        linear: ``{"int8": [layers, weights], "low-bit": ..., "high": ...}`` of layers with matmuls.
        layers: layer -> product -> signal to noise in dB; layers_from: what they are of.
        codes: state -> ``{"zero_code", "counts": 256 numbers}``.
        ops: rows of ``[op, backend, calls]``.
        config, environment: nested plain values. previous: ``{"folder", "config"}`` of the previous run of this name.
        notes: what could not be found out, and why.
    """

    name: str = "run"
    folder: str = ""
    status: str = RUNNING
    started: str = ""
    ended: str = ""
    steps: int = 0
    seconds: float = 0.0
    error: dict[str, str] = field(default_factory=dict)
    sessions: list[dict[str, Any]] = field(default_factory=list)
    series: dict[str, Series] = field(default_factory=dict)
    memory: list[dict[str, Any]] = field(default_factory=list)
    peak: dict[str, Any] = field(default_factory=dict)
    linear: dict[str, list[int]] = field(default_factory=dict)
    layers: dict[str, dict[str, float]] = field(default_factory=dict)
    layers_from: str = ""
    codes: dict[str, dict[str, Any]] = field(default_factory=dict)
    ops: list[list[Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    previous: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def curve(self, name: str, unit: str = "") -> Series:
        """The curve of that name, begun where there is none."""
        return self.series.setdefault(name, Series(unit))

    def to_dict(self) -> dict[str, Any]:
        told = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"version": VERSION, **told, "series": {name: s.to_dict() for name, s in self.series.items()}}

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Record:
        """What ``to_dict`` gave. Raises ValueError for another version, or what is no record."""
        if not isinstance(told, Mapping) or told.get("version") != VERSION:
            found = told.get("version") if isinstance(told, Mapping) else type(told).__name__
            raise ValueError(f"a report of version {VERSION} is needed, got {found!r}")
        known = {f.name for f in fields(cls)}
        values = {name: value for name, value in told.items() if name in known}
        return cls(**{**values, "series": {name: Series.of(s) for name, s in told.get("series", {}).items()}})

    def text(self, indent: int | None = None) -> str:
        """As JSON that any parser takes."""
        return json.dumps(plain(self.to_dict()), indent=indent, allow_nan=False, separators=(",", ":"))


def plain(value: Any) -> Any:
    """JSON values only: other objects as text, numbers that are not finite as text."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, float) and value - value != 0:
        return str(value)
    if value is None or type(value) in (bool, int, float, str):
        return value
    return str(value)


def load(run: str | Path) -> Record:
    """The record of a run: of its folder, of its ``report.json``, or of the newest run in a folder of runs.

    Raises:
        ValueError: naming the path, where there is none.
    """
    path = Path(run)
    if path.is_dir():
        here = path / FILE
        inside = sorted(path.glob(f"*/{FILE}"), key=lambda found: found.stat().st_mtime)
        if not here.exists() and not inside:
            raise ValueError(f"{run} holds no {FILE}; give the folder of a run that callbacks.RunReport has written to")
        path = here if here.exists() else inside[-1]
    elif path.suffix == ".html":
        path = path.with_suffix(".json")
    try:
        return Record.of(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is no report of a run: {error}") from error
