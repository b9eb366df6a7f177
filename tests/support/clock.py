"""What a clock says of int8 in tests: every layer is twice as fast, however busy the machine is."""

from __future__ import annotations

from typing import Any

from lowbit_lightning.layers import speed
from lowbit_lightning.layers.speed import Times


def stop() -> None:
    """In this process, for good."""
    speed.times = _int8_is_faster  # type: ignore[assignment]


def _int8_is_faster(shape: Any, device: Any) -> Times:
    return Times(1.0, 2.0)
