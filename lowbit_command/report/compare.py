"""The page of several runs: curves over each other, a table of results, and of what differs in the configurations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape

from lowbit_command.report import parts
from lowbit_command.report.chart import COLOURS, duration, number
from lowbit_command.report.differences import differing
from lowbit_command.report.page import FIRST, curve, int8_share, loss_by_step, over_time, small, tag_grid
from lowbit_command.report.record import Record, plain
from lowbit_command.units import amount

MOST = COLOURS
MISSING = "–"


def compare(records: Sequence[Record]) -> str:
    """The whole file of HTML. Raises ValueError for fewer than two runs, or more than there are colours."""
    if not 2 <= len(records) <= MOST:
        raise ValueError(f"2 to {MOST} runs can be compared, got {len(records)}")
    names = labels(records)
    runs = [(name, record, i) for i, (name, record) in enumerate(zip(names, records, strict=True), 1)]
    body = [f"<header><h1>{len(runs)} runs</h1><p>{escape(', '.join(names))}</p></header>", _results(runs)]
    body += ["<h2>Training</h2>", *_curves(runs), "<h2>Configuration</h2>", _differences(runs)]
    data = json.dumps(plain([record.to_dict() for record in records]), allow_nan=False, separators=(",", ":"))
    return parts.document(f"{' and '.join(names)}: comparison of runs", "".join(body), data)


def labels(records: Sequence[Record]) -> list[str]:
    """The shortest names that tell the runs apart."""
    for candidates in ([r.name for r in records], [r.folder for r in records]):
        if len(set(candidates)) == len(candidates):
            return candidates
    return [f"{r.name} ({i})" for i, r in enumerate(records, 1)]


def _curves(runs: list[tuple[str, Record, int]]) -> list[str]:
    with_loss = [(name, r, c) for name, r, c in runs if r.series.get("loss") and r.series["loss"].steps]
    found = []
    if with_loss:
        found.append(loss_by_step(with_loss))
    cards = []
    if with_loss:
        curves = [curve(name, r.series["loss"], c, time=True, smooth=True, band=False) for name, r, c in with_loss]
        cards.append(parts.card("Loss by time", over_time(curves, "loss by time")))
    shared = list(dict.fromkeys(s for _, r, _ in runs for s in r.series if s != "loss"))
    for title in sorted(shared, key=lambda s: FIRST.index(s) if s in FIRST else len(FIRST)):
        having = [(name, r.series[title], c) for name, r, c in runs if title in r.series and r.series[title].steps]
        if len(having) > 1 and len(cards) < 9:
            speed = title == FIRST[1]
            curves = [curve(name, s, c, smooth=speed, band=False) for name, s, c in having]
            cards.append(small(title, curves, having[0][1].unit, zero=speed))
    key = parts.legend([(name, c) for name, _, c in runs])
    return [f'<div class="card" style="margin-bottom:12px">{key}</div>', *found, tag_grid(cards, "grid gap")]


def _results(runs: list[tuple[str, Record, int]]) -> str:
    head = ("run", "status", "steps", "time", "loss at the end", "samples/s", "states", "peak", "low bits")
    rows = [(parts.key(c, name), record.status, *_numbers(record)) for name, record, c in runs]
    return parts.card("Results", parts.table(head, rows, range(2, len(head)), "fold", scroll=True))


def _numbers(record: Record) -> list[str]:
    loss, speed, share = record.series.get("loss"), record.series.get(FIRST[1]), int8_share(record)
    end, median = loss.end() if loss else None, speed.median() if speed else None
    states = sum(row["bytes"] for row in record.memory if "states" in row["kind"])
    return [
        f"{record.steps:,}",
        duration(record.seconds),
        MISSING if end is None else number(end),
        MISSING if median is None else number(median),
        amount(states) if record.memory else MISSING,
        amount(record.peak["bytes"]) if record.peak else MISSING,
        f"{100 * share:.0f} %" if share is not None else MISSING,
    ]


def _differences(runs: list[tuple[str, Record, int]]) -> str:
    found = []
    for title, configs in (
        ("Differences of configuration", [r.config for _, r, _ in runs]),
        ("Differences of environment", [r.environment for _, r, _ in runs]),
    ):
        names = [name for name, _, _ in runs]
        rows = [(key, *values) for key, values in differing(configs).items() if list(values) != names]
        head = ("", *(parts.key(c, name) for name, _, c in runs))
        inside = parts.table(head, rows, css="fold", scroll=True) if rows else '<p class="soft">None.</p>'
        found.append(parts.card(title, inside, css="gap"))
    return "".join(found)
