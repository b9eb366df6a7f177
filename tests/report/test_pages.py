"""Curves in bounded memory, charts, and the pages of one run and of several."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from support.report_records import HOSTILE, example

from lowbit_command import main
from lowbit_command.report import Record, Series
from lowbit_command.report.chart import Curve, axis, draw, duration, number, numbers, round_numbers, thinned
from lowbit_command.report.compare import compare
from lowbit_command.report.differences import differing, flat
from lowbit_command.report.page import page
from lowbit_command.report.record import FILE, load, plain
from lowbit_command.report.series import MOST


@pytest.fixture(scope="module")
def record() -> Record:
    return example()


@pytest.fixture(scope="module")
def html(record: Record) -> str:
    return page(record)


class Reader(HTMLParser):
    """Tags with their attributes, and the text of the page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "line", "path", "br", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            assert self.open.pop() == tag, f"{tag} closes what it did not open"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text += data + " "


# -- curves -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, MOST - 1, MOST, MOST + 1, 10 * MOST + 3])
def test_a_series_is_bounded_and_keeps_extremes(count: int) -> None:
    series, values = Series(), [math.sin(i / 50) + (7 if i == count // 2 else 0) for i in range(count)]
    for i, value in enumerate(values):
        series.add(i, i * 0.5, value)
    assert len(series.steps) <= MOST
    assert len(series.steps) >= min(count, MOST // 2)
    assert series.steps[-1] == count - 1
    assert series.seconds[-1] == (count - 1) * 0.5
    assert max(v for v in series.high if v is not None) == max(values)
    assert min(v for v in series.low if v is not None) == min(values)
    weights = [b - a for a, b in zip([-1, *series.steps], series.steps, strict=False)]
    mean = sum(w * m for w, m in zip(weights, series.mean, strict=True) if m is not None) / count
    assert mean == pytest.approx(sum(values) / count, rel=1e-9)
    assert Series.of(json.loads(json.dumps(series.to_dict()))).steps == series.steps


def test_values_that_are_not_finite_are_kept_apart() -> None:
    series = Series()
    for i in range(3 * MOST):
        series.add(i, i, math.nan if i in (5, 6) or i > 2 * MOST else 1.0)
    assert series.nonfinite[:3] == [5, 6, 2 * MOST + 1]
    assert series.last() == series.median() == 1.0
    assert series.end() is None, "the newest is not finite"
    assert series.mean[-1] is None
    assert "NaN" not in json.dumps(series.to_dict(), allow_nan=False)


def test_a_series_goes_on_where_a_run_is_resumed() -> None:
    series = Series()
    for i in range(100):
        series.add(i, float(i), 1.0)
    series = series.until(49)
    assert series.steps == list(range(50))
    series.add(50, 50.0, 2.0)
    assert series.steps[-1] == 50
    assert series.mean[-2:] == [1.0, 2.0]


# -- charts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 17), (1e-9, 2e-9), (999, 1001), (0, 3e12), (2.0, 2.0)])
def test_ticks_are_round_few_and_inside(low: float, high: float) -> None:
    ticks = round_numbers(low, high, 6)
    assert 1 <= len(ticks) <= 7
    assert all(low - 1e-9 * abs(low) <= t <= high + 1e-9 * abs(high) for t in ticks)
    assert len(set(numbers(ticks))) == len(ticks), "labels differ"


def test_an_axis_is_logarithmic_where_values_span_much() -> None:
    assert axis([1e-4, 3.0], 6, None).log
    assert not axis([1.0, 3.0], 6, None).log
    assert not axis([-1.0, 300.0], 6, None).log
    found = axis([1e-4, 3.0], 6, None)
    assert 0 <= found.at(1e-4) < found.at(1e-2) < found.at(3.0) <= 1
    assert len(found.ticks) >= 2


def test_numbers_and_times_are_short() -> None:
    assert [number(v) for v in (0, 3, 2.3456, 12345, 1.5e6, 3e-5, 0.0031, -7e9)] == [
        *("0", "3", "2.346", "12.35k", "1.5M", "3e-5", "0.0031", "-7G")
    ]
    assert [duration(v) for v in (0.5, 45, 725, 7200, 12000)] == ["0.5 s", "45 s", "12 min 5 s", "2 h", "3 h 20 min"]


@pytest.mark.parametrize("values", [[], [1.0], [2.0, 2.0], [None, None], [1.0, None, 3.0], [1e-30, 1e30], [-5.0] * 900])
def test_charts_of_all_kinds_of_values_are_drawn_inside_their_frame(values: list[float | None]) -> None:
    xs = [float(i) for i in range(len(values))]
    for log in (False, None):
        svg = draw([Curve("a <b>", xs, values, smooth=True, bad=xs[:1])], (400, 200), "step", log=log)
        tree = ElementTree.fromstring(svg)
        for element in tree.iter():
            for name, most in (("x", 400), ("x1", 400), ("x2", 400), ("y", 200), ("y1", 200), ("y2", 200), ("cy", 200)):
                if name in element.attrib:
                    assert -0.5 <= float(element.attrib[name]) <= most + 0.5, element.attrib
            numbers = [float(n) for n in re.findall(r"-?\d+\.?\d*", element.get("d", "").partition("v")[0])]
            assert all(-0.5 <= n <= 400.5 for n in numbers)


def test_thinning_keeps_the_band_and_the_mean() -> None:
    xs = [float(i) for i in range(1000)]
    thin = thinned(Curve("a", xs, xs, low=[x - 1 for x in xs], high=[x + 9 * (x == 500) for x in xs]), 100)
    assert len(thin.x) == len(thin.y) == 100
    assert max(v for v in thin.high if v is not None) == 999
    assert thin.high[50] == 509
    assert thin.low[0] == -1
    assert thin.y[0] == 4.5


# -- pages ------------------------------------------------------------------------------------------------------------


def test_a_page_is_whole_small_and_loads_nothing(html: str) -> None:
    reader = Reader(html)
    assert not reader.open, "every tag is closed"
    assert len(html.encode()) < 170_000
    policy = next(a["content"] for tag, a in reader.tags if tag == "meta" and "content" in a)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    for tag, attributes in reader.tags:
        assert tag not in ("link", "img", "iframe", "object", "base")
        assert not {"src", "href", "onclick", "onload"} & set(attributes), (tag, attributes)
        assert tag != "script" or attributes["type"] == "application/json"
    assert not re.search(r"url\(|@import|https?://", html)


def test_a_page_shows_all_that_was_recorded(html: str) -> None:
    text = " ".join(Reader(html).text.split())
    for words in (
        *("gpt-small", "finished", "resumed once", "Loss by step", "Loss by time", "Samples per second", "val_loss"),
        *("Learning rate", "Memory by kind", "exp_avg: codes and scales", "activations and temporary", "84,934,656"),
        *("lowbit_embedding", "reference", "transformer.h.11.mlp.c_proj", "17.3", "Codes of exp_avg_sq"),
        *("Differences to the previous run", "optimizer.init_args.lr", "0.0003", "0.0006", "NVIDIA H200", "efa69c2"),
    ):
        assert words in text, words


def test_text_of_a_config_stays_text(html: str, record: Record) -> None:
    assert HOSTILE in Reader(html).text
    assert HOSTILE not in html
    bad = Record(name=HOSTILE, folder=HOSTILE, status="failed", error={"type": HOSTILE, "message": "</main>" + HOSTILE})
    bad.ops, bad.notes, bad.layers = [[HOSTILE, HOSTILE, 1]], [HOSTILE], {HOSTILE: {HOSTILE: 30.0}}
    bad.curve(HOSTILE).add(1, 1.0, 1.0)
    bad.curve("loss").add(1, 1.0, 1.0)
    for made in (page(bad), compare([bad, record])):
        assert HOSTILE not in made
        assert not Reader(made).open


def test_the_data_of_a_page_is_the_record(html: str, record: Record) -> None:
    told = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    assert told
    assert json.loads(told[1]) == json.loads(record.text())
    assert Record.of(json.loads(told[1])).text() == record.text()


@pytest.mark.parametrize("status", ["running", "interrupted", "failed", "finished"])
def test_a_run_of_no_steps_has_a_page(status: str) -> None:
    error = {"type": "ValueError", "message": "no data", "traceback": "line 1\nline 2"} if status == "failed" else {}
    text = Reader(page(Record(status=status, error=error))).text
    assert status in text
    assert ("no data" in text) == (status == "failed")


def test_several_runs_side_by_side(record: Record) -> None:
    other, third = example(seed=1, bits=32), example(seed=2, name="gpt-nf4", steps=900)
    text = " ".join(Reader(compare([record, other, third])).text.split())
    for words in ("3 runs", "gpt-small/2026-11-30-16-01", "optimizer.init_args.bits", "242 MiB", "965 MiB", "69 %"):
        assert words in text, words
    assert "trainer.precision" not in text, "what is alike is not listed"
    with pytest.raises(ValueError, match="2 to 6 runs can be compared, got 1"):
        compare([record])


def test_differences_of_configurations() -> None:
    before, now = {"a": 1, "b": {"c": [1, 2], "d": None}}, {"a": 1.0, "b": {"c": [1, 3]}, "e": [{"f": True}]}
    assert differing([before, now]) == {"b.c": ["[1, 2]", "[1, 3]"], "b.d": ["null", "–"], "e[0].f": ["–", "true"]}
    assert flat({"a": {}}) == {}


def test_what_is_no_json_becomes_text() -> None:
    assert plain({1: {2, 1}, "x": (math.inf, Path("a"), True)}) == {"1": ["1", "2"], "x": ["inf", "a", True]}


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, record: Record, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for i, made in enumerate((record, example(seed=1))):
        (tmp_path / "runs" / str(i)).mkdir(parents=True)
        (tmp_path / "runs" / str(i) / FILE).write_text(made.text())
    monkeypatch.chdir(tmp_path)
    assert main(["report", "runs/0", "runs/1/report.json", "-o", "both.html"]) == 0
    assert capsys.readouterr().out == "both.html\n"
    assert "2 runs" in (tmp_path / "both.html").read_text()
    assert main(["report", "runs/0"]) == 0
    assert (tmp_path / "report.html").read_text() == page(load("runs/0"))
    assert load("runs").name == "gpt-small", "the newest of a folder of runs"


@pytest.mark.parametrize(("content", "words"), [
    (None, "holds no report.json"), ("{", "is no report of a run"), ("[]", "version 1 is needed, got 'list'"),
    ('{"version": 7}', "got 7"),
])  # fmt: skip
def test_what_is_no_report_is_named(tmp_path: Path, content: str | None, words: str, capsys: Any) -> None:
    if content is not None:
        (tmp_path / FILE).write_text(content)
    assert main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert str(tmp_path) in error
    assert error.count("\n") == 1
