"""Optimizers whose states are kept in 8 bits, with torch.optim's signatures and semantics."""

from lowbit_lightning.optim.base import LowBitOptimizer
from lowbit_lightning.optim.convert import convert_, group_parameters
from lowbit_lightning.optim.family import LAMB, LARS, SGD, Adagrad, Adam, AdamW, AdEMAMix, Lion, RMSprop
from lowbit_lightning.optim.options import Options
from lowbit_lightning.optim.release import release_gradients

__all__ = [
    "LAMB",
    "LARS",
    "SGD",
    "AdEMAMix",
    "Adagrad",
    "Adam",
    "AdamW",
    "Lion",
    "LowBitOptimizer",
    "Options",
    "RMSprop",
    "convert_",
    "group_parameters",
    "release_gradients",
]
