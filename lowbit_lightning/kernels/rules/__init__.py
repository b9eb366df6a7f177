"""The optimizers' update rules, one text each, for every backend; ``rule.py`` says what a text may contain.

A new rule is a new file here that defines ``RULES``; no backend changes. Each follows torch.optim in the order of its
operations where torch has the optimizer, and the paper where it has not.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from lowbit_lightning.kernels.rules.rule import Rule, State, fused, power, ratio

_FILES = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__) if module.name != "rule"]
RULES: dict[str, Rule] = {rule.name: rule for file in _FILES for rule in file.RULES}
"""Every rule by name."""


def get(name: str) -> Rule:
    """Raises ValueError for an unknown name."""
    if name not in RULES:
        raise ValueError(f"rule must be one of {sorted(RULES)}, got {name!r}")
    return RULES[name]
