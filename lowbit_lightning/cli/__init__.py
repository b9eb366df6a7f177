"""The command line: ``lowbit COMMAND ...``. Each command is a module here, loaded when it is asked for.

A command's module has ``add_arguments(parser)`` and ``run(arguments) -> int``, and its docstring is its description.
``run`` prints the result to stdout. Exit status: what ``run`` returns, and 2 for an argument that is invalid, whose
error is one line on stderr.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "convert": "the optimizer states of a checkpoint, from 8 to 32 bits or back",
    "plan": "bytes per device of a training run, before anything is allocated",
}


class UserCodeError(ValueError):
    """The user's own code raised, and is shown with its traceback; its exception is the cause."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; errors go to stderr."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = _chosen(given[:1])
    module = import_module(f"{__name__}.{command}")
    parser = argparse.ArgumentParser(prog=f"lowbit {command}", description=module.__doc__)
    module.add_arguments(parser)
    args = parser.parse_args(given[1:])
    try:
        return module.run(args)
    except UserCodeError as error:
        traceback.print_exception(error.__cause__)
        print(f"lowbit {command}: {error}", file=sys.stderr)
    except (ValueError, TypeError, OSError) as error:
        print(f"lowbit {command}: {_line(error)}", file=sys.stderr)
    return 2


def _chosen(given: Sequence[str]) -> str:
    listed = "\n".join(f"  {name:10}{what}" for name, what in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="lowbit",
        description="Training in low-bit arithmetic.",
        epilog=f"commands:\n{listed}\n\nlowbit COMMAND --help says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    return parser.parse_args(given).command


def _line(error: Exception) -> str:
    """What it says, in one line: torch adds advice of many."""
    return str(error).strip().partition("\n")[0]
