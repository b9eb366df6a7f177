"""How an op becomes one of torch's, in the namespace ``lowbit_lightning``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("lowbit_lightning", "DEF")


def register(name: str, schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define ``torch.ops.lowbit_lightning.NAME``. ``schema``: its arguments and results, with what it mutates;
    ``fake`` gives results of the right shapes and dtypes without computing."""
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lowbit_lightning::{name}", fake, lib=_library)
