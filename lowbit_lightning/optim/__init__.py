"""Optimizers whose states are kept in 8 bits, with torch.optim's signatures and semantics."""

from lowbit_lightning.optim import family
from lowbit_lightning.optim.base import LowBitOptimizer
from lowbit_lightning.optim.convert import convert_, group_parameters
from lowbit_lightning.optim.family import *  # noqa: F403  (its __all__: a new optimizer is named there)
from lowbit_lightning.optim.options import Options
from lowbit_lightning.optim.release import release_gradients

__all__ = ["LowBitOptimizer", "Options", "convert_", "group_parameters", "release_gradients"]
__all__ += family.__all__
