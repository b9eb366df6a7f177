"""A finding: one line of the doctor's answer, and what follows from all of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

OK, WARN, FAIL = "OK", "WARN", "FAIL"
EXIT_STATUS = {OK: 0, WARN: 1, FAIL: 3}
"""By the worst finding. 2 means invalid arguments, as for every command."""


@dataclass(frozen=True)
class Finding:
    """What one probe says.

    ``level``: OK; WARN, it works but costs time or will do harm under some condition; FAIL, something does not work, or
    only by the slow reference. ``subject``: one or two words. ``text``: what was found and what it costs. ``command``:
    what to paste into a shell to mend it; not for OK.
    """

    level: str
    subject: str
    text: str
    command: str = ""


def ok(subject: str, text: str) -> Finding:
    return Finding(OK, subject, text)


def warn(subject: str, text: str, command: str) -> Finding:
    return Finding(WARN, subject, text, command)


def fail(subject: str, text: str, command: str) -> Finding:
    return Finding(FAIL, subject, text, command)


def exit_status(findings: Iterable[Finding]) -> int:
    """0 where all is well, 1 with warnings, 3 with failures."""
    return max((EXIT_STATUS[finding.level] for finding in findings), default=0)


def counted(number: int, noun: str) -> str:
    """``"1 kernel"``, ``"2 kernels"``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
