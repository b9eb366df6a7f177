"""Curves as SVG: axes with round numbers, a band from the smallest to the largest value, a smoothed line.

A chart has a fixed drawing size and scales with its column, so that its text stays near 12 pixels at any width of the
page. Values appear when the pointer rests on the chart: each stretch of the x axis has a ``<title>``, which browsers
show without any script.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape

LEFT, RIGHT, TOP, BOTTOM = 52, 10, 12, 34
COLOURS = 6


@dataclass(frozen=True)
class Curve:
    """``x``, ``y`` (None: a gap), and the band from ``low`` to ``high``, empty for none. ``colour``: 1 to 6.
    ``bad``: x where a value was not finite."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()
    colour: int = 1
    smooth: bool = False
    bad: Sequence[float] = ()


@dataclass(frozen=True)
class Axis:
    """A range, its round numbers, and how they are written."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False
    unit: str = ""

    def at(self, value: float) -> float:
        """0 to 1."""
        if self.log:
            return math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def round_numbers(low: float, high: float, most: int) -> list[float]:
    """At most ``most`` multiples of 1, 2 or 5 times a power of ten inside a range."""
    if not high > low:
        return [low]
    rough = (high - low) / max(1, most)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10, 20) if (high - low) / (m * power) <= most)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def axis(values: Sequence[float], most: int, log: bool | None = False, unit: str = "", zero: bool = False) -> Axis:
    """An axis that holds all values. ``log``: None chooses it where values are positive and span a factor of 30.
    ``zero``: it begins at 0."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if log is None:
        log = low > 0 and high / low > 30
    if log and low > 0 and high > low:
        return Axis(low / 1.05, high * 1.05, _log_ticks(low / 1.05, high * 1.05, most), True, unit)
    low = min(0.0, low) if zero else low
    if high <= low:
        pad = abs(high) * 0.1 or 1.0
        low, high = (0.0 if zero else low - pad), high + pad
    elif not zero:
        low, high = low - 0.04 * (high - low), high + 0.04 * (high - low)
    else:
        high += 0.06 * (high - low)
    return Axis(low, high, tuple(round_numbers(low, high, most)), unit=unit)


