"""The report of a run again, or several runs side by side. RUN: a run's folder, its report.json, or a folder of runs,
whose newest is taken. callbacks.RunReport writes them during training."""

from __future__ import annotations

import argparse
from pathlib import Path

from lowbit_command.report.compare import compare
from lowbit_command.report.page import page
from lowbit_command.report.record import load


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="one to six runs")
    parser.add_argument("-o", "--output", default=None, metavar="FILE", help="the file of HTML (comparison.html)")


def run(args: argparse.Namespace) -> int:
    records = [load(found) for found in args.runs]
    made = page(records[0]) if len(records) == 1 else compare(records)
    output = Path(args.output or ("report.html" if len(records) == 1 else "comparison.html"))
    output.write_text(made, encoding="utf-8")
    print(output)
    return 0
