"""A curve in bounded memory: the smallest, largest and mean value of each stretch of steps.

A stretch is ``every`` points. When there are ``MOST`` stretches, neighbours are merged and ``every`` is doubled, so a
run of any length keeps between half of ``MOST`` and ``MOST`` of them, and no peak is lost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MOST = 400
DIGITS = 5


@dataclass
class Series:
    """``steps``, ``seconds``: of the last point of each stretch; ``low``, ``high``, ``mean``: None where no value of
    the stretch is finite. ``nonfinite``: the first steps with a value that is not finite."""

    unit: str = ""
    every: int = 1
    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    low: list[float | None] = field(default_factory=list)
    high: list[float | None] = field(default_factory=list)
    mean: list[float | None] = field(default_factory=list)
    nonfinite: list[int] = field(default_factory=list)
    open: int = 0
    """Points in the last stretch."""

    def add(self, step: int, seconds: float, value: float) -> None:
        """Append a point; steps do not decrease."""
        number = value if math.isfinite(value) else None
        if number is None and len(self.nonfinite) < 20:
            self.nonfinite.append(step)
        if self.steps and 0 < self.open < self.every:
            self._extend(step, seconds, number)
        else:
            if len(self.steps) >= MOST:
                self._halve()
            self.steps.append(step)
            self.seconds.append(seconds)
            for values in (self.low, self.high, self.mean):
                values.append(number)
            self.open = 0
        self.open += 1

    def _extend(self, step: int, seconds: float, value: float | None) -> None:
        self.steps[-1], self.seconds[-1] = step, seconds
        if value is None:
            return
        low, high, mean = self.low[-1], self.high[-1], self.mean[-1]
        if low is None or high is None or mean is None:
            self.low[-1] = self.high[-1] = self.mean[-1] = value
            return
        self.low[-1], self.high[-1] = min(low, value), max(high, value)
        self.mean[-1] = mean + (value - mean) / (self.open + 1)

    def _halve(self) -> None:
        pairs = [(i, min(i + 1, len(self.steps) - 1)) for i in range(0, len(self.steps), 2)]
        self.steps = [self.steps[j] for _, j in pairs]
        self.seconds = [self.seconds[j] for _, j in pairs]
        self.low = [_of(min, self.low[i], self.low[j]) for i, j in pairs]
        self.high = [_of(max, self.high[i], self.high[j]) for i, j in pairs]
        self.mean = [_of(lambda a, b: (a + b) / 2, self.mean[i], self.mean[j]) for i, j in pairs]
        self.every *= 2
        self.open = self.every

    def until(self, step: int) -> Series:
        """The part up to a step, for a run that goes on from there."""
        kept = sum(s <= step for s in self.steps)
        return Series(
            unit=self.unit,
            every=self.every,
            steps=self.steps[:kept],
            seconds=self.seconds[:kept],
            low=self.low[:kept],
            high=self.high[:kept],
            mean=self.mean[:kept],
            nonfinite=[s for s in self.nonfinite if s <= step],
            open=self.every,
        )

    def last(self) -> float | None:
        """The newest finite value."""
        return next((value for value in reversed(self.mean) if value is not None), None)

    def end(self) -> float | None:
        """The mean of the last twentieth; None where the newest value is not finite."""
        if not self.mean or self.mean[-1] is None:
            return None
        values = [value for value in self.mean[-max(1, len(self.mean) // 20) :] if value is not None]
        return sum(values) / len(values)

    def median(self) -> float | None:
        """Of the stretches' means."""
        values = sorted(value for value in self.mean if value is not None)
        return values[len(values) // 2] if values else None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON; ``low`` and ``high`` are left out where they equal ``mean``."""
        told: dict[str, Any] = {"unit": self.unit, "every": self.every, "steps": self.steps}
        told["seconds"] = [round(s, 3) for s in self.seconds]
        told["mean"] = _rounded(self.mean)
        if self.low != self.mean or self.high != self.mean:
            told |= {"low": _rounded(self.low), "high": _rounded(self.high)}
        return told | ({"nonfinite": self.nonfinite} if self.nonfinite else {})

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Series:
        """What ``to_dict`` gave."""
        mean = list(told["mean"])
        return cls(
            unit=told["unit"],
            every=told["every"],
            steps=list(told["steps"]),
            seconds=list(told["seconds"]),
            low=list(told.get("low", mean)),
            high=list(told.get("high", mean)),
            mean=mean,
            nonfinite=list(told.get("nonfinite", ())),
            open=told["every"],
        )


def _of(choose: Any, a: float | None, b: float | None) -> float | None:
    return b if a is None else a if b is None else choose(a, b)


def _rounded(values: list[float | None]) -> list[float | None]:
    return [None if v is None else float(f"{v:.{DIGITS}g}") for v in values]
