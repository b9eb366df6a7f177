"""Bar charts as SVG, with nothing but the standard library: panels one below the other, so that a chart stays legible
on a narrow screen. README's picture and the reports of ``run_all.py`` are drawn here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from html import escape

COLORS = {
    "light": {"text": "#1f2328", "quiet": "#59636e", "rival": "#c3ccd6", "ours": "#5b5bd6"},
    "dark": {"text": "#e6edf3", "quiet": "#9198a1", "rival": "#4a5563", "ours": "#8b8df2"},
}
WIDTH, LABELS, BAR, STEP_DOWN = 560, 200, 18, 25
FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"


@dataclass
class Panel:
    """Bars of one unit. ``bars``: label, value, and whether it is ours."""

    title: str
    note: str
    unit: str
    bars: list[tuple[str, float, bool]]

    def described(self) -> str:
        return f"{self.title}: " + ", ".join(f"{label} {short(value)} {self.unit}" for label, value, _ in self.bars)


def draw(panels: list[Panel], theme: str, ground: str | None = None) -> str:
    """The panels in the colours of ``theme``, on a ``ground`` of that colour or on the page's own."""
    colors, y, parts = COLORS[theme], 22, []
    for panel in panels:
        parts.append(
            f'<text x="0" y="{y}" fill="{colors["text"]}" font-size="16" font-weight="600">{escape(panel.title)}'
            f'<tspan fill="{colors["quiet"]}" font-size="13" font-weight="400" dx="8">{escape(panel.note)}</tspan>'
            "</text>"
        )
        y += 12
        longest = max(value for _, value, _ in panel.bars)
        for label, value, ours in panel.bars:
            width = max(3, round((WIDTH - LABELS - 90) * value / longest))
            middle, weight = y + BAR - 5, 600 if ours else 400
            fill = colors["ours" if ours else "rival"]
            parts += [
                f'<text x="0" y="{middle}" fill="{colors["text"]}" font-size="14" font-weight="{weight}">'
                f"{escape(label)}</text>",
                f'<rect x="{LABELS}" y="{y}" width="{width}" height="{BAR}" rx="3" fill="{fill}"/>',
                f'<text x="{LABELS + width + 8}" y="{middle}" fill="{colors["text"]}" font-size="14"'
                f' font-weight="{weight}">{short(value)} {panel.unit}</text>',
            ]
            y += STEP_DOWN
        y += 30
    return _wrapped(parts, "; ".join(panel.described() for panel in panels), y - 30, ground)


def _wrapped(parts: list[str], title: str, height: int, ground: str | None) -> str:
    margin = 20 if ground else 0
    box = f"{-margin} {-margin} {WIDTH + 2 * margin} {height + 2 * margin}"
    size = f'width="{WIDTH + 2 * margin}" height="{height + 2 * margin}"'
    paper = f'<rect x="{-margin}" y="{-margin}" {size} rx="8" fill="{ground}"/>'
    opened = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" {size} role="img" font-family="{FONT}">'
    return "\n".join([opened, f"<title>{escape(title)}</title>", *[paper] * bool(ground), *parts, "</svg>", ""])


def short(value: float) -> str:
    """Three digits, or all that stand before the point."""
    text = f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"
    return re.sub(r"\.0+$", "", text)
