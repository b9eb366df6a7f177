"""Bytes per device of a training run, before anything of it is allocated.

``plan(model, Run(...))``, or ``plan(model, world_size=8, ...)``, says what parameters, gradients, optimizer states,
copies for communication, int8 weight forms and activations take, for a model that may lie on the meta device.
docs/memory.md says what is exact and what is estimated.
"""

from lowbit_lightning.memory.planner import plan
from lowbit_lightning.memory.result import Advice, Plan
from lowbit_lightning.memory.run import Run

__all__ = ["Advice", "Plan", "Run", "plan"]
