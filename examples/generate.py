"""Lets one model write the same text in fp32, in bf16 and in 8 to 2 bits: the texts side by side, speed and memory.

    python examples/generate.py                                    # trains a small GPT first; minutes on two cores
    python examples/generate.py --model runs/generate/gpt.ckpt     # the one that was trained; or train_gpt.py's
    python examples/generate.py --model HuggingFaceTB/SmolLM2-135M --prompt "Once upon a time"      # any of the hub
    python examples/generate.py --shape llama-1b                   # random weights: speed and memory alone

Every form of the model begins with the same prompt and draws its tokens with the same random numbers, so that texts
part only where the models differ. Keys and values of earlier tokens are kept, so each step reads every weight once, for
one row of input: that is what low bits speed up.

It tells, for each form: tokens per second (from the median step), the bytes of the weights, the peak of memory while it
writes (of the whole process, or of the GPU), perplexity on held-out text, and for how many tokens the text is that of
the first form. Results land in ``--out``: results.json, generate.md with the texts.

``generate_models.py`` holds the models.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import running
import torch
from generate_models import FLOATS, PROMPT, Bytes, Hub, Shape, Source, train
from gpt_settings import Settings
from torch import Tensor
from torch.nn.functional import cross_entropy

from lowbit_lightning.kernels.formats import weight_format

FORMS = "fp32,bf16,int8,nf4,int4,int3,int2"


@dataclass
class Result:
    """Of one form. ``peak``: bytes, None where the system doesn't tell; ``perplexity``: None without held-out text."""

    form: str
    tokens_per_second: float
    weights: int
    peak: int | None
    perplexity: float | None
    tokens: list[int]
    text: str


def write(
    read: Callable[[Tensor], Tensor], prompt: Tensor, count: int, temperature: float, seed: int
) -> tuple[list[int], float]:
    """``count`` tokens after the prompt ``[1, length]``, and the median of the seconds that one takes.
    ``temperature``: 0 takes the likeliest token; 1 draws by the model's probabilities, less prefers likely ones."""
    generator = torch.Generator().manual_seed(seed)
    logits, tokens, seconds = read(prompt)[0, -1], list[int](), list[float]()
    for _ in range(count):
        started = time.perf_counter()
        if temperature:
            chances = (logits.cpu() / temperature).softmax(-1)
            tokens.append(int(torch.multinomial(chances, 1, generator=generator)))
        else:
            tokens.append(int(logits.argmax()))
        logits = read(prompt.new_tensor([[tokens[-1]]]))[0, -1]
        seconds.append(time.perf_counter() - started)
    return tokens, statistics.median(seconds)


def perplexity(source: Source, model: torch.nn.Module, windows: int, device: str) -> float | None:
    """Of held-out text: e to the mean loss of a token."""
    total, count = 0.0, 0
    for batch in source.held_out(windows):
        logits = source.reader(model)(batch[:, :-1].to(device))
        total += float(cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten().to(device), reduction="sum"))
        count += batch[:, 1:].numel()
    return float(torch.tensor(total / count).exp()) if count else None


@torch.no_grad()
def measure(source: Source, form: str, args: argparse.Namespace) -> Result:
    gc.collect()  # the model before this one
    model = source.load(form, None if args.head == "bf16" else args.head).to(args.device)
    prompt = source.encode(args.prompt).to(args.device)
    write(source.reader(model), prompt, 3, 0.0, 1)  # kernels are compiled, caches filled
    peak = running.Peak(args.device)
    tokens, seconds = write(source.reader(model), prompt, args.tokens, args.temperature, args.seed)
    return Result(
        form=form,
        tokens_per_second=1 / seconds,
        weights=sum(p.nbytes for p in model.parameters()),
        peak=peak.bytes(),
        perplexity=perplexity(source, model, args.windows, args.device),
        tokens=tokens,
        text=source.decode(tokens),
    )


# -- what it says ----------------------------------------------------------------------------------------------------


