"""What the tests of the JIT share: two vector additions, an empty cache, processes without the rest of the package."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lowbit_lightning.kernels import compile
from lowbit_lightning.kernels.compile import cache

ADD = r"""
extern "C" void add(long n, const float* a, const float* b, float* out) {
    for (long i = 0; i < n; i++) out[i] = a[i] + b[i];
}
"""

ADD_CUDA = r"""
extern "C" __global__ void add(int n, const float* a, const float* b, float* out) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = a[i] + b[i];
}
"""


def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """For a fixture: the folder of an empty cache, and a process that remembers nothing of earlier ones."""
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(compile, "_libraries", {})
    monkeypatch.setattr(cache, "_warned", False)
    monkeypatch.setattr(cache, "_private", {})
    yield tmp_path / "cache"
    for (process, _), private in cache._private.items():
        cache._remove(process, private)


def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile, "_libraries", {})


def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on a compilation fails the test: what is asked for must come from the cache."""

    def refuse(*args: object) -> bytes:
        raise AssertionError("compiled again")

    monkeypatch.setattr(compile, "_compile_host", refuse)
    monkeypatch.setattr(compile, "_compile_cuda", refuse)


def call_add(library: ctypes.CDLL) -> None:
    a, b, out = np.arange(5, dtype="f4"), np.full(5, 10, "f4"), np.zeros(5, "f4")
    library.add(ctypes.c_long(5), *(ctypes.c_void_p(x.ctypes.data) for x in (a, b, out)))
    np.testing.assert_array_equal(out, a + b)


# The package without its __init__ files, which import torch and Lightning: what a subprocess here does not need.
BARE_PACKAGE = "\n        ".join(
    ["import types"]
    + [
        f"m = sys.modules[{name!r}] = types.ModuleType({name!r}); m.__path__ = [{str(path)!r}]"
        for name, path in (
            ("lowbit_lightning", compile.SOURCES.parents[1]),
            ("lowbit_lightning.kernels", compile.SOURCES.parent),
        )
    ]
)


def python(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
