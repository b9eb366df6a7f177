"""Train a config once for each combination of values, one after the other, and compare the runs.

    lowbit sweep --config gpt.yaml --set trainer.precision=32-true,int8-mixed --set optimizer.lr=1e-3,3e-4
    lowbit sweep --config gpt.yaml --set model.width=128,256 --set model.layers=2,4 --paired

--paired takes the first values of all, then the second, and so on. The runs lie in RUNS/NAME/sweep-..., with sweep.json
and sweep.html. The same command goes on with a sweep that was stopped: runs that are done are kept, others are resumed
or started again. Exit status: 1 if a run failed."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lowbit_command.report.chart import COLOURS, duration, number
from lowbit_command.report.compare import compare
from lowbit_command.report.record import load as load_record
from lowbit_lightning.cli.check import checked
from lowbit_lightning.cli.config import ConfigError, load
from lowbit_lightning.cli.fit import name_of


@dataclass
class Cell:
    """One combination: its overrides, and how its run ended."""

    name: str
    overrides: tuple[str, ...]
    status: str = "waits"
    folder: str = ""
    steps: int = 0
    seconds: float = 0.0
    error: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of all runs")
    parser.add_argument("-c", "--config", action="append", required=True, metavar="FILE", help="as for lowbit fit")
    parser.add_argument("--set", action="append", required=True, metavar="key=a,b,c", help="values to try; repeatable")
    parser.add_argument("--paired", action="store_true", help="values of the same place go together")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at the same time (default 1)")
    parser.add_argument("--metric", metavar="NAME", help="to compare by; default: val_loss, or else train_loss")


def run(args: argparse.Namespace) -> int:
    if args.jobs < 1:
        raise ConfigError(f"--jobs {args.jobs}: at least 1")
    cells = combinations(args.set, args.paired)
    for cell in cells:
        values = checked(load(args.config, (*args.overrides, *cell.overrides)))
    name, runs = name_of(values, args.config)
    folder = Path(runs, name, f"sweep-{_digest(args)}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"runs: the folder {folder} cannot be made: {error.strerror}") from None
    for cell in cells:
        _find(folder, cell)
    todo = [cell for cell in cells if cell.status != "done"]
    print(f"{folder}: {len(cells)} runs, {len(cells) - len(todo)} done before")
    with ThreadPoolExecutor(args.jobs) as pool:
        for cell in pool.map(lambda cell: _run(folder, cell, args), todo):
            print(f"{cell.name}: {cell.status} in {duration(cell.seconds)}" + (f": {cell.error}" if cell.error else ""))
            _write(folder, cells, args)
    _write(folder, cells, args)
    print(table(cells, args.metric))
    print(_page(folder, cells, args.metric))
    return 1 if any(cell.status != "done" for cell in cells) else 0


# -- combinations ----------------------------------------------------------------------------------------------------


def combinations(sets: Sequence[str], paired: bool) -> list[Cell]:
    """The grid of all values, or with ``paired`` as many cells as each key has values."""
    keys, values = [], []
    for text in sets:
        key, sep, listed = text.partition("=")
        if not sep or not key or not listed:
            raise ConfigError(f"--set {text}: write key=a,b,c, such as optimizer.lr=1e-3,3e-4")
        keys.append(key)
        values.append(split(listed))
    lengths = {len(one) for one in values}
    if paired and len(lengths) > 1:
        counts = ", ".join(f"{key} {len(one)}" for key, one in zip(keys, values, strict=True))
        raise ConfigError(f"--paired: each --set needs as many values as the others, got {counts}")
    chosen = zip(*values, strict=True) if paired else itertools.product(*values)
    short = _short(keys)
    cells = []
    for one in chosen:
        pairs = [f"{name}={value}" for name, value in zip(short, one, strict=True)]
        overrides = tuple(f"{key}={value}" for key, value in zip(keys, one, strict=True))
        cells.append(Cell(re.sub(r"[^\w=.,+-]+", "_", ",".join(pairs)), overrides))
    names = [cell.name for cell in cells]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"--set: {twice} comes twice")
    return cells


def split(listed: str) -> list[str]:
    """At the commas that stand outside brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in listed:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _short(keys: Sequence[str]) -> list[str]:
    """The shortest ends of the keys that tell them apart."""
    found = []
    for key in keys:
        steps = key.split(".")
        ends = (".".join(steps[-n:]) for n in range(1, len(steps) + 1))
        found.append(next((e for e in ends if sum(f".{k}".endswith(f".{e}") for k in keys) == 1), key))
    return found


# -- runs ------------------------------------------------------------------------------------------------------------


