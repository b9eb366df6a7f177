"""What a run should show and keep: exact resumption.

``resume``: ``DeterministicResume``.
"""

from lowbit_lightning.callbacks.resume import DeterministicResume

__all__ = ["DeterministicResume"]