def _log_ticks(low: float, high: float, most: int) -> tuple[float, ...]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [f * 10.0**p for p in powers for f in factors if low <= f * 10.0**p <= high]
        if len(ticks) <= most:
            break
    every = -(-len(ticks) // most)
    return tuple(ticks[::every]) if len(ticks) > 1 else tuple(round_numbers(low, high, most))


def numbers(values: Sequence[float]) -> list[str]:
    """As ``number`` writes them, with as many digits as they need to differ."""
    for digits in range(4, 9):
        found = [number(value, digits) for value in values]
        if len(set(found)) == len(set(values)):
            break
    return found


def number(value: float, digits: int = 4) -> str:
    """At most five characters where possible: 12k, 0.0031, 3e-5."""
    if value == 0:
        return "0"
    size = abs(value)
    for limit, factor, suffix in ((1e12, 1e12, "T"), (1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if size >= limit:
            return f"{value / factor:.{digits}g}{suffix}"
    if size < 1e-3:
        return f"{value:.2e}".replace(".00e", "e").replace("0e", "e").replace("e-0", "e-")
    return f"{value:.{digits}g}"


def duration(seconds: float) -> str:
    """ "45 s", "12 min 5 s", "3 h 20 min"."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min" + (f" {total % 60} s" if total % 60 else "")
    hours, minutes = total // 3600, total % 3600 // 60
    return f"{hours} h" + (f" {minutes} min" if minutes else "")


def draw(
    curves: Sequence[Curve],
    size: tuple[int, int],
    x_label: str,
    x_text: Callable[[float], str] = number,
    x_unit: float = 1.0,
    log: bool | None = False,
    zero: bool = False,
    marks: Sequence[float] = (),
    about: str = "",
    css: str = "",
) -> str:
    """The chart as an ``<svg>``; ``marks``: x of dashed lines; ``about``: what it shows, for who does not see it.
    ``x_unit``: x values are divided by it for the axis."""
    width, height = size
    seen = [v for c in curves for values in (c.y, c.low, c.high) for v in values if v is not None]
    xs = [x / x_unit for c in curves for x in c.x]
    down = axis(seen, max(3, (height - TOP - BOTTOM) // 36), log, zero=zero)
    along = _along(xs, max(2, (width - LEFT - RIGHT) // 78))
    plot = _Plot(width, height, along, down, x_unit)
    curves = [thinned(curve, (width - LEFT - RIGHT) // 2) for curve in curves]
    label = escape(about or ", ".join(c.label for c in curves))
    parts = [f'<svg class="chart {css}" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">']
    parts += plot.axes(x_label)
    parts += [
        f'<line class="mark" x1="{plot.x(m):.1f}" x2="{plot.x(m):.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>'
        for m in marks
    ]
    parts += [line for curve in curves for line in plot.curve(curve)]
    parts += plot.pointer(curves, x_text, max(8, (width - LEFT - RIGHT) // 9))
    return "".join([*parts, "</svg>"])


def _along(xs: Sequence[float], most: int) -> Axis:
    low, high = (min(xs), max(xs)) if xs else (0.0, 1.0)
    low = 0.0 if low < 0.3 * high else low
    if high <= low:
        low, high = low - 0.5, low + 0.5
    return Axis(low, high, tuple(round_numbers(low, high, most)))


@dataclass(frozen=True)
class _Plot:
    width: int
    height: int
    along: Axis
    down: Axis
    x_unit: float

    def x(self, value: float) -> float:
        return LEFT + (self.width - LEFT - RIGHT) * self.along.at(value / self.x_unit)

    def y(self, value: float) -> float:
        return TOP + (self.height - TOP - BOTTOM) * (1 - self.down.at(value))

    def axes(self, x_label: str) -> list[str]:
        bottom, right = self.height - BOTTOM, self.width - RIGHT
        parts = []
        for tick, told in zip(self.down.ticks, numbers(self.down.ticks), strict=True):
            y = f"{self.y(tick):.1f}"
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y}" y2="{y}"/>')
            parts.append(f'<text class="ty" x="{LEFT - 7}" y="{y}" dy=".33em">{told}</text>')
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
        for tick, told in zip(self.along.ticks, numbers(self.along.ticks), strict=True):
            x = self.x(tick * self.x_unit)
            parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
            ends = " end" if x > right - 14 else ""
            parts.append(f'<text class="tx{ends}" x="{min(x, right):.1f}" y="{bottom + 16}">{told}</text>')
        middle = (LEFT + right) / 2
        return [*parts, f'<text class="tx name" x="{middle:.0f}" y="{self.height - 4}">{escape(x_label)}</text>']

    def curve(self, curve: Curve) -> list[str]:
        colour = f"c{(curve.colour - 1) % COLOURS + 1}"
        parts = []
        if len(curve.low):
            parts += [f'<path class="band {colour}" d="{d}"/>' for d in self._bands(curve)]
        values = smoothed(curve.y) if curve.smooth else curve.y
        if curve.smooth and not len(curve.low):
            parts.append(f'<path class="raw {colour}" d="{self._line(curve.x, curve.y)}"/>')
        parts.append(f'<path class="line {colour}" d="{self._line(curve.x, values)}"/>')
        if sum(v is not None for v in values) <= 12:
            spots = zip(curve.x, values, strict=True)
            parts += [
                f'<circle class="{colour}" cx="{self.x(x):.1f}" cy="{self.y(v):.1f}" r="2.5"/>'
                for x, v in spots
                if v is not None
            ]
        parts += [f'<path class="bad" d="M{self.x(x):.1f} {TOP}v7m-3.5 -3.5h7"/>' for x in curve.bad]
        return parts

    def _line(self, xs: Sequence[float], ys: Sequence[float | None]) -> str:
        parts, pen = [], "M"
        for x, y in zip(xs, ys, strict=True):
            if y is None:
                pen = "M"
                continue
            parts.append(f"{pen}{self.x(x):.1f} {self.y(y):.1f}")
            pen = "L"
        return "".join(parts)

    def _bands(self, curve: Curve) -> list[str]:
        found, run = [], []
        for x, low, high in [*zip(curve.x, curve.low, curve.high, strict=True), (0.0, None, None)]:
            if low is not None and high is not None:
                run.append((self.x(x), self.y(low), self.y(high)))
                continue
            if len(run) > 1:
                forth = "L".join(f"{x:.1f} {high:.1f}" for x, _, high in run)
                back = "L".join(f"{x:.1f} {low:.1f}" for x, low, _ in reversed(run))
                found.append(f"M{forth}L{back}Z")
            run = []
        return found

    def pointer(self, curves: Sequence[Curve], x_text: Callable[[float], str], stretches: int) -> list[str]:
        """What shows the values where the pointer rests: as many stretches as there is room, or points."""
        longest = max((len(c.x) for c in curves), default=0)
        count = min(stretches, longest)
        if not count:
            return []
        wide = (self.width - LEFT - RIGHT) / count
        top, height = TOP, self.height - TOP - BOTTOM
        parts = []
        for i in range(count):
            middle = self.along.low + (i + 0.5) / count * (self.along.high - self.along.low)
            said = [f"{c.label} {number(v)}" for c in curves if (v := _near(c, middle * self.x_unit)) is not None]
            if said:
                title = escape(f"{x_text(middle * self.x_unit)}: {', '.join(said)}")
                x = LEFT + i * wide
                rect = f'<rect class="p" x="{x:.1f}" y="{top}" width="{wide:.1f}" height="{height}">'
                parts.append(f"{rect}<title>{title}</title></rect>")
        return parts


def _near(curve: Curve, x: float) -> float | None:
    """The value at the point next to x, None outside the curve."""
    if not curve.x or x < curve.x[0] - (curve.x[-1] - curve.x[0]) * 0.02 or x > curve.x[-1] * 1.02:
        return None
    after = min(bisect_left(curve.x, x), len(curve.x) - 1)
    before = max(0, after - 1)
    return curve.y[after if abs(curve.x[after] - x) <= abs(curve.x[before] - x) else before]


def thinned(curve: Curve, most: int) -> Curve:
    """At most ``most`` points: neighbours are merged, and the band keeps their smallest and largest value."""
    every = -(-len(curve.x) // most)
    if every < 2:
        return curve
    y = list(curve.y)
    places = [range(i, min(i + every, len(y))) for i in range(0, len(y), every)]
    lows, highs = curve.low if len(curve.low) else y, curve.high if len(curve.high) else y

    def merged(values: Sequence[float | None], how: Callable[[list[float]], float]) -> list[float | None]:
        known = [[v for i in place if (v := values[i]) is not None] for place in places]
        return [how(found) if found else None for found in known]

    return replace(
        curve,
        x=[curve.x[place[-1]] for place in places],
        y=merged(y, lambda found: sum(found) / len(found)),
        low=merged(lows, min) if len(curve.low) else (),
        high=merged(highs, max) if len(curve.high) else (),
    )


def smoothed(values: Sequence[float | None]) -> list[float | None]:
    """A running mean over a fortieth of the curve, in both directions, so that it lags nowhere."""
    reach = len(values) // 80
    if reach < 1:
        return list(values)
    found: list[float | None] = []
    for i, value in enumerate(values):
        near = min(reach, i, len(values) - 1 - i)
        window = [v for v in values[i - near : i + near + 1] if v is not None]
        found.append(None if value is None else sum(window) / len(window))
    return found
