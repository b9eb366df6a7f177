"""Which pieces the CPU texts choose under any flags: they must fit together.

``instruction_sets.h`` is the only text that looks at the compiler's macros. It is tried with every subset of them, and
the CPU texts are compiled for the choices that real flags lead to, also those that this processor cannot run.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest

from lowbit_lightning.kernels import formats
from lowbit_lightning.kernels.compile import SOURCES, source_text

HEADER = "instruction_sets.h"
COMPILERS = [name for name in ("g++", "clang++") if shutil.which(name)]
MACROS = {  # what stands behind each piece
    "AVX512": {"__AVX512F__"},
    "AVX512_BW": {"__AVX512F__", "__AVX512BW__"},
    "AVX512_DQ": {"__AVX512F__", "__AVX512DQ__"},
    "AVX512_VBMI": {"__AVX512F__", "__AVX512VBMI__"},
    "AVX512_VNNI": {"__AVX512F__", "__AVX512VNNI__"},
    "AVX512_BF16": {"__AVX512F__", "__AVX512BF16__", "__AVX512DQ__"},
    "AVX2": {"__AVX2__"},
    "AVX2_FMA": {"__AVX2__", "__FMA__"},
    "AVX2_F16C": {"__AVX2__", "__F16C__"},
    "AVX2_VNNI": {"__AVX2__", "__AVXVNNI__"},
    "SSE2": {"__SSE2__"},
    "NEON": {"__ARM_NEON", "__aarch64__"},
    "AMX": {"__AMX_INT8__", "__AMX_TILE__", "__linux__"},
}
BITS = {"AVX512": 512, "AVX2": 256, "SSE2": 128, "NEON": 128, "AMX": None}
ASKED = sorted(set().union(*MACROS.values()) - {"__linux__"} | {"__EVEX512__"})
TOGETHER = ("__aarch64__", "__AMX_TILE__")  # come and go with __ARM_NEON and __AMX_INT8__

NEWEST = "-mavx512bw -mavx512dq -mavx512vbmi -mavx512vnni -mavx512bf16 -mavxvnni -mamx-int8 -mamx-tile"
FLAGS = {  # each piece with and without each other that one line of a text looks at together with it
    "Sapphire Rapids": f"-march=x86-64-v4 {NEWEST}",
    "Sapphire Rapids without AVX-512 VNNI": f"-march=x86-64-v4 {NEWEST} -mno-avx512vnni",
    "AVX-512 without DQ": f"-march=x86-64-v4 {NEWEST} -mno-avx512dq",
    "AVX-512 without BW": f"-march=x86-64-v4 {NEWEST} -mno-avx512bw",
    "AVX-512 alone": "-march=x86-64-v3 -mavx512f",
    "AVX-VNNI": "-march=x86-64-v3 -mavxvnni",
    "AVX-512 flags without AVX-512": f"-march=x86-64-v3 {NEWEST} -mno-avx512f",
    "AVX2 without FMA and F16C": "-march=x86-64-v3 -mno-fma -mno-f16c",
    "SSE2": "-march=x86-64",
}
needs_x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the flags are those of x86")
needs_compiler = pytest.mark.skipif(not COMPILERS, reason="neither g++ nor clang++ is installed")


def run(compiler: str, *arguments: str, text: str) -> str:
    done = subprocess.run([compiler, "-x", "c++", *arguments, "-"], input=text, capture_output=True, text=True)
    assert not done.returncode, f"{compiler} {' '.join(arguments)}\n" + "\n".join(done.stderr.splitlines()[:20])
    return done.stdout


def test_one_text_alone_asks_the_compiler() -> None:
    asks = re.compile(r"__(?:AVX|SSE|SSSE|FMA|F16C|ARM_|AMX|EVEX|aarch64|x86_64)")
    texts = [path for path in SOURCES.iterdir() if path.suffix in (".h", ".cpp") and path.name != HEADER]
    assert len(texts) > 10
    assert not [path.name for path in texts if asks.search(path.read_text())]
    assert set(re.findall(r"__\w+?(?:__|NEON)\b", (SOURCES / HEADER).read_text())) >= set(ASKED)


@needs_compiler
def test_every_subset_of_the_macros_gives_pieces_that_fit() -> None:
    pieces = [*MACROS, "VECTOR_BITS"]
    lines = (SOURCES / HEADER).read_text().splitlines()
    header = "\n".join(line for line in lines if not re.match(r"#(pragma once|include)", line))
    free = [macro for macro in ASKED if macro not in TOGETHER]
    subsets = [
        {**on, "__aarch64__": on["__ARM_NEON"], "__AMX_TILE__": on["__AMX_INT8__"]}
        for values in product([False, True], repeat=len(free))
        for on in [dict(zip(free, values, strict=True))]
    ]
    probe = "\n".join(f"LB_{piece}" for piece in pieces)
    parts = ["\n#undef __linux__\n#define __linux__ 1"]
    for number, chosen in enumerate(subsets):
        parts += [f"#undef {macro}" + (f"\n#define {macro} 1" if on else "") for macro, on in chosen.items()]
        parts += [f"#undef LB_{piece}" for piece in pieces]
        parts += ["#undef LB_HALVES_AVX512", header, f"subset {number}", probe]
    text = run(COMPILERS[0], "-E", "-P", "-Wundef", "-Werror", text="\n".join(parts) + "\n")
    answers = [[int(word) for word in part.split()[1:]] for part in text.split("subset")[1:]]
    assert len(answers) == len(subsets) == 2 ** len(free)
    for chosen, answer in zip(subsets, answers, strict=True):
        defined = {macro for macro, is_on in chosen.items() if is_on} | {"__linux__"}
        *on, bits = answer
        taken = {piece for piece, is_on in zip(MACROS, on, strict=True) if is_on}
        widths = {BITS[piece.split("_")[0]] for piece in taken} - {None}
        assert widths <= {bits}, (defined, taken, bits)
        for piece in taken:
            assert MACROS[piece] <= defined, (defined, taken)
            assert piece.split("_")[0] in taken, "no piece without the vectors that it works on"
        for piece in MACROS.keys() - taken:  # what is left out does not exist, or works on other vectors
            width = BITS[piece.split("_")[0]]
            assert not MACROS[piece] <= defined or width not in (bits, None), (defined, taken, bits, piece)


def everything(bits: tuple[int, ...]) -> list[str]:
    """The CPU texts that need no specialisation, a header of the optimizer step, and the texts for weights of so many
    bits; with them every header that looks at the pieces."""
    names = ("int8.cpp", "int8_quantize.cpp", "random_words.h", "quantize.cpp", "lowbit_quantize.cpp")
    texts = [source_text(*names, generated={"dynamic_tables.h": formats.cpp_tables()})]
    texts += [source_text("lowbit.cpp", prelude=f"#define BITS {n}") for n in bits]
    looking = {path.name for path in SOURCES.glob("*.h") if re.search(r"#e?l?if !?LB_", path.read_text())}
    seen = set(re.findall(r'#line 1 "(.+?)"', "".join(texts)))
    assert looking - {HEADER} <= seen, "a header that no text here includes"
    return texts


def compile_all(compiler: str, builds: list[str], *how: str, bits: tuple[int, ...]) -> None:
    common = ("-std=c++17", "-ffp-contract=off", "-Wundef", "-Werror=undef", *how, "-o", os.devnull)
    with ThreadPoolExecutor(2) as pool:
        work = [(flags, text) for flags in builds for text in everything(bits)]
        list(pool.map(lambda job: run(compiler, *common, *job[0].split(), text=job[1]), work))


@needs_x86
@pytest.mark.parametrize("compiler", COMPILERS)
def test_the_texts_fit_together_under_any_flags(compiler: str) -> None:
    compile_all(compiler, list(FLAGS.values()), "-fsyntax-only", bits=(3,))


@needs_x86
@pytest.mark.slow
@pytest.mark.parametrize("compiler", COMPILERS)
def test_the_texts_compile_under_every_combination_of_flags(compiler: str) -> None:
    """To machine code, which finds instructions that the flags do not allow."""
    flags = ["avx512bw", "avx512dq", "avx512vbmi", "avx512vnni", "avx512bf16", "avxvnni"]
    builds = [
        "-march=x86-64-v3 -mavx512f " + " ".join(f"-m{'' if on else 'no-'}{flag}" for flag, on in chosen)
        for values in product([False, True], repeat=len(flags))
        for chosen in [sorted(zip(flags, values, strict=True), key=lambda pair: pair[1])]  # what is off comes first
    ]
    builds += [
        "-march=x86-64-v3 " + " ".join(f"-m{'' if on else 'no-'}{flag}" for flag, on in zip(flags, values, strict=True))
        for flags in [["fma", "f16c", "avxvnni"]]
        for values in product([False, True], repeat=3)
    ]
    compile_all(compiler, [*builds, *FLAGS.values()], "-S", "-O0", bits=(8, 4, 3))
