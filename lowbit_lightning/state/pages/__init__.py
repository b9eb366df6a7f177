"""Optimizer states that lie in a far tier of memory and visit the near one for their step."""

from lowbit_lightning.state.pages.transport import Event, Moves, Transport

__all__ = ["Event", "Moves", "Transport"]
