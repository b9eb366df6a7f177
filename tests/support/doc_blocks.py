"""The code blocks of a documentation page, run in order, each language by its own evaluator.

``python``: one namespace for the page. ``text``: what the block before it prints; figures may differ by 5 %.
``yaml``: a configuration that ``lowbit fit`` accepts. ``bash`` and ``console``: commands that exist, with options that
exist; they are not started.

A block that the tests cannot run says so in a comment, ``# not run by the tests: REASON``; it must still compile.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import yaml
from sybil import Example, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.myst import CodeBlockParser

from lowbit_lightning import cli, kernels

ROOT = Path(__file__).resolve().parents[2]
NOT_RUN = re.compile(r"# not run by the tests: (.+)")
FENCE = re.compile(r"^ *```(.*)$", re.MULTILINE)
DIRECTIVE = re.compile(r"\{[\w-]+\}")  # of MyST: markup, not code
SHELL = {"apt-get", "cd", "conda", "curl", "export", "git", "ls", "mkdir", "source"}  # not ours to check


def fences(page: Path) -> list[str]:
    """The language of each block, read without sybil: the number that must have been executed."""
    opened = FENCE.findall(page.read_text())[::2]
    return [language.strip() for language in opened if not DIRECTIVE.match(language.strip())]


class Blocks:
    """Runs the blocks of one page. ``ran`` holds the lines of those that did, ``not_run`` line -> reason."""

    def __init__(self) -> None:
        self.ran: list[int] = []
        self.not_run: dict[int, str] = {}
        self._printed: str | None = None
        self._python = PythonEvaluator()
        evaluators = {"python": self._run_python, "text": self._compare, "yaml": self._configure}
        evaluators |= {"bash": self._commands, "console": self._commands}
        self._sybil = Sybil([CodeBlockParser(language, run) for language, run in evaluators.items()])

    def run(self, page: Path) -> None:
        """As if the page were all that a fresh process had done."""
        kernels.reset_calls()
        for example in self._sybil.parse(page).examples():
            reason = NOT_RUN.search(example.parsed)
            if reason:
                self.not_run[example.line] = reason[1]
                if example.region.lexemes["arguments"].startswith("python"):
                    compile(example.parsed, f"{page}:{example.line}", "exec")
                continue
            example.evaluate()
            self.ran.append(example.line)

    def _run_python(self, example: Example) -> None:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            self._python(example)
        self._printed = printed.getvalue()

    def _compare(self, example: Example) -> str | None:
        if self._printed is None:
            return f"{example.path}:{example.line}: no python block before it has printed this"
        return differences(self._printed, example.parsed)

    def _configure(self, example: Example) -> None:
        loaded = yaml.safe_load(example.parsed)
        assert isinstance(loaded, dict), f"{example.path}:{example.line}: a configuration is a mapping"
        if "fit" not in cli.COMMANDS:
            return
        file = Path(f"block-{example.line}.yaml")
        file.write_text(example.parsed)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
            status = cli.main(["fit", "--config", str(file), "--print_config"])
        assert not status, f"{example.path}:{example.line}: {errors.getvalue()}"

    def _commands(self, example: Example) -> None:
        console = example.region.lexemes["arguments"].startswith("console")
        text = example.parsed.replace("\\\n", " ")
        if console:  # lines without a prompt are what the command prints
            text = "\n".join(line[2:] for line in text.splitlines() if line.startswith("$ "))
        for line in text.splitlines():
            for command in re.split(r" && ", line):
                check_command(shlex.split(command, comments=True))


def differences(printed: str, said: str) -> str | None:
    """None where ``printed`` ends with the lines that ``said`` has. A line ``...`` stands for any lines before it."""
    expected = [line for line in said.strip().splitlines() if line.strip() != "..."]
    found = printed.strip().splitlines()[-len(expected) :]
    if len(found) == len(expected) and all(map(_alike, found, expected)):
        return None
    return "\n".join(["the block before it prints", *found, "and the page says", *expected])


def _alike(found: str, expected: str) -> bool:
    """Word by word; numbers within 5 % or two units of the last digit shown."""
    words, others = found.split(), expected.split()
    return len(words) == len(others) and all(map(_same, words, others))


def _same(found: str, expected: str) -> bool:
    bare, other = (word.strip(",;%").replace(",", "") for word in (found, expected))
    try:
        a, b = float(bare), float(other)
    except ValueError:
        return found == expected
    _, _, digits = other.partition(".")
    return math.isclose(a, b, rel_tol=0.05, abs_tol=2.01 * 10.0 ** -len(digits))


def check_command(words: list[str]) -> None:
    """That the program, its subcommand or target, and its long options exist."""
    while words and "=" in words[0] and not words[0].startswith("-"):
        words = words[1:]  # VARIABLE=value in front of a command
    if not words or words[0] in SHELL:
        return
    program, *rest = words
    if program == "lowbit":
        _check_lowbit(rest)
    elif program == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        asked = {word for word in rest if "=" not in word}
        assert asked <= targets, f"make {' '.join(asked - targets)}: the Makefile has no such target"
    elif program == "pip":
        named = re.findall(r"\[([\w,-]+)\]", " ".join(rest))
        extras = re.findall(r"^([\w-]+) = \[", _section("[project.optional-dependencies]"), re.MULTILINE)
        assert {extra for group in named for extra in group.split(",")} <= set(extras), f"no such extra: {rest}"
    elif program in ("python", "torchrun"):
        _check_python(rest)
    else:
        raise AssertionError(f"{shlex.join(words)}: nothing checks the command {program!r}")


def _section(heading: str) -> str:
    return (ROOT / "pyproject.toml").read_text().split(f"\n{heading}\n")[1].split("\n[")[0]


def _check_lowbit(rest: list[str]) -> None:
    if not rest or rest[0].startswith("-"):
        return
    command, *arguments = rest
    assert command in cli.COMMANDS, f"lowbit {command}: there are {sorted(cli.COMMANDS)}"
    known = options(command)
    asked = {word.split("=")[0] for word in arguments if word.startswith("--")}
    unknown = {option for option in asked - known if "." not in option}  # a dotted one is a key of the configuration
    assert not unknown, f"lowbit {command} has no option {sorted(unknown)}; it has {sorted(known)}"


def options(command: str) -> set[str]:
    """The long options of a ``lowbit`` command, as its help lists them."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        cli.main([command, "--help"])
    return set(re.findall(r"--[a-z][\w-]*", printed.getvalue()))


def _check_python(rest: list[str]) -> None:
    scripts = [word for word in rest if word.endswith(".py")]
    if rest[:1] == ["-m"]:
        assert find_spec(rest[1]), f"python -m {rest[1]}: no such module"
    for script in scripts:
        if "/" not in script:
            continue  # the reader's own
        assert (ROOT / script).is_file(), f"{script} does not exist"
        asked = {word.split("=")[0] for word in rest[rest.index(script) :] if word.startswith("--")}
        beside = (ROOT / script).parent
        shared = [*beside.glob("*_common.py"), *beside.glob("*_settings.py")]
        text = "".join(path.read_text() for path in [ROOT / script, *shared])
        unknown = [option for option in asked if not _declared(option, text)]
        assert not unknown, f"{script} has no option {unknown}"


def _declared(option: str, text: str) -> bool:
    """As a flag of argparse, or as a field of a dataclass of settings."""
    return bool(re.search(rf'"{option}"|^    {option[2:].replace("-", "_")}:', text, re.MULTILINE))
