"""CONTRIBUTING.md's worked examples, carried out in a copy of the package: they work, and touch as few files as said.

A fence with a file name writes that file, or adds to it; ``{a,b}`` in the name stands for several. ``diff``
replaces the lines that begin with ``-`` or a space by those that begin with ``+`` or a space. A fence without a name
is run.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from support.run_program import ROOT, run

FENCE = re.compile(r"^```(python|diff) ?(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def examples() -> dict[str, str]:
    """Heading -> text."""
    _, text = (ROOT / "CONTRIBUTING.md").read_text().split("\n## Worked examples\n")
    _, *pieces = re.split(r"^### (.*)$", text.partition("\n## ")[0], flags=re.MULTILINE)
    return dict(zip(pieces[::2], pieces[1::2], strict=True))


def apply(kind: str, path: Path, text: str) -> None:
    before = path.read_text() if path.exists() else ""
    if kind == "python":
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{before}\n\n{text}" if before else text)
        return
    lines = text.splitlines()
    old, new = ("\n".join(line[1:] for line in lines if line[:1] != left_out) for left_out in "+-")
    assert before.count(old) == 1, f"{path}: the example is not up to date:\n{old}"
    path.write_text(before.replace(old, new))


@pytest.mark.parametrize("heading", examples())
def test_worked_example(heading: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("lowbit_lightning", "lowbit_command"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("*.pyc"))
    touched, checks = set(), ""
    for kind, name, text in FENCE.findall(examples()[heading]):
        stem, _, choice = name.partition("{")
        many, _, end = choice.partition("}")
        for file in many.split(",") if many else [""]:
            if name:
                touched.add(f"{stem}{file}{end}")
                apply(kind, tmp_path / f"{stem}{file}{end}", text.replace("FILE", file))
        checks += "" if name else text
    said = re.search(r": (\d+) (file|folder)s?$", heading)
    assert said, f"{heading!r} must end with a number of files or folders"
    places = touched if said[2] == "file" else {str(Path(path).parent) for path in touched}
    assert len(places) == int(said[1]), f"{heading}, but it touches {sorted(touched)}"
    program = tmp_path / "checks.py"  # it imports the package that lies beside it
    here = [str(tmp_path / "lowbit_lightning")]
    program.write_text(f"{checks}\nimport lowbit_lightning\nassert lowbit_lightning.__path__ == {here}\n")
    monkeypatch.chdir(tmp_path)  # where the checks may write
    run(program)
