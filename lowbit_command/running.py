"""How a command runs: its module parses the arguments, and an error of the user's becomes one line.

A command's module has ``add_arguments(parser)`` and ``run(arguments) -> int``, and its docstring is its description.
``run`` prints the result to stdout. Exit status: what ``run`` returns, and 2 for an argument that is invalid, whose
error is one line on stderr.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import NoReturn


class UserCodeError(ValueError):
    """The user's own code raised, and is shown with its traceback; its exception is the cause."""


class Parser(argparse.ArgumentParser):
    """Its errors are one line, without the usage; options are not abbreviated."""

    def __init__(self, command: str, description: str | None) -> None:
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(f"lowbit {command}", description=description, formatter_class=layout, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            message = self._unknown(unknown.split()[0])
        self.exit(2, f"{self.prog}: {message}\n")

    def _unknown(self, argument: str) -> str:
        name, sep, value = argument.lstrip("-").partition("=")
        if argument.startswith("--") and "." in name:
            return f"{argument} is no option: settings of the config have no dashes: {name}={value if sep else 'VALUE'}"
        options = [option for action in self._actions for option in action.option_strings]
        near = get_close_matches(argument, options, n=1)
        return f"{argument} is not known here; {f'did you mean {near[0]}? ' if near else ''}See {self.prog} --help"


def run(command: str, module_name: str, given: Sequence[str]) -> int:
    module = import_module(module_name)
    parser = Parser(command, module.__doc__)
    parser.set_defaults(command=command)
    module.add_arguments(parser)
    args = parser.parse_intermixed_args(given)
    try:
        return module.run(args)
    except UserCodeError as error:
        traceback.print_exception(error.__cause__)
        print(f"lowbit {command}: {error}", file=sys.stderr)
    except (ValueError, TypeError, OSError) as error:
        print(f"lowbit {command}: {_line(error)}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"lowbit {command}: stopped", file=sys.stderr)
        return 130
    return 2


def _line(error: Exception) -> str:
    """What it says, in one line: torch adds advice of many."""
    return str(error).strip().partition("\n")[0]
