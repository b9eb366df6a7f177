"""The cache of compiled kernels: what is found in it again, where it lies, and what is refused."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from support.jit import ADD, ADD_CUDA, BARE_PACKAGE, call_add, empty_cache, new_process, no_compiler, python

from lowbit_lightning.kernels import compile
from lowbit_lightning.kernels.compile import cache


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    yield from empty_cache(tmp_path, monkeypatch)


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
    """Flags, compiler and processor; architecture and NVRTC."""
    compile.host_library(ADD)
    compile.host_library(ADD, flags=("-DX",))
    compile.cubin(ADD_CUDA, "sm_90")
    compile.cubin(ADD_CUDA, "sm_80")
    for name, value, again in (
        ("_version", lambda compiler: "another compiler", partial(compile.host_library, ADD)),
        ("processor", lambda: ("another processor",), partial(compile.host_library, ADD)),
        ("nvrtc_version", lambda: "0.0", partial(compile.cubin, ADD_CUDA, "sm_90")),
    ):
        monkeypatch.setattr(compile, name, value)
        again()
    assert sorted(p.suffix for p in place.iterdir()) == 3 * [".cubin"] + 4 * [".so"]


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
# Where it lies, and who shares it


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
        {BARE_PACKAGE}
        from lowbit_lightning.kernels.compile import cache
        warnings.simplefilter("ignore")
        print(cache.store("x", b"y"))
    """
    done = python(script, **{cache.ENVIRONMENT_VARIABLE: "/proc/nowhere"})
    assert done.returncode == 0, done.stderr
    entry = Path(done.stdout.strip())
    assert entry.name == "x"
    assert not entry.parent.exists()


def test_four_processes_starting_at_once(tmp_path: Path, place: Path) -> None:
    (tmp_path / "add.cpp").write_text(ADD)
    (tmp_path / "add.cu").write_text(ADD_CUDA)
    script = f"""
        import ctypes, pathlib, sys, time
        {BARE_PACKAGE}
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
    command = [sys.executable, "-c", textwrap.dedent(script)]
    ranks = [subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True) for rank in range(4)]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * 4, errors
    assert sorted(p.suffix for p in place.iterdir()) == [".cubin", ".so"]  # and no temporary file is left
