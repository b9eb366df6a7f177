"""What the benchmarks share: the machine in words, fair timing, the bandwidth to compare with, and the report.

Rivals are measured in the same process and the same run, in turns: one call of each, then the next round. A machine
that slows down, or is shared, then slows all of them, and ratios stay meaningful where times do not.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.metadata
import logging
import os
import platform
import random
import statistics
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
ISA = {
    *("avx2", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8"),
    *("asimddp", "i8mm", "bf16"),
}
PACKAGES = ("torch", "lightning", "bitsandbytes", "torchao", "triton", "cuda-core", "numpy")
HOW_TO_READ = (
    "Times are medians of rounds in which all take turns, spread is the middle half of them, best the shortest;"
    " a ratio above 1x means faster than its base."
)

# Of rivals, about themselves: nothing that bears on a result.
warnings.filterwarnings("ignore", module=r"torchao|bitsandbytes|torch\._functorch|torch\._inductor")
for _name in ("torchao", "bitsandbytes", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)


# -- arguments and report --------------------------------------------------------------------------------------------


def parser(description: str | None) -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    available = "cuda" if torch.cuda.is_available() else "cpu"
    result.add_argument("--device", choices=("cpu", "cuda"), default=available, help=f"default here: {available}")
    result.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads, for every rival")
    result.add_argument("--repeats", type=int, default=15, help="rounds in which every rival is measured once")
    result.add_argument("--cpu-time", action="store_true", help="of one thread, where other programs share the machine")
    result.add_argument("--budget", type=float, default=60, help="seconds for one rival in one case, after warm-up")
    result.add_argument("--only", default="", help="comma-separated parts of names: measure only these rivals")
    result.add_argument("--output", type=Path, help="a Markdown file to write, or a folder to write a dated one into")
    return result


class Report:
    """Prints as it goes, and writes all of it to a file in the end."""

    def __init__(self, title: str, arguments: argparse.Namespace) -> None:
        if getattr(arguments, "cpu_time", False):
            arguments.threads = 1
            _CLOCK[0] = time.thread_time
        torch.set_num_threads(arguments.threads)
        self.arguments = arguments
        self.name = title.replace(" ", "-").lower()
        self.lines: list[str] = []
        self.add(f"# {title}, {arguments.device}, {datetime.date.today()}", "")
        self.add(*machine(arguments.device), "")
        if getattr(arguments, "cpu_time", False):
            self.add("Times are the CPU time of one thread: other programs shared the machine.", "")

    def add(self, *lines: str) -> None:
        for text in lines:
            row = text.startswith("|")  # of a table: one line, however long
            for line in [text] if row else textwrap.wrap(text, 118) or [""]:
                print(line, flush=True)
                self.lines.append(line)

    def table(self, header: list[str], rows: list[list[str]]) -> None:
        cells = [header, *rows]
        widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
        lines = []
        for first, *others in cells:
            right = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
            lines.append("| " + " | ".join([first.ljust(widths[0]), *right]) + " |")
        rule = "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths))
        self.add(lines[0], f"|{rule}|", *lines[1:], "")

    def save(self) -> None:
        path = self.arguments.output
        if path is None:
            return
        if path.suffix != ".md":
            path = path / f"{datetime.date.today()}-{self.name}-{self.arguments.device}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(self.lines).rstrip() + "\n")
        print(f"written to {path}")


def machine(device: str) -> list[str]:
    """Hardware, instruction sets, versions, threads: what a figure means nothing without."""
    lines = [f"- processor: {_processor()}, {os.cpu_count()} cores seen, {torch.get_num_threads()} threads used"]
    lines.append(f"- instruction sets: {' '.join(sorted(_flags() & ISA)) or platform.machine()}")
    lines.append(f"- torch's own choice of instructions: {torch.backends.cpu.get_cpu_capability()}")
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        sizes = f"{gpu.total_memory / 2**30:.0f} GiB, {gpu.multi_processor_count} multiprocessors"
        lines.append(f"- GPU: {gpu.name}, sm_{gpu.major}{gpu.minor}, {sizes}, CUDA {torch.version.cuda}")
    lines.append(f"- python {platform.python_version()}, {', '.join(_versions())}")
    lines.append(f"- lowbit_lightning at {_commit()}; load when started: {os.getloadavg()[0]:.1f}")
    return lines


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = {line.split(":", 1)[0].strip(): line.split(":", 1)[1].strip() for line in lines if ":" in line}
    known = [f"{key} {names[key]}" for key in ("cpu family", "model") if key in names]
    return f"{names.get('model name', platform.machine())} ({', '.join(known)})"


def _flags() -> set[str]:
    try:
        return set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return set()


def _versions() -> list[str]:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "an unknown commit"


_CLOCK = [time.perf_counter]

# -- timing ----------------------------------------------------------------------------------------------------------


@dataclass
class Candidate:
    """Something to measure. ``build`` makes what ``run`` needs and returns ``run``; it may raise: that is reported."""

    name: str
    build: Callable[[], Callable[[], object]]
    run: Callable[[], object] | None = None
    seconds: list[float] = field(default_factory=list)
    skipped: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        return min(self.seconds)

    @property
    def spread(self) -> str:
        """The middle half of the measurements, as percent of the median."""
        if len(self.seconds) < 4:
            return "-"
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return f"{100 * (high - low) / self.median:.0f} %"


def measure(candidates: list[Candidate], arguments: argparse.Namespace) -> list[Candidate]:
    """Build and warm up every candidate, then take turns, in another order in every round: what a step leaves behind in
    caches and threads is then nobody's lot. Returns those that ran; the others say why in ``skipped``."""
    wanted = [part for part in arguments.only.split(",") if part]
    for candidate in candidates:
        if wanted and not any(part in candidate.name for part in wanted):
            candidate.skipped = "left out by --only"
            continue
        try:
            candidate.run = candidate.build()
            _warm_up(candidate, arguments)
        except Exception as error:  # a rival's, of any kind: it is in the report, and the others are still measured
            first = (str(error).strip().splitlines() or [""])[0]
            candidate.run, candidate.skipped = None, f"{type(error).__name__}: {first[:200]}"
    running = [c for c in candidates if c.run]
    calls = 1 if arguments.device == "cpu" else 5  # so that a GPU has work queued
    order = random.Random(0)
    for _ in range(arguments.repeats):
        for candidate in order.sample(running, len(running)):
            if not candidate.seconds or sum(candidate.seconds) + calls * candidate.seconds[-1] < arguments.budget:
                candidate.seconds.append(seconds(candidate.run, arguments.device, calls))
    return running


