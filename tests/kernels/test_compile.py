"""The JIT. The two vector additions at the top are the manual of ``kernels.compile``."""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.jit import ADD, ADD_CUDA, BARE_PACKAGE, call_add, empty_cache, python

from lowbit_lightning.kernels import compile


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    yield from empty_cache(tmp_path, monkeypatch)


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
        {BARE_PACKAGE}
        from lowbit_lightning.kernels.compile import cache
        assert not [m for m in sys.modules if m.startswith("cuda.")]
    """
    done = python(script, PATH="")
    assert done.returncode == 0, done.stderr


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
