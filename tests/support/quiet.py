"""A Trainer on the CPU, for an epoch, that says nothing and leaves nothing behind."""

from __future__ import annotations

from typing import Any

import lightning as L


def quiet_trainer(**settings: Any) -> L.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return L.Trainer(**{"accelerator": "cpu", "max_epochs": 1, **quiet, **settings})
