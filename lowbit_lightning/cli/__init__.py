"""The commands of ``lowbit`` that need torch: a module each, loaded when it is asked for. ``lowbit_command`` has the
table of commands, ``lowbit_command.running`` says what a command's module offers."""

from lowbit_command import COMMANDS, main
from lowbit_command.running import UserCodeError

__all__ = ["COMMANDS", "UserCodeError", "main"]
