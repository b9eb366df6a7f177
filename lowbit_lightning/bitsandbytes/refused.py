"""Names of bitsandbytes that are not served: reading one raises an AttributeError that says what to do instead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NoReturn


def refusing(module: str, reasons: Mapping[str, str]) -> Callable[[str], NoReturn]:
    """A module's ``__getattr__``. ``reasons``: name -> what to do instead."""

    def __getattr__(name: str) -> NoReturn:
        if name in reasons:
            raise AttributeError(f"{module}.{name} of bitsandbytes is not served: {reasons[name]}")
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return __getattr__
