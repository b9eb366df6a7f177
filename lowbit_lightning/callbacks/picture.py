"""The picture that ``LowBitMonitor`` writes: signal-to-noise ratio by layer and step."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import numpy as np
from lightning.fabric.utilities.cloud_io import get_filesystem

FILE = "int8_snr.png"
MISSING = "matplotlib is not installed: `pip install matplotlib`"
MOST_LABELS = 64


def is_possible() -> bool:
    """Whether matplotlib is installed; does not import it."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(
    folder: str,
    steps: Sequence[int],
    layers: Sequence[str],
    products: Sequence[str],
    snr: np.ndarray,
    minimum: float | None,
) -> None:
    """Write ``FILE``: for each product the lowest ratio of all layers over the steps, and a map of each layer's lowest.

    ``folder``: local, or any that fsspec knows. ``snr [steps, layers, products]``: in dB, NaN where nothing was
    measured. ``minimum``: a threshold to mark.
    """
    from matplotlib.figure import Figure  # without pyplot: no window, no state that outlives the call

    labelled = len(layers) <= MOST_LABELS
    figure = Figure(figsize=(10, 4.5 + 0.18 * min(len(layers), 2 * MOST_LABELS)), layout="constrained")
    heights = [2, 1 + 0.09 * min(len(layers), 2 * MOST_LABELS)]
    lines, heat = figure.subplots(2, 1, gridspec_kw={"height_ratios": heights})
    for i, product in enumerate(products):
        lines.plot(steps, _lowest(snr[:, :, i], axis=1), marker=".", label=product)
    if minimum is not None:
        lines.axhline(minimum, color="black", linestyle="--", linewidth=0.8, label=f"minimum_snr={minimum:g}")
    lines.set(title="int8 products: lowest signal-to-noise ratio of all layers", xlabel="step", ylabel="dB")
    lines.legend()
    values = np.ma.masked_invalid(_lowest(snr, axis=2).T)
    image = heat.pcolormesh(np.arange(len(steps) + 1), np.arange(len(layers) + 1), values, cmap="viridis")
    heat.set_facecolor("lightgrey")
    heat.invert_yaxis()
    every = max(1, len(steps) // 10)
    heat.set_xticks(np.arange(0, len(steps), every) + 0.5, [str(step) for step in steps[::every]])
    heat.set_yticks(np.arange(len(layers)) + 0.5 if labelled else [], layers if labelled else [], fontsize=7)
    heat.set(title="lowest of each layer's products (grey: not measured)", xlabel="step")
    figure.colorbar(image, ax=heat, label="dB")
    filesystem = get_filesystem(folder)
    filesystem.makedirs(folder, exist_ok=True)
    with filesystem.open(f"{folder.rstrip('/')}/{FILE}", "wb") as file:
        figure.savefig(file, format="png", dpi=120)


def _lowest(values: np.ndarray, axis: int) -> np.ndarray:
    """The smallest along an axis, ignoring NaN; NaN if all values are NaN."""
    lowest = np.where(np.isnan(values), np.inf, values).min(axis)
    return np.where(np.isinf(lowest), np.nan, lowest)
