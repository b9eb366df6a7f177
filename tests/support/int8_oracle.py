"""An independent oracle for the int8 quantisers in NumPy, and the backends to try it on.

It knows the definition and none of the code.
"""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
COMPILER = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), os.environ.get("CXX"))
needs_compiler = pytest.mark.skipif(not COMPILER, reason="no C++ compiler: there is no CPU backend to test")
BACKENDS = [pytest.param("reference"), pytest.param("cpu", marks=needs_compiler)]


def expected_rowwise(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """int8 values and float32 scales of the rows of ``x``, one row at a time."""
    rows = x.float().numpy()
    q, scales = np.zeros(rows.shape, np.int8), np.zeros(rows.shape[0], np.float32)
    for i, row in enumerate(rows):
        absmax = np.abs(row).max(initial=np.float32(0))
        if not np.isfinite(row).all():
            scales[i] = np.nan
        elif absmax >= np.float32(2.0**-120):
            scales[i] = absmax / np.float32(127)
            q[i] = np.rint(row * (np.float32(127) / absmax)).clip(-127, 127)
    return q, scales


def assert_same(actual: Tensor, expected: Tensor | np.ndarray) -> None:
    """Equal to the bit, any NaN being equal to any other; names the first difference."""
    expected = torch.as_tensor(expected)
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    wrong = ((actual != expected) & ~(actual.isnan() & expected.isnan())).nonzero()
    if len(wrong):
        where = tuple(wrong[0].tolist())
        got, wanted = actual[where].item(), expected[where].item()
        pytest.fail(f"{len(wrong)} of {actual.numel()} differ, first at {where}: {got!r}, not {wanted!r}")


def scaled_sums(exact: np.ndarray, a_scales: Tensor, b_scales: Tensor) -> np.ndarray:
    """float32 of exact sums ``[M, N]`` times both scales, the smaller first; NaN where either is."""
    a, b = a_scales.numpy()[:, None], b_scales.numpy()
    with np.errstate(over="ignore", invalid="ignore"):
        return exact.astype(np.float32) * np.minimum(a, b) * np.maximum(a, b)
