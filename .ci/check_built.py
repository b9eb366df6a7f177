"""Installs what ``python -m build`` left in a folder into clean environments, and runs tests/wheel_smoke.py in each.

    python .ci/check_built.py dist

The wheel: with the oldest versions that are supported and with the newest ones, on the oldest and the newest Python
that are found here. The source distribution: once, with the newest. Prints a line for each, and exits with 1 if one
fails. An environment is removed when it has been used, because a torch for GPUs takes gigabytes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.10", "3.13")
CONSTRAINTS = {"oldest": "constraints-floor.txt", "newest": "constraints.txt"}


def found(version: str) -> str | None:
    """The command of that Python, if one is installed and starts; pyenv's need not be on the path."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    commands = [shutil.which(f"python{version}"), *map(str, pyenv.glob(f"{version}.*/bin/python"))]
    starts = (c for c in commands if c and subprocess.run([c, "-c", ""], capture_output=True).returncode == 0)
    return next(starts, None)


def check(python: str, constraints: str, built: Path) -> str:
    """What is wrong; nothing if it can be installed and works."""
    with tempfile.TemporaryDirectory(dir=ROOT / "build") as folder:
        own = Path(folder) / "bin" / "python"
        install = [str(own), "-m", "pip", "install", "--quiet", "-c", str(ROOT / constraints), str(built)]
        smoke = [str(own), "-I", str(ROOT / "tests" / "wheel_smoke.py")]
        for command in ([python, "-m", "venv", folder], install, smoke):
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            if done.returncode:
                lines = (done.stderr or done.stdout).strip().splitlines() or ["nothing printed"]
                return f"{' '.join(command[1:4])} ...: {lines[-1]}"
    return ""


def main(folder: Path) -> int:
    (ROOT / "build").mkdir(exist_ok=True)
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    pythons = {version: command for version in PYTHONS if (command := found(version))}
    for version in [version for version in PYTHONS if version not in pythons]:
        print(f"not checked: Python {version} is not installed here")
    cases = [(v, command, name, wheel) for v, command in pythons.items() for name in CONSTRAINTS]
    cases.append((f"{sys.version_info[0]}.{sys.version_info[1]}", sys.executable, "newest", source))
    failures = 0
    for version, python, name, built in cases:
        fault = check(python, CONSTRAINTS[name], built)
        failures += bool(fault)
        print(f"{'FAIL' if fault else 'ok  '} Python {version}, {name} versions, {built.name} {fault}", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
