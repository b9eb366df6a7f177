"""The program ``lowbit``, as far as it needs neither torch nor Lightning: the table of commands, help, version, shell
completion, and the packaged configs.

It is a package of its own because importing anything inside ``lowbit_lightning`` registers names with Lightning, and so
imports torch and Lightning: five seconds. Every other command is a module of ``lowbit_lightning.cli``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module

# Command -> what it does, in one line. A command is the module of this name in lowbit_lightning/cli, if MODULES has no
# other.
COMMANDS = {
    "fit": "train the model of a config",
    "validate": "run the validation loop of a config",
    "test": "run the test loop of a config",
    "predict": "run the predict loop of a config",
    "configs": "list, show and copy the packaged experiments",
    "plan": "bytes per device of a training run, before anything is allocated",
    "doctor": "what is wrong with this installation, and the command that mends it",
    "report": "the report of a run as a page of HTML, or several runs side by side",
    "sweep": "train once for each combination of values, and compare",
    "schema": "a JSON schema of configs, for editors",
    "convert": "a checkpoint: states in 8 or 32 bits, for torch, for bitsandbytes, as one file",
}
MODULES = {
    **dict.fromkeys(("fit", "validate", "test", "predict"), "lowbit_lightning.cli.fit"),
    "configs": "lowbit_command.configs",
    "doctor": "lowbit_command.doctor.command",
    "report": "lowbit_command.report.command",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status; errors go to stderr, in one line. Status 2: the command line or the
    config is wrong."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    first = given[0] if given else "--help"
    if first in ("-h", "--help", "help"):
        print(_help())
        return 0 if given else 2
    if first in ("-V", "--version"):
        print(f"lowbit {version()}")
        return 0
    if first == "--completion":
        return import_module("lowbit_command.completion").run(given[1:])
    if first not in COMMANDS:
        near = get_close_matches(first, COMMANDS, n=1)
        meant = f"did you mean {near[0]}? " if near else ""
        print(f"lowbit: {first!r} is no command; {meant}The commands are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    from lowbit_command.running import run

    return run(first, MODULES.get(first, f"lowbit_lightning.cli.{first}"), given[1:])


def version() -> str:
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("lowbit-lightning")
    except PackageNotFoundError:
        return "(run from a checkout: not installed)"


def _help() -> str:
    listed = "\n".join(f"  {name:10}{what}" for name, what in COMMANDS.items())
    return f"""usage: lowbit COMMAND ...

Training in low-bit arithmetic.

commands:
{listed}

lowbit COMMAND --help says more. lowbit --version; lowbit --completion bash, zsh or fish prints a completion script."""
