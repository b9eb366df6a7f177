"""What goes wrong between a kernel's text and its code.

CompileError
+-- Unavailable          not the text's fault: the ops run on the reference instead
    +-- CompilerNotFound
    +-- NoPlace
"""

from __future__ import annotations


class CompileError(RuntimeError):
    """A kernel did not compile. ``command`` is what was run, ``log`` all that the compiler said."""

    def __init__(self, message: str, command: str = "", log: str = "") -> None:
        tail = "\n".join(log.strip().splitlines()[-40:])
        super().__init__("\n".join(part for part in (message, command and f"command: {command}", tail) if part))
        self.command = command
        self.log = log


class Unavailable(CompileError):
    """This machine cannot compile or run compiled kernels. It is raised before an op has changed anything."""


class CompilerNotFound(Unavailable):
    """There is no C++ compiler, or no NVRTC, on this machine."""


class NoPlace(Unavailable):
    """A kernel can be written to no directory, or run from none."""
