"""The code of README.md runs as it stands, and prints what README says that it prints."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_first_example(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1, "run the new one here too"
    (printed,) = re.findall(r"^```\n(loss:.*?)^```$", text, re.MULTILINE | re.DOTALL)
    paths = {**os.environ, "PYTHONPATH": str(ROOT)}
    (tmp_path / "example.py").write_text(blocks[0])
    result = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, env=paths, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "int8 (forward, grad_input, grad_weight) in 2 of 3 linear layers" in result.stderr
    found, expected = result.stdout.splitlines()[-2:], printed.splitlines()
    assert found[1] == expected[1]
    assert abs(float(found[0].split()[-1]) - float(expected[0].split()[-1])) <= 0.03
