"""How many instructions the product of one row of x takes for a weight, read from the binary by NVIDIA's disassembler.

docs/kernels.md compares them with the time that memory leaves for them.
"""

from __future__ import annotations

import re
import subprocess
from importlib.metadata import files
from pathlib import Path

import pytest
import torch

from lowbit_lightning.kernels import compile
from lowbit_lightning.kernels.cuda.lowbit_form import text_of

pytestmark = pytest.mark.six_architectures

WEIGHTS = {"nf4": 256, "nf4-dq": 256, "int4": 256, "int8": 128, "int3": 512, "int2": 512}
"""Of a thread in the main loop, which has two turns."""
MOST = {"nf4": 2.4, "nf4-dq": 2.5, "int4": 2.3, "int8": 3.9, "int3": 2.7, "int2": 1.9}
"""Instructions per weight on sm_90."""


def disassembled(code: bytes, folder: Path) -> list[str]:
    """Instructions, and labels as lines that end with a colon."""
    (program,) = (f for f in files("nvidia-cuda-nvdisasm") or () if f.name == "nvdisasm")
    binary = folder / "kernel.cubin"
    binary.write_bytes(code)
    command = [str(program.locate()), "-c", str(binary)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.findall(r"^(?:\s+/\*[0-9a-f]+\*/\s+(?=\S)|(?=\.L_x_\d+:))(.+?)(?:;.*)?$", text, re.MULTILINE)


def loops(lines: list[str]) -> list[list[str]]:
    """What lies between a label and a later jump to it."""
    labels = {line.rstrip().rstrip(":"): i for i, line in enumerate(lines) if line.startswith(".L_x")}
    jumps = ((i, re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)) for i, line in enumerate(lines))
    ends = [(labels[jump[1]], i) for i, jump in jumps if jump and labels[jump[1]] < i]
    return [[line for line in lines[a : b + 1] if not line.startswith(".L_x")] for a, b in ends]


@pytest.mark.parametrize("form", MOST)
def test_one_row_of_x(form: str, tmp_path: Path) -> None:
    macros = {"ELEMENT": torch.bfloat16, "BIAS": torch.bfloat16, "PACKETS": 1}
    lines = disassembled(compile.cubin(text_of("lowbit_row.cu", form, **macros), "sm_90").code, tmp_path)
    main = max(loops(lines), key=lambda loop: sum("HMMA" in line for line in loop))
    products = WEIGHTS[form] // 8  # of 16 x 16 weights by 32 lanes; and of x, for the offsets of 32 rows
    assert sum("HMMA" in line for line in main) == products + (products // 2 if form in ("int4", "int3", "int2") else 0)
    assert 1 < len(main) / WEIGHTS[form] < MOST[form], len(main)
