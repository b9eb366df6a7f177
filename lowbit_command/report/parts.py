"""Pieces of a page: the document, tables, tiles, bars. All text that comes from outside is escaped here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from lowbit_command.report.style import CSS

POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def document(title: str, body: str, data: str) -> str:
    """A whole page, which loads nothing: ``data`` is JSON that it carries along."""
    inert = data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body><main>{body}</main>"
        f'<script type="application/json" id="data">{inert}</script></body></html>\n'
    )


def tag(name: str, inside: str, css: str = "") -> str:
    """An element; ``inside`` is HTML."""
    return f'<{name} class="{css}">{inside}</{name}>' if css else f"<{name}>{inside}</{name}>"


def card(title: str, inside: str, note: str = "", css: str = "") -> str:
    """A box with a title."""
    small = f"<small>{escape(note)}</small>" if note else ""
    return tag("section", f"<h3><span>{escape(title)}</span>{small}</h3>{inside}", f"card {css}".strip())


def tiles(values: Iterable[tuple[str, str]]) -> str:
    """Large numbers with what they are of."""
    return tag(
        "div",
        "".join(f'<div class="tile"><b>{escape(v)}</b><span>{escape(k)}</span></div>' for k, v in values),
        "tiles",
    )


def table(
    head: Sequence[str], rows: Iterable[Sequence[Any]], numbers: Iterable[int] = (), css: str = "", scroll: bool = False
) -> str:
    """``numbers``: columns that are aligned to the right. A cell that is ``Html`` is put in as it is. ``css="fold"``:
    on a narrow page a row is a block: its first cell, and below it the others, each under the head of its column."""
    right = set(numbers)
    names = [escape(re.sub("<[^>]*>", "", name) if isinstance(name, Html) else name) for name in head]

    def line(cells: Sequence[Any], kind: str) -> str:
        out = []
        for i, value in enumerate(cells):
            of = "n" if i in right else value.css if isinstance(value, Html) else ""
            text = str(value) if isinstance(value, Html) else escape(str(value))
            above = f' data-head="{names[i]}"' if css == "fold" and kind == "td" and i and head else ""
            out.append(f"<{kind}{f' class={of}' if of else ''}{above}>{text}</{kind}>")
        return f"<tr{' class=head' if kind == 'th' else ''}>{''.join(out)}</tr>"

    top = line(head, "th") if head else ""
    made = f'<table class="{css}">{top}{"".join(line(row, "td") for row in rows)}</table>'
    return tag("div", made, "scroll") if scroll else made


class Html(str):
    """Text that is HTML already. ``css``: the class of its cell."""

    css = ""

    @classmethod
    def cell(cls, text: str, css: str) -> Html:
        made = cls(text)
        made.css = css
        return made


def meter(share: float, colour: int = 1) -> Html:
    """A bar that is filled to a share of its length."""
    filled = f'<span class="meter c{colour}"><i style="width:{100 * min(1, max(0, share)):.1f}%"></i></span>'
    return Html.cell(filled, "bar")


def stack(parts: Sequence[tuple[str, float, int]], text: Any) -> str:
    """Label, size and colour of each part, side by side in one bar, and a legend below."""
    bars = "".join(
        f'<i class="c{colour}" style="flex:{size:.4g}" title="{escape(f"{label}: {text(size)}")}"></i>'
        for label, size, colour in parts
        if size > 0
    )
    return f'<div class="stack">{bars}</div>' + legend([(label, colour) for label, _, colour in parts])


def legend(entries: Iterable[tuple[str, int]]) -> str:
    items = "".join(f'<li class="c{c}"><i></i><span>{escape(label)}</span></li>' for label, c in entries)
    return tag("ul", items, "legend")


def key(colour: int, label: str) -> Html:
    """A cell with the colour of a curve."""
    return Html(f'<i class="key c{colour}"></i>{escape(label)}')


def folded(title: str, inside: str) -> str:
    """What is shown on a click."""
    return f'<details class="card"><summary>{escape(title)}</summary>{inside}</details>'


def facts(values: Mapping[str, Any]) -> str:
    """Names and values in two columns."""
    return table((), [(Html.cell(escape(k), "k"), str(v)) for k, v in values.items()], css="fold")
