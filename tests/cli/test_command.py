"""``lowbit`` itself: what answers at once, what it says of a wrong command, and what every command offers."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import lowbit_command
from lowbit_command import COMMANDS, completion, main
from lowbit_command.running import Parser
from lowbit_lightning import cli

ROOT = Path(__file__).resolve().parents[2]


def test_the_program_is_declared() -> None:
    found = re.search(r'^lowbit = "(.+):(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert found is not None
    assert getattr(importlib.import_module(found[1]), found[2]) is lowbit_command.main is cli.main


def test_help_version_and_completion_import_nothing_heavy() -> None:
    script = """
        import sys, time
        from lowbit_command import main
        for told in (["--help"], ["--version"], ["--completion", "bash"], ["--completion", "fish"], ["nothing"]):
            main(told)
        heavy = {"torch", "lightning", "numpy", "omegaconf", "jsonargparse", "lowbit_lightning"} & set(sys.modules)
        assert not heavy, heavy
        assert time.process_time() < 0.3, time.process_time()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_wrong_command_gets_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plam", "x"]) == 2
    assert capsys.readouterr().err == (
        f"lowbit: 'plam' is no command; did you mean plan? The commands are {', '.join(COMMANDS)}\n"
    )
    assert main([]) == 2
    assert main(["--completion", "tcsh"]) == 2
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "a:b", "--memry", "3GB"])
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "lowbit plan: --memry is not known here; did you mean --memory? See lowbit plan --help"


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_a_module_and_completes_its_options(command: str) -> None:
    module = importlib.import_module(lowbit_command.MODULES.get(command, f"lowbit_lightning.cli.{command}"))
    parser = Parser(command, module.__doc__)
    module.add_arguments(parser)
    assert callable(module.run)
    known = {option for action in parser._actions for option in action.option_strings}
    known |= {str(word) for action in parser._actions if not action.option_strings for word in action.choices or ()}
    words = set(completion.WORDS.get(command, ()))
    assert words <= known
    assert command in completion.script("bash")
    assert command in completion.script("fish")


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_bash_script_parses(shell: str) -> None:
    text = completion.script(shell).replace("autoload -U +X bashcompinit && bashcompinit", "")
    assert subprocess.run(["bash", "-n"], input=text.encode(), check=False).returncode == 0
