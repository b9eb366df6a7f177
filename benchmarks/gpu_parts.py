"""What a GPU shows, in order of worth: each part under two minutes, finished parts are not run again.

    python benchmarks/gpu_parts.py [--output docs/benchmarks] [--only correctness,step] [--again]

Parts: are all kernels right; the optimizer step and the other kernels against their predictions
(``gpu_predicted.py``); int8 products; paging; CUDA graphs; rivals, where they are installed. Each part is a process of
its own with a time limit. What it prints is written to ``OUTPUT/DATE-gpu-NAME/PART.md`` as soon as it ends.
``finished.json`` beside it says which parts are done: a run that was cut off goes on with the next one. ``--again``
forgets them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 120


@dataclass(frozen=True)
class Part:
    """Commands that run one after the other, within ``SECONDS`` together. ``{python}`` stands for this interpreter."""

    name: str
    commands: tuple[tuple[str, ...], ...]


def _tests(*files: str) -> tuple[str, ...]:
    return ("-m", "pytest", "-q", "-m", "gpu", *(f"tests/gpu/{name}" for name in files))


_LAYERS = ("-m", "pytest", "-q", "-m", "gpu", "tests/layers/test_int8.py", "tests/precision/test_int8.py")
PARTS = (
    Part("correctness", (_tests("test_cuda_gpu.py"),)),
    Part("correctness-layers", (_LAYERS,)),
    Part("correctness-low-bit", (_tests("test_lowbit_gpu.py"),)),
    Part("predictions-step", (("benchmarks/gpu_predicted.py", "--only", "adamw,lion,sgd"),)),
    Part("predictions-others", (("benchmarks/gpu_predicted.py", "--only", "quantize,int8,gemv"),)),
    Part("int8-product", (("benchmarks/int8_linear.py", "--budget", "4"),)),
    Part("paging", (_tests("test_pages_gpu.py", "test_paged_steps_gpu.py"), ("benchmarks/paging.py", "--budget", "8"))),
    Part("graphs", (_tests("test_optimizer_graph_gpu.py"),)),
    Part("rivals-step", (("benchmarks/optimizer_step.py", "--budget", "4"),)),
    Part("rivals-low-bit", (("benchmarks/lowbit_linear.py", "--budget", "2"),)),
    Part("int8-quantisers", (("benchmarks/int8_quantize.py", "--budget", "2"),)),
    Part("int8-convolutions", (("benchmarks/int8_conv.py", "--budget", "2"),)),
    Part("deepspeed", (_tests("test_deepspeed_gpu.py"),)),
)


@dataclass
class Outcome:
    """What a part printed, and why it failed, or an empty text."""

    printed: str
    failure: str
    seconds: float


def run(part: Part, seconds: float = SECONDS) -> Outcome:
    """Run a part's commands; what is left of them when the time is over is stopped."""
    start, printed = time.monotonic(), ""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for command in part.commands:
        left = seconds - (time.monotonic() - start)
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment,
            text=True,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        try:
            printed += process.communicate(timeout=max(left, 0.1))[0]
            failure = f"exit status {process.returncode}" if process.returncode else ""
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            printed += process.communicate()[0]
            failure = f"not done after {seconds:.0f} s"
        if failure:
            return Outcome(printed, f"{' '.join(command)}: {failure}", time.monotonic() - start)
    return Outcome(printed, "", time.monotonic() - start)


class Finished:
    """Which parts are done, in a file that is written after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.parts: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}

    def add(self, part: str, what: str) -> None:
        self.parts[part] = what
        self.path.write_text(json.dumps(self.parts, indent=1) + "\n")


def run_all(parts: Sequence[Part], folder: Path, seconds: float = SECONDS) -> int:
    """Run what is not finished; returns how many parts failed, in this run or before."""
    folder.mkdir(parents=True, exist_ok=True)
    finished = Finished(folder / "finished.json")
    for part in parts:
        if part.name in finished.parts:
            print(f"{part.name}: {finished.parts[part.name]} (before)", flush=True)
            continue
        print(f"{part.name} ...", end=" ", flush=True)
        outcome = run(part, seconds)
        what = outcome.failure or "done"
        text = f"# {part.name}\n\n{what}, {outcome.seconds:.0f} s\n\n````text\n{outcome.printed.rstrip()}\n````\n"
        (folder / f"{part.name}.md").write_text(text)
        finished.add(part.name, what)
        print(f"{what}, {outcome.seconds:.0f} s", flush=True)
    print(f"written to {folder}")
    return sum(finished.parts[part.name] != "done" for part in parts)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "benchmarks")
    parser.add_argument("--only", default="", help="comma-separated parts of names")
    parser.add_argument("--again", action="store_true", help="run finished parts too")
    args = parser.parse_args(arguments)
    import torch

    if not torch.cuda.is_available():
        print("torch sees no CUDA device; `make cuda-roofline` predicts what one would show")
        return 1
    name = torch.cuda.get_device_name().lower().replace(" ", "-")
    # The newest folder of this GPU: a run goes on where one of before was cut off, even on another day.
    folder = max(args.output.glob(f"*-gpu-{name}"), default=None)
    if folder is None or args.again:
        folder = args.output / f"{datetime.date.today()}-gpu-{name}"
        (folder / "finished.json").unlink(missing_ok=True)
    wanted = [part for part in PARTS if any(word in part.name for word in args.only.split(","))]
    return run_all(wanted, folder)


if __name__ == "__main__":
    sys.exit(main())
