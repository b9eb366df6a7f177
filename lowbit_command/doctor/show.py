"""Prints what was found: lines, the table of ops, Markdown, JSON."""

from __future__ import annotations

import getpass
import os
import re
import socket
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from lowbit_command.doctor.finding import FAIL, OK, WARN, Finding, counted

WIDTH = 110
_COLOURS = {OK: "32", WARN: "33", FAIL: "31"}


def lines(findings: Sequence[Finding], colour: bool = False) -> str:
    """``LEVEL  subject  text``, each with its command below."""
    wide = max((len(finding.subject) for finding in findings), default=0)
    out = []
    for finding in findings:
        level = f"{finding.level:4}"
        if colour:
            level = f"\x1b[{_COLOURS[finding.level]}m{level}\x1b[0m"
        indent = " " * (wide + 8)
        text = textwrap.wrap(finding.text, WIDTH - len(indent), break_long_words=False, break_on_hyphens=False)
        out.append(f"{level}  {finding.subject:{wide}}  {text[0] if text else ''}")
        out += [indent + line for line in text[1:]]
        if finding.command:
            out.append(f"{indent}run: {finding.command}")
    return "\n".join(out)


def summary(findings: Sequence[Finding]) -> str:
    """``"2 warnings, 1 failure"``."""
    numbers = [(sum(f.level == WARN for f in findings), "warning"), (sum(f.level == FAIL for f in findings), "failure")]
    return ", ".join(counted(n, noun) for n, noun in numbers if n) or "all is well"


def cell(states: dict[str, int]) -> str:
    """``"cached"``, or ``"cached 3, on first use 2"``."""
    if len(states) == 1:
        return next(iter(states))
    return ", ".join(f"{state} {number}" for state, number in states.items())


def grid(devices: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Rows of op x device, the first with the heads."""
    ops = list(dict.fromkeys(op for device in devices for op in device["ops"]))
    head = ["op", *(f"{d['device']} ({d['backend']})" for d in devices)]
    return [head, *([op, *(_cell_of(d, op) for d in devices)] for op in ops)]


def _cell_of(device: dict[str, Any], op: str) -> str:
    """``"cached 4: AVX-512 VNNI"``."""
    said = device["engines"].get(op)
    return cell(device["ops"].get(op, {"-": 1})) + (f": {said}" if said else "")


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side."""
    wide = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(f"{c:{w}}" for c, w in zip(row, wide, strict=True)).rstrip() for row in rows)


def tests(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Rows of the self-test: op x device, cases, times."""
    head = ["op", "device", "right", "kernel", "ms", "reference ms", "first call s"]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["op"], result["device"]), []).append(result)
    rows = []
    for (op, device), cases in groups.items():
        states: dict[str, int] = {}
        for case in cases:
            states[case.get("state") or "-"] = states.get(case.get("state") or "-", 0) + 1
        right = sum(not case["error"] for case in cases)
        sums = [sum(case.get(name, 0) for case in cases) for name in ("ours", "reference", "seconds")]
        engine = next((case["engine"] for case in reversed(cases) if case.get("engine")), "")
        rows.append([op, device, f"{right} of {len(cases)}", cell(states) + (f": {engine}" if engine else "")])
        rows[-1] += [f"{sums[0]:.1f}", f"{sums[1]:.1f}", f"{sums[2]:.1f}"]
    return [head, *rows]


def markdown(findings: Sequence[Finding], rows: Sequence[Sequence[Sequence[str]]]) -> str:
    """For a bug report: tables, without what is private."""
    said = [[f.level, f.subject, f.text + (f" `{f.command}`" if f.command else "")] for f in findings]
    parts = ["### lowbit doctor", _table([["", "subject", "finding"], *said]), *map(_table, rows)]
    return without_private("\n\n".join(parts))


def _table(rows: Sequence[Sequence[str]]) -> str:
    def line(row: Sequence[str]) -> str:
        return "| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in row) + " |"

    return "\n".join([line(rows[0]), "|" + " --- |" * len(rows[0]), *map(line, rows[1:])])


def without_private(text: str) -> str:
    """Home and other folders, user and host names replaced: only a path's last part is left."""
    home = os.path.expanduser("~")
    if len(home) > 1:
        text = re.sub(re.escape(home) + r"(?=[/\s'\":;,)]|$)", "~", text)
    text = text.replace(sys.prefix, "$PREFIX") if len(sys.prefix) > 1 else text
    public = r"(?:usr|bin|lib|lib64|opt|etc|dev|proc|sys|tmp|var/tmp|run)(?![\w-])"
    text = re.sub(rf"(?<![\w.$~/:>])/(?!{public})(?:[^/\s'\"`:;,()|]+/)+", ".../", text)
    for name in filter(None, (_user(), socket.gethostname())):
        if len(name) > 2 and name not in ("root", "localhost"):
            text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "...", text)
    return text


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return ""
