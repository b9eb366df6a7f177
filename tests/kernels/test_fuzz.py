"""A slice of the fuzz test (``make fuzz``): hostile values, between pages that nobody may touch."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from emulator.backend import emulated
from support import fuzz
from support.run_program import run, run_afresh, status_of

from lowbit_lightning.kernels import backend, cpu

# Ops that run in the cases of others.
BESIDE = {
    *("optimizer_norms", "lowbit_dequantize", "lowbit_embedding", "int8_conv_input", "int8_conv_weight"),
    *("quantize_group_columns", "int8_grouped_matmul", "int8_grouped_outer"),
}
# Of summation: equal but for roundings.
IN_ANY_ORDER = {"lowbit_matmul", "lowbit_matmul_backward", "lowbit_gemv", "split_outliers"}
needs_mprotect = pytest.mark.skipif(sys.platform != "linux", reason="guard pages are set up as on Linux")
SANITIZERS = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"


def test_every_op_has_its_hostile_cases() -> None:
    assert backend.OPS.keys() - IN_ANY_ORDER == {*fuzz.OPS, *BESIDE}


def test_the_cpu_backend_allocates_where_guards_see_it() -> None:
    """By ``torch.empty``, which ``guards`` replaces."""
    unseen = re.compile(r"\.new_(empty|zeros|ones|full)\(|torch\.empty_like\(")
    for path in Path(cpu.__file__).parent.glob("*.py"):
        assert not unseen.search(path.read_text()), path.name


@needs_mprotect
@pytest.mark.parametrize(
    "arguments", [("--kinds", "8", "mixed"), ("--ops", *(op for op in fuzz.OPS if op != "optimizer_step"))], ids=str
)
def test_the_cpu_equals_the_reference_on_hostile_values(arguments: tuple[str, ...]) -> None:
    assert " 0 mismatches" in run(fuzz.__file__, "--seconds", "4", "--count", "400", *arguments)


@needs_mprotect
@pytest.mark.parametrize("offset", [-1, 300])
def test_an_access_outside_a_tensor_ends_the_process(offset: int, tmp_path: Path) -> None:
    program = tmp_path / "access.py"
    program.write_text(f"""
import ctypes, random, sys, torch
from support import guards
random.choice = lambda ends: ends[{int(offset > 0)}]
x = guards.guarded((300,), torch.uint8)
ctypes.c_uint8.from_address(x.data_ptr() + 150)
print(ctypes.c_uint8.from_address(x.data_ptr() + int(sys.argv[1])).value)
""")
    assert status_of(program, offset) == (-signal.SIGSEGV, "")
    run(program, 299)


@pytest.mark.parametrize(
    ("rule", "kind"), [("ademamix", "mixed"), ("adam_amsgrad", "8"), ("rmsprop_centered", "8"), ("lion", "32")]
)
def test_cuda_equals_the_reference_on_hostile_values(rule: str, kind: str) -> None:
    cases: list[str] = []
    for seed in range(10):
        wrong = fuzz.check(seed, ["optimizer_step"], [(rule, kind)], cases.append, emulated)
        assert not wrong, f"{cases[-1]}: {wrong}"


@pytest.mark.slow
@needs_mprotect
@pytest.mark.parametrize("compiler", [name for name in ("g++", "clang++") if shutil.which(name)])
@pytest.mark.parametrize("flags", [SANITIZERS, "-O1", "-O1 -march=x86-64-v3", "-O1 -march=x86-64"])
def test_compilers_sanitizers_and_instruction_sets(compiler: str, flags: str) -> None:
    environment = {"CXX": compiler}
    if flags == SANITIZERS:
        if compiler == "clang++":
            flags += " -shared-libasan"
        runtimes = "libclang_rt.asan-x86_64.so" if compiler == "clang++" else "libasan.so", "libstdc++.so"
        found = [
            subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip() for name in runtimes
        ]
        # Python and torch leak on purpose, and were not compiled with the sanitizers.
        options = "detect_leaks=0:verify_asan_link_order=0:handle_segv=0"
        environment |= {"LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": options, "UBSAN_OPTIONS": "print_stacktrace=1"}
    told = ("--seconds", "1200", "--count", "1000", f"--flags={flags}")
    assert " 0 mismatches" in run_afresh(fuzz.__file__, *told, timeout=1300, **environment)
