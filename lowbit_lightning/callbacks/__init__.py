"""Callbacks: exact resumption, the error of low-bit arithmetic, and a report of the run.

``resume``: ``DeterministicResume``, with ``loaders`` (which it can resume) and ``random_states``. ``monitor``:
``LowBitMonitor``, with ``sample`` (its hooks), ``quantization`` (what it measures), ``paging`` and ``picture``.
``report``: ``RunReport``, with ``observed`` (what it finds out); ``lowbit_command.report`` has its pages.
"""

from lowbit_lightning.callbacks.monitor import LowBitMonitor
from lowbit_lightning.callbacks.report import RunReport
from lowbit_lightning.callbacks.resume import DeterministicResume

__all__ = ["DeterministicResume", "LowBitMonitor", "RunReport"]
