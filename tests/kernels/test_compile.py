"""The JIT and its cache. The two vector additions at the top are the manual of ``compile.py``."""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowbit_lightning import kernels
from lowbit_lightning.kernels import compile, dispatch
from lowbit_lightning.kernels.compile import cache
from lowbit_lightning.kernels.cpu import blockwise

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


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and a process that remembers nothing of earlier ones."""
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


# ---------------------------------------------------------------------------------------------------------------------
# The manual


def test_host_vector_add() -> None:
    call_add(compile.host_library(ADD))


def test_cuda_vector_add() -> None:
    made = compile.cubin(ADD_CUDA, "sm_90")
    assert made.code.startswith(b"\x7fELF")
    add = compile.resources(made.log)["add"]
    assert 4 <= add.registers <= 40
    assert (add.stack, add.spill_stores, add.spill_loads, add.shared) == (0, 0, 0, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Source text


def test_source_text_inlines_our_headers_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile, "SOURCES", tmp_path)
    (tmp_path / "a.h").write_text("#pragma once\nstatic const int A = 1;\n")
    (tmp_path / "b.h").write_text('#include <cstddef>\n#include "a.h"\nstatic const int B = A + 1;\n')
    (tmp_path / "k.cpp").write_text('#include "a.h"\n  #include "b.h"\nextern "C" int value() { return A + B + C; }\n')
    text = compile.source_text("k.cpp", prelude="#define C 4")
    assert text.count("static const int A") == 1
    assert compile.host_library(text).value() == 7


def test_a_message_names_the_file_and_line_of_the_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile, "SOURCES", tmp_path)
    (tmp_path / "a.h").write_text("static const int A = 1;\n")
    (tmp_path / "k.cpp").write_text('// one\n#include "a.h"\n// three\nint broken() { return A + missing; }\n')
    with pytest.raises(compile.CompileError, match=r"k\.cpp:4:"):
        compile.host_library(compile.source_text("k.cpp", prelude="#define X\n#define Y\n"))


# ---------------------------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize(
    ("compiles", "arguments", "flag"),
    [
        (compile.host_library, ("int f() { return undeclared_thing; }",), "-ffp-contract=off"),
        (compile.cubin, ('extern "C" __global__ void f(int* a) { *a = undeclared_thing; }', "sm_90"), "--fmad=false"),
    ],
)
def test_an_error_carries_the_log_and_the_command(compiles: Any, arguments: tuple[str, ...], flag: str) -> None:
    with pytest.raises(compile.CompileError, match="undeclared_thing") as caught:
        compiles(*arguments)
    assert "undeclared_thing" in caught.value.log
    assert flag in caught.value.command


@pytest.mark.parametrize("flags", [(), ("-fmax-errors=20",)], ids=["all errors", "20 at most, as clang++"])
def test_a_long_log_is_shortened_in_the_message_only(flags: tuple[str, ...]) -> None:
    if flags and "clang" in compile._version(compile.host_compiler()):
        flags = ()  # it stops at 20 by itself
    text = "".join(f"int f{i}() {{ return undeclared_{i}; }}\n" for i in range(100))
    with pytest.raises(compile.CompileError) as caught:
        compile.host_library(text, flags=flags)
    log, message = caught.value.log.strip().splitlines(), str(caught.value).splitlines()
    assert "undeclared_0" in log[0] + log[1]
    assert len(log) > 50 > len(message)
    assert message[-40:] == log[-40:]


def test_unknown_architecture_is_a_compile_error() -> None:
    with pytest.raises(compile.CompileError, match="sm_20"):
        compile.cubin(ADD_CUDA, "sm_20")


def test_no_compiler_says_what_was_tried_and_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(compile.CompilerNotFound, match=r"no-such-compiler.*Install g\+\+"):
        compile.host_library(ADD)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(compile.CompilerNotFound, match=r"clang\+\+"):
        compile.host_library(ADD)


def test_no_nvrtc_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core", None)  # importing it raises ImportError
    compile.nvrtc_version.cache_clear()
    with pytest.raises(compile.CompilerNotFound, match="pip install 'cuda-core"):
        compile.cubin(ADD_CUDA, "sm_90")


def test_importing_needs_neither_cuda_python_nor_a_compiler() -> None:
    script = f"""
        import sys
        sys.modules["cuda"] = None
        {_BARE_PACKAGE}
        from lowbit_lightning.kernels.compile import cache
        assert not [m for m in sys.modules if m.startswith("cuda.")]
    """
    done = _python(script, PATH="")
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# The cache: hits and misses


def test_same_text_is_the_same_library_and_a_new_process_compiles_nothing(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = compile.host_library(ADD)
    assert compile.host_library(ADD) is library
    first = compile.cubin(ADD_CUDA, "sm_90")
    assert sorted(p.suffix for p in place.iterdir()) == [".cubin", ".so"]
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    new_process(monkeypatch)
    no_compiler(monkeypatch)
    call_add(compile.host_library(ADD))
    assert compile.cubin(ADD_CUDA, "sm_90") == first


def test_all_that_decides_the_content_is_part_of_the_key(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags, compiler and processor; macros, architecture and NVRTC."""
    compile.host_library(ADD)
    compile.host_library(ADD, flags=("-DX",))
    compile.cubin(ADD_CUDA, "sm_90")
    compile.cubin(ADD_CUDA, "sm_80")
    compile.cubin(ADD_CUDA, "sm_80", flags=("-DX=1",))
    for name, value, again in (
        ("_version", lambda compiler: "another compiler", partial(compile.host_library, ADD)),
        ("processor", lambda: ("another processor",), partial(compile.host_library, ADD)),
        ("nvrtc_version", lambda: "0.0", partial(compile.cubin, ADD_CUDA, "sm_90")),
    ):
        monkeypatch.setattr(compile, name, value)
        again()
    assert sorted(p.suffix for p in place.iterdir()) == 4 * [".cubin"] + 4 * [".so"]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied"])
