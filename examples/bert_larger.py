"""Which BERT can be trained in a given memory, in three ways: planned, then tried under a limit that is enforced.

    python examples/bert_larger.py                      # in 1.5 GB
    python examples/bert_larger.py --budget 8GB --batch 16 --length 128
    python examples/bert_larger.py --budget 1.5GB --way int8-mixed --shape base        # one try

``memory.plan`` says what each of five published shapes of BERT takes to train: in fp32 with AdamW, in int8-mixed with
8-bit AdamW, and in nf4 with adapters. Of each way the largest that fits is then trained for two steps. The other ways
try it too, if it should not fit in them. Weights are random: this is about memory.

Each try is a process of its own on the CPU. Once Python and its libraries are loaded and have run, the process's memory
may grow by the budget and no further: RLIMIT_DATA of Linux, which counts private writable memory, used or not. The exit
status is 1 if a try ends otherwise than planned.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from typing import Any

import running
import torch
from bert_limit import free_at_once, limit_memory, refusal
from bert_ways import Batch, planned, quiet, train, ways
from torch import nn
from transformers import AutoModelForSequenceClassification, BertConfig

from lowbit_lightning.convert import empty_parameters
from lowbit_lightning.optim.options import parse_bytes

SHAPES = {  # layers and width of Turc et al., 2019; Sanh et al., 2019; Devlin et al., 2018; Shoeybi et al., 2019
    "medium": (8, 512),
    "distilled": (6, 768),
    "base": (12, 768),
    "large": (24, 1024),
    "1.3B": (24, 2048),
}
WAYS = {name: way for name, way in ways(lr=1e-4, lora_lr=1e-3).items() if name != "fp32 + LoRA"}
STEPS = 2


@dataclasses.dataclass
class Try:
    """``planned``, ``peak``: bytes, beside Python and its libraries. ``failed``: what the allocator said, or None."""

    way: str
    shape: str
    planned: int
    fits: bool
    peak: int = 0
    seconds: float = 0.0
    failed: str | None = None

    @property
    def ending(self) -> str:
        if not self.seconds:
            return "fits" if self.fits else "does not fit"
        return "out of memory" if self.failed else "**trained**"

    def __str__(self) -> str:
        ended = f"out of memory: {self.failed}" if self.failed else f"trained, {self.peak / 1e9:.2f} GB at the peak"
        return f"BERT {self.shape}, {self.way}: planned {self.planned / 1e9:.2f} GB; {ended} ({self.seconds:.0f} s)"


def empty(layers: int, width: int, within: AbstractContextManager[Any]) -> nn.Module:
    """A BERT whose parameters take no memory, built ``within`` what sees to that."""
    heads = width // 64
    config = BertConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width
    )
    with within:
        model: nn.Module = AutoModelForSequenceClassification.from_config(config)
    return model


def random_batch(size: int, length: int) -> Batch:
    ids = torch.randint(1000, (size, length))
    return ids, torch.ones_like(ids), torch.randint(2, (size,))


def plans(budget: int, batch: Batch) -> list[Try]:
    """Of every shape in every way, what is to be expected."""
    found = []
    for shape, sizes in SHAPES.items():
        for name, way in WAYS.items():
            plan = planned(way.prepare(empty(*sizes, torch.device("meta"))), way, batch)
            found.append(Try(name, shape, plan.total, plan.fits(budget)))
    return found


def chosen(found: list[Try]) -> list[Try]:
    """Of each way the largest that fits, and, of the same shapes, those that don't."""
    largest = {one.way: one.shape for one in found if one.fits}
    shapes = set(largest.values())
    return [one for one in found if one.shape in shapes and (not one.fits or one.shape == largest[one.way])]


# -- one try, in this process ------------------------------------------------------------------------------------------


def attempt(name: str, sizes: tuple[int, int], batch: Batch) -> nn.Module:
    """Weights become random ones layer by layer: a low-bit model is never held in high precision as a whole."""
    model = WAYS[name].prepare(empty(*sizes, empty_parameters()))
    for part in model.modules():
        reset = getattr(part, "reset_parameters", None)
        if reset is not None:
            part.to_empty(device="cpu", recurse=False)
            reset()
    losses = train(model, WAYS[name], [batch] * STEPS, accelerator="cpu")
    if not all(map(math.isfinite, losses)):
        raise SystemExit(f"the losses are {losses}")
    return model


def try_here(name: str, shape: str, budget: int, batch: Batch) -> dict[str, Any]:
    """``peak``, ``seconds`` and ``failed`` of a ``Try``."""
    free_at_once()
    attempt(name, (1, 64), batch)  # loads kernels, starts threads
    peak, start = running.Peak(), time.perf_counter()
    before = peak.bytes() or 0
    limit_memory(budget)
    failed = None
    try:
        attempt(name, SHAPES[shape], batch)
    except (RuntimeError, MemoryError) as error:
        failed = refusal(error)
        if failed is None:
            raise
    return {"peak": (peak.bytes() or 0) - before, "seconds": time.perf_counter() - start, "failed": failed}


# -- all ---------------------------------------------------------------------------------------------------------------


def carry_out(one: Try, budget: int, size: int, length: int) -> None:
    """In a process of its own; completes ``one``."""
    command = [sys.executable, __file__, "--budget", str(budget), "--batch", str(size), "--length", str(length)]
    done = subprocess.run(
        [*command, "--way", one.way, "--shape", one.shape], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{one.way}, BERT {one.shape}, ended with status {done.returncode}:\n{done.stderr}")
    for name, value in json.loads(done.stdout.splitlines()[-1]).items():
        setattr(one, name, value)


def table(found: list[Try], budget: int) -> str:
    """Markdown: planned bytes, whether they fit, and what came of the tries."""
    lines = [f"| BERT, in {budget / 1e9:g} GB | {' | '.join(WAYS)} |", "| --- |" + " ---: |" * len(WAYS)]
    for shape, (layers, width) in SHAPES.items():
        cells = [f"{one.planned / 1e9:.2f} GB, {one.ending}" for one in found if one.shape == shape]
        lines.append(f"| {shape}: {layers} layers of width {width} | {' | '.join(cells)} |")
    return "\n".join(lines)


def larger(budget: int, size: int = 4, length: int = 64) -> list[Try]:
    """Plans all, tries some; prints as it goes."""
    found = plans(budget, random_batch(size, length))
    for one in chosen(found):
        carry_out(one, budget, size, length)
        print(one, flush=True)
    return found


def complaints(found: list[Try]) -> list[str]:
    return [f"otherwise than planned: {one}" for one in found if one.seconds and one.fits != (one.failed is None)]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="1.5GB", help="memory beside Python and its libraries (default 1.5GB)")
    parser.add_argument("--batch", type=int, default=4, help="texts in a step (default 4)")
    parser.add_argument("--length", type=int, default=64, help="tokens of a text (default 64)")
    parser.add_argument("--way", choices=WAYS, help="with --shape: try this in this process, and print what came of it")
    parser.add_argument("--shape", choices=SHAPES)
    args = parser.parse_args(arguments)
    if bool(args.way) != bool(args.shape):
        parser.error("--way and --shape belong together")
    quiet()
    budget = parse_bytes(args.budget, "--budget")
    if args.way:
        print(json.dumps(try_here(args.way, args.shape, budget, random_batch(args.batch, args.length))))
        return 0
    found = larger(budget, args.batch, args.length)
    print(f"\n{table(found, budget)}")
    return running.status(complaints(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
