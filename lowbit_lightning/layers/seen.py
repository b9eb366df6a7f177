"""What a layer has last been trained on: the sizes at which ``speed`` times it.

Layers note it in each training forward, except inside ``torch.compile``, where a forward may not write to its module.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Terms(NamedTuple):
    """What decides how long a layer takes beside sizes: the dtype that it computed in ("torch.bfloat16"), that of its
    weight (another one under autocast), and whether its input and its weight need gradients."""

    dtype: str
    weight: str
    input_grad: bool
    weight_grad: bool

    @classmethod
    def of(cls, x: Tensor, weight: Tensor) -> Terms:
        """Of a forward with the input x, in the dtype that it computes in."""
        return cls(str(x.dtype), str(weight.dtype), x.requires_grad, weight.requires_grad)


class MatmulSeen(NamedTuple):
    """A product of rows ``[rows, inputs]`` with a matrix ``[outputs, inputs]``."""

    rows: int
    inputs: int
    outputs: int
    terms: Terms


class ImagesSeen(NamedTuple):
    """The images of a convolution: how many, their size, their memory format."""

    images: int
    size: tuple[int, ...]
    channels_last: bool
    terms: Terms


class ExpertsSeen(NamedTuple):
    """The rows, (token, expert) pairs, of all experts together."""

    rows: int
    terms: Terms


def is_noted() -> bool:
    """Whether a forward notes what it sees: one that trains, and is not being compiled."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()
