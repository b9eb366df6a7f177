"""Runs all benchmarks, each in a size for a quarter of an hour in all on two cores, and writes one dated report.

    python benchmarks/run_all.py [--only int8,paging] [--output docs/benchmarks]

Each part is a process of its own with a time limit. Rivals are measured where they are installed. A part that fails or
takes too long doesn't stop the others: the report says so, and what it last printed. For full sizes run a part alone.
The exit status is the number of parts that gave no result.
"""

from __future__ import annotations

import argparse
import datetime
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from _bars import Panel, draw

HERE = Path(__file__).parent
RIVAL = re.compile(r"torch|bitsandbytes|F\.linear|fp32|bf16|32-true|bare")


@dataclass(frozen=True)
class Part:
    """A benchmark in a small size, and the seconds that it may take."""

    script: str
    arguments: tuple[str, ...]
    seconds: int


PARTS = (
    Part("optimizer_step.py", ("--cases", "big,model", "--repeats", "7", "--budget", "4"), 140),
    Part("default_precision.py", ("--repeats", "5", "--budget", "8"), 110),
    Part("int8_linear.py", ("--shapes", "2048x1024x4096", "--repeats", "7", "--budget", "4"), 80),
    Part("int8_conv.py", ("--parts", "layers,bytes", "--kernels", "3", "--repeats", "5", "--budget", "2"), 60),
    Part("experts.py", ("--widths", "512", "--repeats", "5", "--budget", "1"), 40),
    Part("int8_quantize.py", ("--shapes", "2048x4096", "--dtypes", "bfloat16", "--repeats", "7", "--budget", "2"), 60),
    Part("lowbit_linear.py", ("--shapes", "4096x4096", "--repeats", "15", "--budget", "2"), 80),
    Part("paging.py", ("--millions", "32", "--repeats", "5", "--budget", "8"), 60),
    Part("int8_quality.py", ("--seeds", "1", "--steps", "200", "--only", "none"), 110),
    Part("lowbit_quality.py", ("--only", "bert"), 80),
    Part("optimizer_quality.py", ("--quick",), 80),
)
# What does not fit into a quarter of an hour, or measures no speed on this machine.
ALONE = {
    "bitsandbytes_tests.py": "runs another project's tests",
    "cuda_roofline.py": "reads compiled CUDA kernels",
    "gpu_parts.py": "runs the others on a GPU",
    "gpu_predicted.py": "needs a GPU",
    "int8_vision_quality.py": "trains for long: make quality",
}


@dataclass
class Outcome:
    """What a part gave: a report in Markdown, or the reason why there is none."""

    part: Part
    seconds: float
    report: str = ""
    failure: str = ""


def run(part: Part, folder: Path) -> Outcome:
    """Start a part, wait for it, and keep its report even if its own checks fail."""
    name = part.script.removesuffix(".py")
    output = folder / name / "report.md"
    output.parent.mkdir()
    given = output.parent if name == "optimizer_quality" else output  # that one writes pictures too
    command = [sys.executable, str(HERE / part.script), *part.arguments, "--output", str(given)]
    start, log = time.perf_counter(), output.parent / "log.txt"
    with log.open("w") as printed:
        process = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(part.seconds)
            failure = f"exit status {status}" if status else ""
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            failure = f"stopped after {part.seconds} s"
    if failure:
        failure += f"; it last printed: {_last_line(log.read_text())}"
    reports = sorted(output.parent.glob("*.md"))
    return Outcome(part, time.perf_counter() - start, reports[0].read_text() if reports else "", failure)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "nothing"


def title(part: Part) -> str:
    return part.script.removesuffix(".py").replace("_", " ")


def panels(outcome: Outcome) -> list[Panel]:
    """Bars of the part's first table that has milliseconds; none where it has none."""
    heading = ""
    names: list[str] = []
    bars: list[tuple[str, float, bool]] = []
    for line in outcome.report.splitlines():
        if line.startswith("## "):
            heading = line[3:]
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if "ms" in cells and not names:
            names = cells
        elif names and cells and not set(cells[0]) <= set("-: "):
            value = cells[names.index("ms")]
            if re.fullmatch(r"[\d.,]+", value):
                bars.append((cells[0], float(value.replace(",", "")), not RIVAL.search(cells[0])))
        elif bars:
            break
    return [Panel(title(outcome.part), heading[:50], "ms", bars)] if bars else []


def written(outcomes: list[Outcome], head: str, picture: str) -> str:
    """The report: the machine, a table of parts, a picture, and each part's own report."""
    rows = ["| part | seconds | result |", "| --- | ---: | --- |"]
    for each in outcomes:
        result = each.failure or "measured"
        rows.append(f"| [{title(each.part)}](#{title(each.part).replace(' ', '-')}) | {each.seconds:.0f} | {result} |")
    lines = [head, "", *rows, ""]
    if picture:
        lines += [f"![Milliseconds of each contender, by part]({picture})", ""]
    for each in outcomes:
        command = " ".join(["python", f"benchmarks/{each.part.script}", *each.part.arguments])
        lines += [f"## {title(each.part)}", "", f"`{command}`", ""]
        lines += [f"No result: {each.failure}.", ""] if not each.report else [demoted(each.report), ""]
    return "\n".join(lines).rstrip() + "\n"


def demoted(report: str) -> str:
    """A part's report without its title and the lines about the machine, its headings one level down."""
    machine = r"^- (processor|instruction sets|torch's own|GPU|python|lowbit_lightning at).*\n"
    body = re.sub(machine, "", re.sub(r"\A# .*\n", "", report), flags=re.MULTILINE)
    body = re.sub(r"^!\[.*\n", "", body, flags=re.MULTILINE)  # a part's own pictures stay behind
    return re.sub(r"^#", "##", body, flags=re.MULTILINE).strip()


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", default="", help="comma-separated parts of names: run only these")
    options.add_argument("--output", type=Path, default=HERE.parent / "docs" / "benchmarks", help="a folder")
    arguments = options.parse_args()
    wanted = [word for word in arguments.only.split(",") if word]
    parts = [part for part in PARTS if not wanted or any(word in part.script for word in wanted)]
    if not parts:
        options.error(f"--only {arguments.only}: no part has such a name; there are {[p.script for p in PARTS]}")
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            print(f"{title(part)}: at most {part.seconds} s", flush=True)
            outcomes.append(run(part, Path(folder)))
            print(f"  {outcomes[-1].failure or 'measured'}, {outcomes[-1].seconds:.0f} s", flush=True)
    return save(outcomes, arguments.output)


def save(outcomes: list[Outcome], folder: Path) -> int:
    """Write the report and its picture; returns how many parts gave no result."""
    import torch
    from _common import machine  # here: parts that hang or fail must not cost the import

    device = "cuda" if torch.cuda.is_available() else "cpu"
    today = datetime.date.today()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{today}-all-{device}.md"
    drawn = [panel for outcome in outcomes for panel in panels(outcome)]
    if drawn:
        file.with_suffix(".svg").write_text(draw(drawn, "light", ground="#ffffff"))
    head = "\n".join([f"# all benchmarks, {device}, {today}", "", *machine(device)])
    file.write_text(written(outcomes, head, file.with_suffix(".svg").name if drawn else ""))
    print(f"written to {file}")
    return sum(not outcome.report for outcome in outcomes)


if __name__ == "__main__":
    sys.exit(main())
