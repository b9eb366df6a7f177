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

WEIGHTS = 128  # of a thread in a turn of the main loop: 128 x 128 for 128 threads
MOST = {"nf4": 3.1, "nf4-dq": 3.1, "int4": 3.6, "int8": 3.9, "int3": 4.9, "int2": 4.5}
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
    macros = {"ELEMENT": torch.bfloat16, "BIAS": torch.bfloat16, "COLUMNS": 8, "PACKETS": 1, "STAGES": 4}
    lines = disassembled(compile.cubin(text_of("lowbit_gemv.cu", form, **macros), "sm_90").code, tmp_path)
    main = max(loops(lines), key=lambda loop: sum("HMMA" in line for line in loop))
    # Two fragments of the weight, of eight parts of 16 of K; and of x the sums of eight parts, for the offsets.
    assert sum("HMMA" in line for line in main) == (24 if form in ("int4", "int3", "int2") else 16)
    assert 2 < len(main) / WEIGHTS < MOST[form], len(main)