def test_a_corrupt_entry_is_a_miss_and_is_replaced(place: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    compile.host_library(ADD)
    (entry,) = place.iterdir()
    good = entry.read_bytes()
    bad = {"truncated": good[:-100], "emptied": b"", "flipped": good[:2000] + bytes([good[2000] ^ 1]) + good[2001:]}
    entry.unlink()  # a new file: the process still executes the old one
    entry.write_bytes(bad[damage])
    new_process(monkeypatch)
    call_add(compile.host_library(ADD))
    assert cache.find(entry.name) is not None


def test_an_intact_entry_that_does_not_load_is_compiled_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile.host_library(ADD)
    (entry,) = place.iterdir()
    entry.unlink()
    cache.store(entry.name, b"\x7fELF for some other system")
    new_process(monkeypatch)
    call_add(compile.host_library(ADD))


# ---------------------------------------------------------------------------------------------------------------------
# The cache: what is refused, and what happens then


def assert_works_with_one_warning(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    """Both compilers work, one warning gives the reason, and the substitute is private and used again."""

    def both() -> None:
        call_add(compile.host_library(ADD))
        compile.cubin(ADD_CUDA, "sm_90")

    with pytest.warns(RuntimeWarning, match=reason) as caught:
        both()
    assert len(caught) == 1
    (private,) = cache._private.values()
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert len(list(private.iterdir())) == 2
    new_process(monkeypatch)
    no_compiler(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call_add(compile.host_library(ADD))


@pytest.mark.parametrize("refused", ["of another user", "0770", "0702", "0777", "1777"])
def test_a_directory_that_others_may_write_is_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    compile.host_library(ADD)
    (entry,) = place.iterdir()
    before = entry.stat().st_mtime_ns
    new_process(monkeypatch)
    if refused.isdigit():
        place.chmod(int(refused, 8))
    else:
        give_to_another_user(place, monkeypatch)
    said = f"mode {refused} lets others write it" if refused.isdigit() else "refused: it belongs to user"
    assert_works_with_one_warning(monkeypatch, said)
    assert [p.name for p in place.iterdir()] == [entry.name]
    assert entry.stat().st_mtime_ns == before


@pytest.mark.parametrize("said", ["cannot be created", "no home directory"])
def test_without_a_home_that_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    monkeypatch.delenv(cache.ENVIRONMENT_VARIABLE)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if said == "cannot be created":
        (tmp_path / "home").write_text("a file, in which nobody can write, root included")
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
    else:
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # what it does for a user without an entry
    assert_works_with_one_warning(monkeypatch, said)


def test_a_cache_that_becomes_unwritable(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile.host_library(ADD, flags=("-DEARLIER",))
    monkeypatch.setattr(compile, "_libraries", {})
    make = tempfile.mkstemp

    def full_disk(dir: Path, prefix: str) -> tuple[int, str]:
        if dir == place:
            raise OSError(28, "No space left on device")
        return make(dir=dir, prefix=prefix)

    monkeypatch.setattr(tempfile, "mkstemp", full_disk)
    assert_works_with_one_warning(monkeypatch, "cannot be written .No space left")
    call_add(compile.host_library(ADD, flags=("-DEARLIER",)))  # entries that are there are still good


# ---------------------------------------------------------------------------------------------------------------------
# The cache: what was planted


def give_to_another_user(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:
        os.chown(path, 54321, -1)
        return
    real, planted = cache._why_foreign, path.stat().st_ino
    why = "it belongs to user 54321, this is user 1"
    monkeypatch.setattr(cache, "_why_foreign", lambda info: why if info.st_ino == planted else real(info))


@pytest.mark.parametrize("planted", ["another user's", "0620", "0602", "0777"])
def test_a_planted_kernel_is_never_loaded(place: Path, monkeypatch: pytest.MonkeyPatch, planted: str) -> None:
    """A right checksum and the right name, in a directory that was repaired by chmod."""
    compile.host_library(ADD)
    compile.cubin(ADD_CUDA, "sm_90")
    evil = compile._compile_host('extern "C" void add() { __builtin_trap(); }', ("c++", "-shared", "-fPIC"))
    for entry in list(place.iterdir()):
        entry.unlink()
        cache.store(entry.name, evil)
        if planted.startswith("0"):
            entry.chmod(int(planted, 8))
        else:
            give_to_another_user(entry, monkeypatch)
    new_process(monkeypatch)
    with pytest.warns(RuntimeWarning, match="is refused: .* Delete the whole directory") as caught:
        call_add(compile.host_library(ADD))
        assert compile.cubin(ADD_CUDA, "sm_90").code != evil
    assert len(caught) == 1
    assert "chmod" not in str(caught[0].message)
    new_process(monkeypatch)
    no_compiler(monkeypatch)
    call_add(compile.host_library(ADD))  # and has been replaced


def test_an_entry_under_another_name_is_not_intact(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile.host_library(ADD)
    (entry,) = place.iterdir()
    other = ADD.replace("a[i] + b[i]", "a[i] - b[i]")
    compile.host_library(other)
    (theirs,) = set(place.iterdir()) - {entry}
    theirs.rename(entry)
    new_process(monkeypatch)
    call_add(compile.host_library(ADD))


def test_a_pipe_in_an_entrys_place_does_not_block(place: Path) -> None:
    place.mkdir(mode=0o700)
    os.mkfifo(place / "x")
    assert cache.find("x") is None


# ---------------------------------------------------------------------------------------------------------------------
# Places where kernels cannot be written, or not be executed


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
        {_BARE_PACKAGE}
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
    inner = f"{mounts} exec {sys.executable} -c {shlex.quote(_dedent(script))}"
    environment = {cache.ENVIRONMENT_VARIABLE: str(places["cache"]), "TMPDIR": str(places["temporary"])}
    if subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(tmp_path)], capture_output=True
    ).returncode:
        pytest.skip("this system lets no user mount")
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", inner], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_where_the_cache_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(cache.ENVIRONMENT_VARIABLE)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.directory() == tmp_path / "xdg" / "lowbit_lightning"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache.directory() == tmp_path / "home" / ".cache" / "lowbit_lightning"
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, "~/mine")
    assert cache.directory() == tmp_path / "home" / "mine"


def test_the_private_directory_is_removed_at_exit(tmp_path: Path) -> None:
    script = f"""
        import sys, warnings
        {_BARE_PACKAGE}
        from lowbit_lightning.kernels.compile import cache
        warnings.simplefilter("ignore")
        print(cache.store("x", b"y"))
    """
    done = _python(script, **{cache.ENVIRONMENT_VARIABLE: "/proc/nowhere"})
    assert done.returncode == 0, done.stderr
    entry = Path(done.stdout.strip())
    assert entry.name == "x"
    assert not entry.parent.exists()


def test_four_processes_starting_at_once(tmp_path: Path, place: Path) -> None:
    (tmp_path / "add.cpp").write_text(ADD)
    (tmp_path / "add.cu").write_text(ADD_CUDA)
    script = f"""
        import ctypes, pathlib, sys, time
        {_BARE_PACKAGE}
        from lowbit_lightning.kernels import compile
        here = pathlib.Path({str(tmp_path)!r})
        compiled = []
        for name in ("_compile_host", "_compile_cuda"):
            real = getattr(compile, name)
            setattr(compile, name, lambda *a, real=real, name=name: (compiled.append(name), real(*a))[1])
        pathlib.Path(here, f"ready{{sys.argv[1]}}").touch()
        while len(list(here.glob("ready*"))) < 4:
            time.sleep(0.01)
        for _ in range(2):
            library = compile.host_library((here / "add.cpp").read_text())
            made = compile.cubin((here / "add.cu").read_text(), "sm_90")
        x = (ctypes.c_float * 3)(1, 2, 3)
        library.add(ctypes.c_long(3), x, x, x)
        assert list(x) == [2, 4, 6] and made.code[:4] == bytes([127]) + b"ELF"
        assert len(compiled) == len(set(compiled)), compiled
    """
    command = [sys.executable, "-c", _dedent(script)]
    ranks = [subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True) for rank in range(4)]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * 4, errors
    assert sorted(p.suffix for p in place.iterdir()) == [".cubin", ".so"]  # and no temporary file is left


# The package without its __init__ files, which import torch and Lightning: what a subprocess here does not need.
_BARE_PACKAGE = "\n        ".join(
    ["import types"]
    + [
        f"m = sys.modules[{name!r}] = types.ModuleType({name!r}); m.__path__ = [{str(path)!r}]"
        for name, path in (
            ("lowbit_lightning", compile.SOURCES.parents[1]),
            ("lowbit_lightning.kernels", compile.SOURCES.parent),
        )
    ]
)


def _dedent(script: str) -> str:
    return textwrap.dedent(script)


def _python(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _dedent(script)], env={**os.environ, **environment}, capture_output=True, text=True
    )


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the flag names an x86 processor")
def test_half_precision_without_the_processors_own_conversions() -> None:
    """All 65,536 float16 values, and floats of every kind, against torch."""
    text = (
        compile.source_text("vec.h")
        + """
        extern "C" void widen_all(const uint16_t* x, float* y, int n) {
            for (int i = 0; i < n; i += W) store(y + i, widen_half(load_raw<Halves>(x + i, W)), W);
        }
        extern "C" void narrow_all(const float* x, uint16_t* y, int n) {
            for (int i = 0; i < n; i += W) store_raw(y + i, narrow_half(load(x + i, W)), W);
        }
    """
    )
    library = compile.host_library(text, flags=("-march=x86-64",))
    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16)
    widened = torch.empty(65536)
    library.widen_all(ctypes.c_void_p(halves.data_ptr()), ctypes.c_void_p(widened.data_ptr()), 65536)
    finite = ~halves.isnan()
    assert torch.equal(widened[finite].view(torch.int32), halves.float()[finite].view(torch.int32))
    assert widened[~finite].isnan().all()

    generator = torch.Generator().manual_seed(0)
    floats = torch.randint(-(2**31), 2**31, (1 << 18,), generator=generator).to(torch.int32).view(torch.float32)
    near = halves.float()[finite].repeat(3)[: 3 * 63488]
    near = near * (1 + torch.randn(len(near), generator=generator) * 2.0**-11)
    ties = (halves.float()[:31743] + halves.float()[1:31744]) / 2
    x = torch.cat([floats, near, ties, -ties, torch.zeros(1024)])
    x = x[: len(x) // 64 * 64].contiguous()
    narrowed = torch.empty(len(x), dtype=torch.float16)
    library.narrow_all(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(narrowed.data_ptr()), len(x))
    finite = ~x.isnan()
    assert torch.equal(narrowed[finite].view(torch.int16), x.half()[finite].view(torch.int16))
    assert narrowed[~finite].isnan().all()
