"""Draws README's picture from the reports in docs/benchmarks: ``python docs/images/draw.py``.

Two files, ``gain-light.svg`` and ``gain-dark.svg``, differ in their colours only. A test draws them again and compares.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "benchmarks"))

from _bars import COLORS, Panel, draw  # noqa: E402

REPORTS = HERE.parent / "benchmarks"
STEP = "2026-11-22-optimizer-step-cpu.md"
TRAINING = "2026-11-30-default-precision-cpu.md"
BILLIONS, ADAMW_BYTES = 7, (8, 2 + 2 * 4 / 256)  # of the state per parameter: two floats; two codes and their scales
MEASURED = "measured on two CPU cores"
STEPS = {
    "bitsandbytes AdamW8bit": "bitsandbytes, 8 bits",
    "torchao AdamW8bit": "torchao, 8 bits",
    "torch AdamW fused": "torch fused, 32 bits",
    "AdamW 8 bits": "lowbit_lightning, 8 bits",
}


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
    state = [("torch.optim.AdamW", torch, False), ("lowbit_lightning", ours, True)]
    training = [
        (name, column(TRAINING, "vit", name), name == "int8-mixed") for name in ("32-true", "bf16-mixed", "int8-mixed")
    ]
    steps = [(label, column(STEP, "big", name), name == "AdamW 8 bits") for name, label in STEPS.items()]
    return [
        Panel(f"AdamW state of a {BILLIONS} B model", "computed from the format", "GB", state),
        Panel("Training step of a ViT-S", MEASURED, "ms", training),
        Panel("AdamW step, 67 M parameters", MEASURED, "ms", steps),
    ]


def pictures() -> dict[Path, str]:
    """File -> what it holds."""
    return {HERE / f"gain-{theme}.svg": draw(panels(), theme) for theme in COLORS}


if __name__ == "__main__":
    for file, text in pictures().items():
        file.write_text(text)
