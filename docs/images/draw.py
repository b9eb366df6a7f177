"""Draws README's picture from the reports in docs/benchmarks: ``python docs/images/draw.py``.

Two files, ``gain-light.svg`` and ``gain-dark.svg``, differ in their colours only. A test draws them again and compares.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from html import escape
from pathlib import Path

HERE = Path(__file__).parent
REPORTS = HERE.parent / "benchmarks"
STEP = "2026-11-22-optimizer-step-cpu.md"
TRAINING = "2026-11-30-default-precision-cpu.md"
BILLIONS, ADAMW_BYTES = 7, (8, 2 + 2 * 4 / 256)  # of the state per parameter: two floats; two codes and their scales

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
        return f"{self.title}: " + ", ".join(f"{label} {_short(value)} {self.unit}" for label, value, _ in self.bars)


def column(report: str, heading: str, row: str, index: int = 1) -> float:
    """The number in column ``index`` of the row that begins with ``row``, of the first table after ``## heading``."""
    text = (REPORTS / report).read_text()
    _, _, part = text.partition(f"\n## {heading}")
    for line in part.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if cells and cells[0] == row:
            return float(cells[index])
    raise ValueError(f"{report}: no row {row!r} under {heading!r}")


def panels() -> list[Panel]:
    torch, ours = (BILLIONS * size for size in ADAMW_BYTES)
    step = {name: column(STEP, "big", name) for name in STEPS}
    training = {name: column(TRAINING, "vit", name) for name in PRECISIONS}
    return [
        Panel(
            f"AdamW state of a {BILLIONS} B model",
            "computed from the format",
            "GB",
            [("torch.optim.AdamW", torch, False), ("lowbit_lightning", ours, True)],
        ),
        Panel(
            "Training step of a ViT-S",
            "measured on two CPU cores",
            "ms",
            [(PRECISIONS[name], value, name == "int8-mixed") for name, value in training.items()],
        ),
        Panel(
            "AdamW step, 67 M parameters",
            "measured on two CPU cores",
            "ms",
            [(STEPS[name], value, name == "AdamW 8 bits") for name, value in step.items()],
        ),
    ]


PRECISIONS = {"32-true": "32-true", "bf16-mixed": "bf16-mixed", "int8-mixed": "int8-mixed"}
STEPS = {
    "bitsandbytes AdamW8bit": "bitsandbytes, 8 bits",
    "torchao AdamW8bit": "torchao, 8 bits",
    "torch AdamW fused": "torch fused, 32 bits",
    "AdamW 8 bits": "lowbit_lightning, 8 bits",
}


def draw(theme: str) -> str:
    """An SVG of all panels, one below the other, so that it stays legible on a narrow screen."""
    colors, y, parts = COLORS[theme], 22, []
    for panel in panels():
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
                f' font-weight="{weight}">{_short(value)} {panel.unit}</text>',
            ]
            y += STEP_DOWN
        y += 30
    height = y - 30
    described = "; ".join(panel.described() for panel in panels())
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
            f' role="img" font-family="{FONT}">',
            f"<title>{escape(described)}</title>",
            *parts,
            "</svg>",
            "",
        ]
    )


def _short(value: float) -> str:
    text = f"{value:.1f}" if value < 100 else f"{value:,.0f}"
    return re.sub(r"\.0$", "", text)


if __name__ == "__main__":
    for name in COLORS:
        (HERE / f"gain-{name}.svg").write_text(draw(name))
