"""What is wrong with this installation, and the command that mends it.

Exit status: 0 all is well, 1 there are warnings, 3 there are failures (2: an argument is invalid). docs/doctor.md lists
the lines.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from lowbit_command.doctor import examine, selftest, show
from lowbit_command.doctor.finding import Finding, exit_status, fail


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--full", action="store_true", help="also test every kernel on every device; takes minutes")
    parser.add_argument("--json", action="store_true", help="findings, facts and tables as JSON")
    parser.add_argument("--markdown", action="store_true", help="for a bug report: without private paths and names")


def run(args: argparse.Namespace) -> int:
    if args.json and args.markdown:
        raise ValueError("--json and --markdown exclude each other; give one of them")
    found = examine.examine()
    tested = selftest.run(_progress) if args.full else []
    findings = found.findings + [_wrong(result) for result in tested if result["error"]]
    tables = [show.grid(found.devices)] if found.devices else []
    tables += [show.tests(tested)] if tested else []
    if args.json:
        told = {"status": exit_status(findings), "findings": [vars(f) for f in findings], "facts": found.facts}
        print(json.dumps(told | {"devices": found.devices, "tests": tested}, indent=2))
    elif args.markdown:
        print(show.markdown(findings, tables))
    else:
        parts = [show.lines(findings, sys.stdout.isatty()), *map(show.table, tables), show.summary(findings)]
        print("\n\n".join(parts))
    return exit_status(findings)


def _wrong(result: dict[str, Any]) -> Finding:
    text = f"{result['op']} ({result['name']}) on {result['device']}: {result['error']}"
    return fail("self-test", text, "lowbit doctor --full --markdown > bug-report.md")


def _progress(result: dict[str, Any]) -> None:
    """One line that is overwritten on a terminal; elsewhere only what is wrong."""
    place = f"{result.get('case', 0) + 1} of {result.get('of', '?')}"
    if "error" not in result:
        if sys.stderr.isatty():
            said = f"{place}: {result['op']} ({result['name']}) on {result['device']}"
            print(f"\r\x1b[K{said}", end="", file=sys.stderr, flush=True)
        return
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr)
    if result["error"]:
        print(f"{place}: {result['op']} ({result['name']}): {result['error']}", file=sys.stderr, flush=True)