def _digest(args: argparse.Namespace) -> str:
    """Of what a sweep is made of: the same command finds the same folder."""
    texts = [Path(file).read_text() for file in args.config]
    told = json.dumps([texts, args.overrides, args.set, args.paired])
    return hashlib.sha256(told.encode()).hexdigest()[:8]


def _find(folder: Path, cell: Cell) -> None:
    """How the newest run of a cell ended, if there is one."""
    found = sorted((folder / cell.name).glob("*/config.yaml"))
    if not found:
        return
    cell.folder, cell.status = str(found[-1].parent), "interrupted"
    ended = found[-1].with_name("run.json")
    if ended.is_file():
        told = json.loads(ended.read_text())
        cell.status, cell.error, cell.steps = told["status"], told["error"], told["steps"]
        cell.seconds, cell.metrics = told["seconds"], told["metrics"]


def _run(folder: Path, cell: Cell, args: argparse.Namespace) -> Cell:
    resume = cell.status == "interrupted" and any((folder / cell.name).glob("*/checkpoints/*.ckpt"))
    told = [sys.executable, "-m", "lowbit_command", "fit"]
    told += [part for file in args.config for part in ("--config", file)]
    told += [*args.overrides, *cell.overrides, f"runs={folder}", f"name={cell.name}"]
    began = time.time()
    with (folder / f"{cell.name}.log").open("w") as log:
        done = subprocess.run([*told, *(["--resume"] if resume else [])], stdout=log, stderr=subprocess.STDOUT)
    _find(folder, cell)
    if done.returncode:
        cell.status, cell.seconds = "failed", cell.seconds or time.time() - began
        last = (folder / f"{cell.name}.log").read_text().strip().splitlines()
        cell.error = cell.error or (last[-1] if last else f"exit status {done.returncode}")
    return cell


# -- results ---------------------------------------------------------------------------------------------------------


def metric_of(cells: Sequence[Cell], asked: str | None) -> str | None:
    """What is compared: a metric that runs have logged."""
    logged = [name for cell in cells for name in cell.metrics]
    if asked is not None and asked not in logged and logged:
        raise ConfigError(f"--metric {asked}: no run logged it; there are {', '.join(sorted(set(logged)))}")
    return asked or next((name for name in ("val_loss", "train_loss", *logged) if name in logged), None)


def ranked(cells: Sequence[Cell], metric: str | None) -> list[Cell]:
    """Those that are done, the best first. More is better where the name says accuracy or the like."""
    sign = -1 if re.search("acc|f1|auc|score|r2", metric or "") else 1
    having = [cell for cell in cells if cell.status == "done" and metric in cell.metrics]
    return sorted(having, key=lambda cell: sign * cell.metrics[metric or ""])


def table(cells: Sequence[Cell], asked: str | None) -> str:
    metric = metric_of(cells, asked)
    best = ranked(cells, metric)[:1]
    rows = [("", "run", metric or "metric", "steps", "time", "status")]
    for cell in cells:
        value = number(cell.metrics[metric]) if metric in cell.metrics else "-"
        mark = "*" if cell in best else ""
        status = f"{cell.status}: {cell.error}" if cell.error else cell.status
        rows.append((mark, cell.name, value, f"{cell.steps:,}", duration(cell.seconds), status))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return "\n".join(_aligned(rows, widths))


def _aligned(rows: Sequence[Sequence[str]], widths: Sequence[int]) -> Iterator[str]:
    for row in rows:
        left = "  ".join(cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True))
        right = "  ".join(cell.rjust(width) for cell, width in zip(row[2:5], widths[2:], strict=True))
        yield f"{left}  {right}  {row[5]}"


def _write(folder: Path, cells: Sequence[Cell], args: argparse.Namespace) -> None:
    told: Mapping[str, Any] = {"set": args.set, "paired": args.paired, "runs": [asdict(cell) for cell in cells]}
    (folder / "sweep.json").write_text(json.dumps(told, indent=1))


def _page(folder: Path, cells: Sequence[Cell], asked: str | None) -> str:
    """The page that compares the runs; of many, the best."""
    shown = [cell for cell in ranked(cells, metric_of(cells, asked)) if Path(cell.folder, "report.json").is_file()]
    if len(shown) < 2:
        return f"{folder}: logs, sweep.json"
    order = {cell.name: i for i, cell in enumerate(cells)}
    records = [load_record(cell.folder) for cell in sorted(shown[:COLOURS], key=lambda cell: order[cell.name])]
    page = folder / "sweep.html"
    page.write_text(compare(records))
    return str(page)
