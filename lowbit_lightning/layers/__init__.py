"""Drop-in modules. This page explains ``Int8Linear``, an ``nn.Linear`` whose three matmuls run in int8 during training.

How it computes
---------------
A linear layer has three products, each a contraction along its own axis::

    y  = x @ w.T       [M, N] = [M, K] [N, K]^T     contracts the input features K
    dx = dy @ w        [M, K] = [M, N] [K, N]^T     contracts the output features N
    dw = dy.T @ x      [N, K] = [N, M] [K, M]^T     contracts the tokens M

An int8 product is exact in int32, so all error comes from quantising its two operands. A scale can only be taken out
of the sum if it is constant along the contracted axis; so each product quantises both operands along *its own* axis,
with one scale ``absmax / 127`` per row and column that remain. So each of x, w and dy has two int8 forms: by rows for
one product, by columns (transposed) for another. This keeps the error of an element below::

    |error of (a @ b.T)[i, j]| <= (|a_i|_1 s_b + |b_j|_1 s_a) / 2 + K s_a s_b / 4,     s = absmax / 127

(``|.|_1`` is the sum of magnitudes; the error of each operand's element is at most s / 2). On normally distributed data
this is about 1 % of the output's norm.
All three products run as ``A @ B.T`` of two row-major operands, the layout that int8 matrix units need. Therefore the
column-wise quantiser writes its result transposed.

Outliers
--------
An outlier makes the scale of its row large, and the rest of the row coarse. A product stays the same if both operands
are multiplied by one orthogonal matrix along the contracted axis. ``rotation="hadamard"`` does so before quantising,
with a matrix that spreads each value over a block of 64 (``kernels.hadamard``).

When the forms are made
-----------------------
One op makes both forms of a matrix; it reads the matrix less often than two ops would. The forms of x are made in the
forward. The column form is kept for the backward instead of x itself (a byte per element, and the same numbers). The
forms of dy are made in the backward. The row form of a weight is made in each forward and its column form in each
backward. No form of a weight is kept in between, so no form can be stale and FSDP2 can free weights at any time.

The bias is added, and its gradient summed, in float32. What the optimizer sees is unchanged: weights and gradients in
the weight's own dtype.
"""

from lowbit_lightning.layers.attention import Int8MultiheadAttention
from lowbit_lightning.layers.conv import Int8Conv1d, Int8Conv2d, Int8Conv3d
from lowbit_lightning.layers.embedding import (
    Embedding4bit,
    Embedding8bit,
    Embedding32bit,
    LowBitEmbedding,
    StableEmbedding,
)
from lowbit_lightning.layers.int8 import Int8Layer, Int8Linear, Products
from lowbit_lightning.layers.lowbit import Linear2bit, Linear3bit, Linear4bit, Linear8bit, LowBitLinear, Weights
from lowbit_lightning.layers.moe import Experts, Int8Experts, Int8ExpertsForm

__all__ = [
    "Embedding4bit",
    "Embedding8bit",
    "Embedding32bit",
    "Experts",
    "Int8Conv1d",
    "Int8Conv2d",
    "Int8Conv3d",
    "Int8Experts",
    "Int8ExpertsForm",
    "Int8Layer",
    "Int8Linear",
    "Int8MultiheadAttention",
    "Linear2bit",
    "Linear3bit",
    "Linear4bit",
    "Linear8bit",
    "LowBitEmbedding",
    "LowBitLinear",
    "Products",
    "StableEmbedding",
    "Weights",
]
