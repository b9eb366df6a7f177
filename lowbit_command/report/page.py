"""The page of one run."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from lowbit_command.report import parts
from lowbit_command.report.chart import Curve, draw, duration, number
from lowbit_command.report.differences import MISSING, differing, flat
from lowbit_command.report.parts import Html, card
from lowbit_command.report.record import FAILED, INTERRUPTED, RUNNING, Record
from lowbit_command.report.series import Series
from lowbit_command.units import amount

SMALL, BROAD = (400, 214), (1140, 300)
FIRST = ("loss", "samples per second", "learning rate")
MOST_LAYERS, MOST_ROWS, MOST_CHARTS = 16, 60, 14
LOW_SNR = 20.0
KINDS = ("parameters", "gradients", "8-bit states", "32-bit states", "paged states", "activations and temporary")
_INT8 = {"int8": "int8 arithmetic", "low-bit": "low-bit weights", "high": "high precision"}


def page(record: Record) -> str:
    """The whole file of HTML."""
    body = [_header(record), _problem(record), _tiles(record)]
    for title, sections in (
        ("Training", "".join(_curves(record))),
        ("Memory", _memory(record)),
        ("Low-bit arithmetic", "".join(_low_bit(record))),
        ("Configuration", "".join(_configuration(record))),
        ("Data", _data(record)),
    ):
        if sections:
            body.append(f"<h2>{title}</h2>{sections}")
    body.append(_footer(record))
    return parts.document(f"{record.name}: report of a run", "".join(body), record.text())


def _header(record: Record) -> str:
    when = f"{record.started.replace('T', ' ')}" + (f" to {record.ended.replace('T', ' ')}" if record.ended else "")
    resumed = f", resumed {len(record.sessions) - 1} times" if len(record.sessions) > 2 else ""
    resumed = ", resumed once" if len(record.sessions) == 2 else resumed
    pill = f'<span class="pill {escape(record.status)}">{escape(record.status)}</span>'
    return f"<header><h1>{escape(record.name)}</h1>{pill}<p>{escape(f'{record.folder} · {when}{resumed}')}</p></header>"


def _problem(record: Record) -> str:
    if record.status == RUNNING:
        return ""
    if record.status == INTERRUPTED:
        return f'<section class="card problem"><b>Stopped by hand</b> after step {record.steps:,}.</section>'
    if record.status != FAILED:
        return ""
    error = record.error
    said = escape(error.get("message", ""))
    text = f"<b>{escape(error.get('type', 'Error'))}</b> after step {record.steps:,}: {said}"
    more = f"<details><summary>Traceback</summary><pre>{escape(error.get('traceback', ''))}</pre></details>"
    return f'<section class="card problem">{text}{more}</section>'


def _tiles(record: Record) -> str:
    values = [("steps", f"{record.steps:,}"), ("training time", duration(record.seconds))]
    loss, speed = record.series.get("loss"), record.series.get(FIRST[1])
    if loss and loss.steps:
        values.append(("loss at the end", _shown(loss.end())))
    median = speed.median() if speed else None
    if median is not None:
        values.append(("samples per second, median", number(median)))
    if record.memory:
        states = sum(row["bytes"] for row in record.memory if "states" in row["kind"])
        values.append(("optimizer states", amount(states)))
    if record.peak:
        values.append((f"peak memory, {record.peak['of']}", amount(record.peak["bytes"])))
    share = int8_share(record)
    if share is not None:
        values.append(("of linear weights in low bits", f"{100 * share:.0f} %"))
    return parts.tiles(values)


def int8_share(record: Record) -> float | None:
    """The share of weights of layers with matmuls that run in int8 or have low-bit weights."""
    total = sum(weights for _, weights in record.linear.values())
    return None if not total else 1 - record.linear.get("high", [0, 0])[1] / total


# -- curves -----------------------------------------------------------------------------------------------------------


def _curves(record: Record) -> Iterator[str]:
    loss = record.series.get("loss")
    if loss and loss.steps:
        yield loss_by_step([(record.name, record, 1)])
    yield '<div class="grid gap">'
    if loss and loss.steps:
        yield card("Loss by time", over_time([curve("loss", loss, 1, time=True, smooth=True)], "loss by time"))
    names = [*FIRST[1:], *(name for name in record.series if name not in FIRST)]
    others = {name: record.series[name] for name in names if name in record.series}
    curves = {name: series for name, series in others.items() if len(series.steps) > 1}
    for i, (name, series) in enumerate([*curves.items()][:MOST_CHARTS]):
        speed = name == FIRST[1]
        drawn = curve(name, series, (3, 4, 2, 5, 6)[min(i, 4)], smooth=speed)
        yield small(name, [drawn], series.unit, zero=speed)
    single = [(name, _shown(series.last())) for name, series in others.items() if len(series.steps) == 1]
    if single:
        yield card("Metrics of one step", parts.table((), single, [1]))
    yield "</div>"
    if len(curves) > MOST_CHARTS:
        yield f'<p class="soft">{len(curves) - MOST_CHARTS} more curves are in the JSON block.</p>'


def _shown(value: float | None) -> str:
    return "not finite" if value is None else number(value)


def loss_by_step(runs: list[tuple[str, Record, int]]) -> str:
    """The large chart, in two drawings for broad and narrow pages."""
    curves = [curve(label, r.series["loss"], colour, smooth=True, band=len(runs) < 4) for label, r, colour in runs]
    marks = [float(s["step"]) for s in runs[0][1].sessions[1:]] if len(runs) == 1 else []
    drawn = [
        draw(curves, size, "step", _step, log=None, marks=marks, about="loss by step", css=css)
        for size, css in ((BROAD, "broad"), (SMALL, "narrow"))
    ]
    note = "mean, and smallest to largest" if any(len(c.low) for c in curves) else ""
    if len(runs) == 1 and any(r.series["loss"].nonfinite for _, r, _ in runs):
        note = f"not finite first at step {runs[0][1].series['loss'].nonfinite[0]:,} (+)"
    return card("Loss by step", "".join(drawn), note)


def curve(
    label: str, series: Series, colour: int, time: bool = False, smooth: bool = False, band: bool = True
) -> Curve:
    """A series as a curve over steps or seconds."""
    xs: list[float] = series.seconds if time else [float(step) for step in series.steps]
    spread = band and (series.low != series.mean or series.high != series.mean)
    bad = [] if time else [float(s) for s in series.nonfinite if series.steps[0] <= s <= series.steps[-1]]
    low, high = (series.low, series.high) if spread else ((), ())
    return Curve(label, xs, series.mean, low, high, colour, smooth, bad)


def small(title: str, curves: list[Curve], unit: str = "", zero: bool = False) -> str:
    """A card with a chart over steps. The name of a metric stays as it was logged."""
    shown = title[:1].upper() + title[1:] if title.replace(" ", "").isalpha() else title
    return card(shown, draw(curves, SMALL, "step", _step, zero=zero, about=title), unit)


def over_time(curves: list[Curve], about: str) -> str:
    """A chart over the time of training, in the unit that suits it."""
    longest = max((c.x[-1] for c in curves if c.x), default=0.0)
    unit, name = next((u for u in ((1.0, "seconds"), (60.0, "minutes")) if longest < 180 * u[0]), (3600.0, "hours"))
    return draw(curves, SMALL, f"{name} of training", duration, x_unit=unit, log=None, about=about)


def _step(x: float) -> str:
    return f"step {round(x):,}"


# -- memory -----------------------------------------------------------------------------------------------------------


def _memory(record: Record) -> str:
    if not record.memory:
        return ""
    kinds = {kind: sum(row["bytes"] for row in record.memory if row["kind"] == kind) for kind in KINDS}
    colours = {kind: i % len(KINDS) for i, kind in enumerate(KINDS, 1)}  # the last is grey
    bar = parts.stack([(kind, size, colours[kind]) for kind, size in kinds.items() if size], amount)
    known = sorted((row for row in record.memory if row["kind"] in colours), key=lambda row: KINDS.index(row["kind"]))
    rows = [(parts.key(colours[row["kind"]], row["kind"]), row["what"], amount(row["bytes"])) for row in known]
    total = sum(kinds.values())
    rows.append((Html("<b>together</b>"), "on this rank", amount(total)))
    note = f"peak of the {record.peak['of']}: {amount(record.peak['bytes'])}" if record.peak else ""
    return card("Memory by kind", bar + '<div class="gap"></div>' + parts.table((), rows, [2], css="fold"), note)


# -- low-bit arithmetic -----------------------------------------------------------------------------------------------


def _low_bit(record: Record) -> Iterator[str]:
    cards = []
    if record.linear:
        rows = [
            (parts.key(i, _INT8[name]), f"{n:,}", f"{weights:,}")
            for i, (name, (n, weights)) in enumerate(record.linear.items(), 1)
        ]
        share = int8_share(record) or 0.0
        sizes = [(_INT8[name], weights, i) for i, (name, (_, weights)) in enumerate(record.linear.items(), 1)]
        bar = parts.stack(sizes, lambda weights: f"{weights:,.0f} weights")
        inside = bar + parts.table(("", "layers", "weights"), rows, [1, 2])
        cards.append(card("Layers with matmuls", inside, f"{100 * share:.1f} % of the weights in low bits"))
    if record.ops:
        rows = [(op, backend, f"{calls:,}") for op, backend, calls in record.ops]
        slow = any(backend == "reference" for _, backend, _ in record.ops)
        note = "the reference is slow: lowbit doctor says why it ran" if slow else "calls in this session"
        cards.append(card("Which ops ran where", parts.table(("op", "backend", "calls"), rows, [2]), note))
    if cards:
        yield tag_grid(cards, "two")
    if record.layers:
        yield _layers(record)
    if record.codes:
        yield tag_grid([_codes(name, told, i) for i, (name, told) in enumerate(record.codes.items())], "grid gap")


def tag_grid(cards: list[str], css: str) -> str:
    return f'<div class="{css}">{"".join(cards)}</div>'


def _layers(record: Record) -> str:
    by_most = sorted(record.layers.values(), key=len, reverse=True)
    products = list(dict.fromkeys(p for found in by_most for p in found))
    worst = sorted(record.layers, key=lambda name: min(record.layers[name].values()))
    rows = []
    for name in worst[:MOST_LAYERS]:
        found = record.layers[name]
        lowest = min(found.values())
        numbers = [_decibel(found.get(p)) for p in products]
        rows.append((name, parts.meter(lowest / 60, 5 if lowest < LOW_SNR else 3), *numbers))
    head = ("layer", Html.cell("lowest", "bar"), *products)
    more = len(worst) - len(rows)
    note = f"signal to noise in dB, {record.layers_from}"
    inside = parts.table(head, rows, range(2, 2 + len(products)), "fold", scroll=True)
    inside += f'<p class="soft">{more} layers with less error are in the JSON block.</p>' if more else ""
    return card("Error by layer, the largest first", inside, note, "gap")


def _decibel(value: float | None) -> Html:
    if value is None:
        return Html("")
    return Html(f'<span class="low">{value:.1f}</span>' if value < LOW_SNR else f"{value:.1f}")


def _codes(name: str, told: dict, index: int) -> str:
    """How often each of the 256 codes of an 8-bit state is used."""
    counts, zero = told["counts"], told["zero_code"]
    total, most = sum(counts) or 1, max(counts) or 1
    width, height, left, bottom = *SMALL, 8, 26
    wide = (width - 2 * left) / 256
    tops = [(left + i * wide, height - bottom - (height - bottom - 12) * n / most) for i, n in enumerate(counts)]
    path = f"M{left} {height - bottom}" + "".join(f"L{x:.1f} {y:.1f}h{wide:.2f}" for x, y in tops)
    path += f"L{width - left} {height - bottom}z"
    ticks = [(0, "code 0", "start"), (zero, "zero", "middle"), (255, "255", "end")]
    ticks = ticks[1:] if zero < 30 else ticks
    texts = "".join(
        f'<text x="{left + (i + (0.5 if a == "middle" else a == "end")) * wide:.1f}" y="{height - 8}" '
        f'text-anchor="{"start" if a == "middle" and zero < 30 else a}">{label}</text>'
        for i, label, a in ticks
    )
    svg = (
        f'<svg class="chart c{index % 6 + 1}" viewBox="0 0 {width} {height}" role="img" aria-label="use of codes">'
        f'<path class="bars" d="{path}"/><line class="axis" x1="{left}" x2="{width - left}" y1="{height - bottom}" '
        f'y2="{height - bottom}"/>{texts}</svg>'
    )
    used = sum(n > 0 for n in counts)
    return card(f"Codes of {name}", svg, f"{used} of 256 used, {100 * counts[zero] / total:.1f} % are zero")


# -- configuration ----------------------------------------------------------------------------------------------------


def _configuration(record: Record) -> Iterator[str]:
    before = record.previous.get("config")
    if before is not None:
        changed = differing([before, record.config])
        rows = [(k, Html(f'<span class="was">{escape(a)}</span>'), b) for k, (a, b) in changed.items()]
        note = f"the previous run is {record.previous.get('folder', '')}"
        inside = parts.table(("", "before", "now"), rows, css="fold") if rows else '<p class="soft">None.</p>'
        yield card("Differences to the previous run", inside, note)
    if record.config:
        yield parts.folded("Configuration", parts.facts(flat(record.config)))
    if record.environment:
        yield parts.folded("Environment", parts.facts(flat(record.environment)))
    if record.notes:
        yield card("Notes", "".join(f"<p>{escape(note)}</p>" for note in record.notes), css="gap")


def _data(record: Record) -> str:
    loss = record.series.get("loss") or next(iter(record.series.values()), None)
    if loss is None or not loss.steps:
        return ""
    names = [n for n in FIRST if n in record.series]
    names += [n for n in record.series if n not in names][: 5 - len(names)]
    every = -(-len(loss.steps) // MOST_ROWS)
    rows = []
    for i in sorted({*range(0, len(loss.steps), every), len(loss.steps) - 1}):
        step = loss.steps[i]
        rows.append((f"{step:,}", duration(loss.seconds[i]), *(_value_at(record.series[n], step) for n in names)))
    made = parts.table(("step", "time", *names), rows, range(2 + len(names)), scroll=True)
    return parts.folded(f"Table of {len(rows)} steps; all points are in the JSON block of this file", made)


def _value_at(series: Series, step: int) -> str:
    """The value of the stretch that holds a step."""
    found = next((v for s, v in zip(series.steps, series.mean, strict=True) if s >= step and v is not None), None)
    return MISSING if found is None else number(found)


def _footer(record: Record) -> str:
    version = record.environment.get("packages", {}).get("lowbit-lightning", "")
    writer = escape(f"lowbit_lightning {version}".strip())
    return f"<footer>Written by {writer}. This file loads nothing from a network.</footer>"