def _warm_up(candidate: Candidate, arguments: argparse.Namespace) -> None:
    """Two calls, in which things get compiled and allocated; a third unless it would take long."""
    first = seconds(candidate.run, arguments.device)
    second = seconds(candidate.run, arguments.device)
    if second < arguments.budget / 10:
        seconds(candidate.run, arguments.device)
    print(f"{candidate.name}: first call {first:.2f} s, second {second:.3f} s", file=sys.stderr, flush=True)


def seconds(run: Callable[[], object] | None, device: str, calls: int = 1) -> float:
    """How long one call takes: wall clock on CPU, events on the stream on CUDA."""
    assert run is not None
    if device == "cpu":
        start = _CLOCK[0]()
        for _ in range(calls):
            run()
        return (_CLOCK[0]() - start) / calls
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    first.record()
    for _ in range(calls):
        run()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1000 / calls


def skipped(candidates: list[Candidate]) -> list[str]:
    """A line for each candidate that was not measured."""
    lines = [f"- not measured: {c.name} ({c.skipped})" for c in candidates if c.skipped]
    return [*lines, ""] if lines else []


def rival(module: str, attribute: str) -> Callable[..., object]:
    """``module.attribute``, or an error that says what is missing."""
    try:
        return getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise ImportError(f"{error}; pip install 'lowbit-lightning[benchmarks]' brings it") from error


def copy_bandwidth(arguments: argparse.Namespace, megabytes: int = 512) -> float:
    """Bytes per second, read plus written, of a copy between two buffers larger than any cache."""
    source = torch.ones(megabytes << 18, device=arguments.device)
    target = torch.zeros_like(source)
    runs = [seconds(lambda: target.copy_(source), arguments.device) for _ in range(9)]
    return 2 * source.numel() * source.element_size() / statistics.median(runs[2:])
