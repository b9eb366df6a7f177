"""Numbers with units, as people read them."""

from __future__ import annotations


def amount(nbytes: float) -> str:
    """``"63.5 GiB"``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.3g} {unit}" if nbytes < 999.5 else f"{nbytes:.0f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.3g} TiB"
