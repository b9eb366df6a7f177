"""Places where kernels cannot be written, or not be executed."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.jit import ADD, ADD_CUDA, BARE_PACKAGE, call_add, empty_cache, new_process, no_compiler

from lowbit_lightning import kernels
from lowbit_lightning.kernels import compile, dispatch
from lowbit_lightning.kernels.compile import cache
from lowbit_lightning.kernels.cpu import blockwise


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    yield from empty_cache(tmp_path, monkeypatch)


@pytest.fixture
def noexec(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths that start with one of these do not load, as on a mount with noexec."""
    prefixes: list[str] = []
    load = ctypes.CDLL

    def refuse(path: str, **options: Any) -> ctypes.CDLL:
        if str(path).startswith(tuple(prefixes)):
            raise OSError(f"{path}: failed to map segment from shared object")
        return load(path, **options)

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    monkeypatch.setattr(cache, "_noexec", lambda place: str(place).startswith(tuple(prefixes)))
    return prefixes


def test_a_noexec_cache_is_read_into_memory(place: Path, monkeypatch: pytest.MonkeyPatch, noexec: list[str]) -> None:
    noexec += [str(place)]
    with pytest.warns(RuntimeWarning, match=r"cannot be executed.*Set LOWBIT_LIGHTNING_CACHE to .* TMPDIR"):
        call_add(compile.host_library(ADD))
    monkeypatch.setattr(cache, "_warned", False)
    monkeypatch.setattr(cache, "_private", {})
    new_process(monkeypatch)
    no_compiler(monkeypatch)
    with pytest.warns(RuntimeWarning, match="cannot be executed"):
        call_add(compile.host_library(ADD))


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="only Linux has files in memory")
def test_no_directory_lets_kernels_run(place: Path, noexec: list[str]) -> None:
    noexec += [str(place), *map(str, cache.temporary_places())]
    with pytest.warns(RuntimeWarning, match="cannot be executed") as caught:
        first, second = compile.host_library(ADD), compile.host_library(ADD.replace("+ b", "- b"))
    assert len(caught) == 1
    call_add(first)
    with pytest.raises(AssertionError):
        call_add(second)  # each is itself: the loader tells files in memory apart


def test_nothing_can_be_executed(monkeypatch: pytest.MonkeyPatch, noexec: list[str]) -> None:
    noexec += ["/"]
    with pytest.raises(compile.NoPlace, match=r"cannot be executed.*Set LOWBIT_LIGHTNING_CACHE to .* TMPDIR"):
        compile.host_library(ADD)


def test_ops_run_on_the_reference_where_nothing_can_be_executed(
    monkeypatch: pytest.MonkeyPatch, noexec: list[str]
) -> None:
    noexec += ["/"]
    monkeypatch.setattr(dispatch, "_chosen", {})
    monkeypatch.setattr(blockwise, "library", blockwise.library.__wrapped__)
    kernels.reset_calls()
    x = torch.randn(3, 300)
    with pytest.warns(match=r"plain-torch reference on cpu.*Set LOWBIT_LIGHTNING_CACHE") as caught:
        results = [kernels.quantize_blockwise(x), kernels.quantize_blockwise(x)]
    assert len(caught) == 1
    assert kernels.calls() == {("quantize_blockwise", "reference"): 2}
    with kernels.use_backend("reference"):
        assert torch.equal(kernels.quantize_blockwise(x)[0], results[1][0])
    with kernels.use_backend("cpu"), pytest.raises(compile.NoPlace):
        kernels.quantize_blockwise(x)


def test_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only root: not even Python finds a directory for temporary files. CUDA's code needs none."""

    def nowhere() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, "/proc/nowhere")
    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    monkeypatch.setattr(os.path, "isdir", lambda path: False)
    with pytest.raises(compile.NoPlace, match="Set LOWBIT_LIGHTNING_CACHE"):
        compile.host_library(ADD)
    with pytest.warns(RuntimeWarning, match="cannot be created"):
        assert compile.cubin(ADD_CUDA, "sm_90").code.startswith(b"\x7fELF")


@pytest.mark.parametrize("which", ["the cache", "the private directory", "TMPDIR"])
def test_a_cleaner_removes_directories_in_mid_run(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    if which != "the cache":
        place.write_text("a file: the cache cannot be created")
        monkeypatch.setattr(cache, "_warned", True)
    compile.host_library(ADD)
    removed = {"the cache": place, "TMPDIR": tmp_path / "temporary"}.get(which) or next(iter(cache._private.values()))
    shutil.rmtree(removed)
    other = compile.host_library(ADD, flags=("-DOTHER",))
    call_add(other)
    new_process(monkeypatch)
    no_compiler(monkeypatch)
    call_add(compile.host_library(ADD, flags=("-DOTHER",)))


def test_the_compiler_finds_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = compile.host_compiler()[0]
    small = tmp_path / "small"
    small.mkdir()
    fake = tmp_path / "c++"
    fake.write_text(
        f'#!/bin/sh\ncase "$TMPDIR" in {small}/*) echo "$TMPDIR: No space left on device" >&2; exit 1;; esac\n'
        f'exec {real} "$@"\n'
    )
    fake.chmod(0o700)
    monkeypatch.setenv("CXX", str(fake))
    monkeypatch.setattr(tempfile, "tempdir", str(small))
    call_add(compile.host_library(ADD))


@pytest.mark.skipif(not shutil.which("unshare"), reason="mounts a file system in a namespace of its own")
def test_a_real_noexec_mount(tmp_path: Path) -> None:
    script = f"""
        import ctypes, sys, warnings
        {BARE_PACKAGE}
        from lowbit_lightning.kernels import compile
        from lowbit_lightning.kernels.compile import cache
        with warnings.catch_warnings(record=True) as caught:
            library = compile.host_library('extern "C" int seven() {{ return 7; }}')
        assert library.seven() == 7 and len(caught) == 1 and "TMPDIR" in str(caught[0].message), caught
    """
    places = {name: tmp_path / name for name in ("cache", "temporary")}
    mounts = "".join(
        f"mkdir {place} && mount -t tmpfs -o noexec,mode=700 none {place} && " for place in places.values()
    )
    inner = f"{mounts} exec {sys.executable} -c {shlex.quote(textwrap.dedent(script))}"
    environment = {cache.ENVIRONMENT_VARIABLE: str(places["cache"]), "TMPDIR": str(places["temporary"])}
    if subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(tmp_path)], capture_output=True
    ).returncode:
        pytest.skip("this system lets no user mount")
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", inner], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