def table(results: list[Result]) -> str:
    first = results[0]
    base = next((r for r in results if r.form == "bf16"), first)
    columns: dict[str, Callable[[Result], str]] = {
        "weights in": lambda r: r.form,
        "tokens per second": lambda r: f"{r.tokens_per_second:,.1f}",
        f"beside {base.form}": lambda r: f"{r.tokens_per_second / base.tokens_per_second:.2f}x",
        "weights, MB": lambda r: f"{r.weights / 1e6:,.1f}",
        "peak, MB": lambda r: "-" if r.peak is None else f"{r.peak / 1e6:,.0f}",
    }
    if first.perplexity is not None:
        columns["perplexity"] = lambda r: f"{r.perplexity:.3f}"
        columns[f"tokens as in {first.form}"] = lambda r: f"{common(first.tokens, r.tokens)} of {len(r.tokens)}"
    rows = [list(columns), ["---", *["---:"] * (len(columns) - 1)]]
    rows += [[cell(r) for cell in columns.values()] for r in results]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def common(first: list[int], second: list[int]) -> int:
    """Tokens before the first that differs."""
    return next((i for i, (a, b) in enumerate(zip(first, second, strict=True)) if a != b), len(first))


def texts(results: list[Result], prompt: str) -> str:
    return "\n".join(f"### {r.form}\n\n```text\n{prompt}{r.text}\n```\n" for r in results)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", default="", help="checkpoint of train_gpt.py; or a name of the hub, or a folder")
    which.add_argument("--shape", choices=sorted(Shape.KNOWN), help="random weights in the shape of a real model")
    parser.add_argument("--forms", default="", help=f"comma-separated; default {FORMS}, of a shape without fp32")
    parser.add_argument("--head", default="int8", help="form of the output layer of low-bit forms, bf16 leaves it")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--tokens", type=int, help="to write (default 400, of a shape 40)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest token (default 0.8)")
    parser.add_argument("--seed", type=int, default=1, help="of the tokens that are drawn (default 1)")
    parser.add_argument("--text", default="", help="to train on and hold out; default: Python's standard library")
    parser.add_argument("--context", type=int, default=128, help="tokens of a window of held-out text (default 128)")
    parser.add_argument("--windows", type=int, default=256, help="of held-out text (default 256)")
    parser.add_argument("--steps", type=int, default=600, help="of training, without --model (default 600)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/generate"))
    args = parser.parse_args(arguments)
    args.tokens = args.tokens or (40 if args.shape else 400)
    args.forms = (args.forms or FORMS.removeprefix("fp32," if args.shape else "")).split(",")
    if min(args.tokens, args.context - 1, args.windows, args.steps) < 1 or args.temperature < 0 or not args.prompt:
        parser.error("--tokens, --windows, --steps >= 1, --context >= 2, --temperature >= 0 and a --prompt are needed")
    for form in (*args.forms, args.head):
        if form not in FLOATS:
            try:
                weight_format(form)
            except ValueError as error:
                parser.error(f"a form is {', '.join(FLOATS)} or a format: {error}")
    return args


def source_of(args: argparse.Namespace) -> Source:
    if args.shape:
        return Shape(args.shape)
    if args.model and not args.model.endswith(".ckpt"):
        return Hub(args.model, args.text, args.context)
    if not args.model:
        settings = Settings(text=args.text, out=str(args.out), context=args.context, steps=args.steps)
        print(f"training a GPT for {args.steps} steps; --model {args.out}/gpt.ckpt takes it the next time", flush=True)
        args.model = train(settings)
    return Bytes(args.model, args.text, args.context)


def main(arguments: list[str]) -> int:
    args = parse(arguments)
    running.quiet()
    args.out.mkdir(parents=True, exist_ok=True)
    source = source_of(args)
    results = []
    for form in args.forms:
        results.append(measure(source, form, args))
        print(f"{form}: {results[-1].tokens_per_second:.1f} tokens per second", flush=True)
    report = f"{source.name}\n\n{table(results)}\n"
    written = "" if args.shape else f"\n{texts(results, args.prompt)}"
    running.save(args.out, args, report + written, "generate.md", results=[asdict(r) for r in results])
    print(f"\n{report}{written}\nin {args.out}: generate.md, results.json")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
