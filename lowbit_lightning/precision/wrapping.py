"""How Lightning's own functions are wrapped: it has no registry for what this package adds to them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def wrap_once(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Make ``owner.NAME(...)`` call ``wrapper(original, ...)``, unless it does so already or there is no such name."""
    original = getattr(owner, name, None)
    if original is None or hasattr(original, "_lowbit_lightning"):
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    wrapped._lowbit_lightning = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)
