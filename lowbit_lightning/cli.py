"""The command line: ``lowbit plan package.module:factory --world-size 8 --memory 80GiB``.

Exit status: 0, 1 if the plan does not fit in ``--memory``, 2 for an argument that is of no use.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_lightning import memory
from lowbit_lightning.memory.settings import PRECISIONS, STRATEGIES
from lowbit_lightning.optim.options import parse_bytes

_PAGED: dict[str, Any] = {"host": True, "disk": "disk"}


class FactoryError(ValueError):
    """The user's own code, which makes the model, raised; its exception is the cause."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its result goes to stdout, errors to stderr."""
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        return args.run(args)
    except FactoryError as error:
        traceback.print_exception(error.__cause__)
        print(f"lowbit {args.command}: {error}", file=sys.stderr)
        return 2
    except (ValueError, TypeError) as error:
        print(f"lowbit {args.command}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lowbit", description="Training in low-bit arithmetic.")
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser(
        "plan",
        help="bytes per device of a training run, before anything is allocated",
        description="Bytes per device of a training run, before anything is allocated.",
        epilog="docs/memory.md says what is exact and what is estimated.",
    )
    plan.set_defaults(run=_plan)
    plan.add_argument("model", help="package.module:factory, a callable or class that makes the model")
    plan.add_argument("--world-size", type=int, default=1, metavar="N", help="number of ranks (default 1)")
    plan.add_argument("--strategy", choices=STRATEGIES, help="default: single on one rank, sharded on more")
    plan.add_argument("--precision", choices=PRECISIONS, default="32-true", help="default 32-true")
    plan.add_argument("--optimizer", default="AdamW", help="of lowbit_lightning.optim, with --bits none of torch.optim")
    plan.add_argument("--bits", choices=("8", "32", "none"), default="8", help="of optimizer states (default 8)")
    plan.add_argument("--min-size", type=int, metavar="N", help="parameters with fewer elements stay in 32 bits")
    plan.add_argument("--block-size", type=int, metavar="N", help="elements that share a scale")
    plan.add_argument("--master", choices=("bf16+8",), help="a 24-bit master copy of bfloat16 parameters")
    plan.add_argument("--paged", choices=tuple(_PAGED), help="where optimizer states lie that are paged")
    plan.add_argument("--resident", default=0, metavar="SIZE", help="of paged states that stay near, as 512MiB")
    plan.add_argument("--replicas", type=int, default=1, metavar="N", help="groups of ranks with a copy each (HSDP)")
    plan.add_argument("--zero2", action="store_true", help="parameters stay gathered from forward to backward")
    plan.add_argument("--all-gather", choices=("high", "int8"), default="high", help="how sharded parameters travel")
    plan.add_argument("--accumulate", type=int, default=1, metavar="N", help="micro-batches in a step (default 1)")
    plan.add_argument("--activation-checkpointing", action="store_true", help="of the repeated blocks")
    plan.add_argument("--batch", help="the model's inputs, for activations: 8x1024:int64,8x1024:int64")
    plan.add_argument("--memory", help="a device's, as 80GiB or 80e9; says what to change if it does not fit")
    plan.add_argument("--json", action="store_true", help="JSON instead of a table")
    return parser


def _plan(args: argparse.Namespace) -> int:
    limit = None if args.memory is None else parse_bytes(args.memory, "memory")
    named = ("min_size", "block_size", "master")
    options = {name: getattr(args, name) for name in named if getattr(args, name) is not None}
    result = memory.plan(
        make_model(args.model),
        world_size=args.world_size,
        strategy=args.strategy or ("sharded" if args.world_size > 1 else "single"),
        precision=args.precision,
        optimizer=args.optimizer,
        bits=None if args.bits == "none" else int(args.bits),
        batch=None if args.batch is None else parse_batch(args.batch),
        accumulate=args.accumulate,
        reshard_after_forward=not args.zero2,
        replicas=args.replicas,
        activation_checkpointing=args.activation_checkpointing,
        all_gather=args.all_gather,
        paged=_PAGED.get(args.paged, False),
        resident=args.resident,
        **options,
    )
    fits = limit is None or result.fits(limit)
    if args.json:
        found: dict[str, Any] = result.to_dict()
        if limit is not None:
            advice = [vars(advice) for advice in result.advice(limit)]
            found |= {"memory": limit, "fits": fits, "advice": advice}
        print(json.dumps(found, indent=2))
    else:
        print(result.table(limit))
    return 0 if fits else 1


def make_model(path: str) -> nn.Module:
    """What ``package.module:factory`` makes on the meta device. The current folder counts as one to import from."""
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise ValueError(f"model must be package.module:factory, got {path!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"model={path!r}: cannot import {module_name}: {error}; run it in the folder that holds it, or install it"
        ) from error
    factory: Callable[[], Any] | None = getattr(module, name, None)
    if not callable(factory):
        own = {key: value for key, value in vars(module).items() if getattr(value, "__module__", "") == module_name}
        callables = sorted(key for key, value in own.items() if callable(value) and not key.startswith("_"))
        raise ValueError(f"model={path!r}: {module_name} has no callable {name!r}; of its own it has {callables}")
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise ValueError(
            f"model={path!r}: it must be callable without arguments ({error}); write a function that gives them"
        ) from error
    try:
        with torch.device("meta"):
            model = factory()
    except Exception as error:  # whatever the model's own code raises, where tensors have no values
        raise FactoryError(
            f"model={path!r}: making it on the meta device raised {type(error).__name__}: {error}; what needs values "
            "there (.item(), numpy) has to be left out of the factory"
        ) from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"model={path!r}: it must make a torch.nn.Module, got {type(model).__name__}")
    return model


def parse_batch(text: str) -> tuple[Tensor, ...]:
    """'8x1024:int64,8x16' -> tensors on the meta device; float32 where no dtype is named."""
    tensors = []
    for part in text.split(","):
        shape, _, kind = part.strip().partition(":")
        dtype = getattr(torch, kind or "float32", None)
        if not re.fullmatch(r"\d+(x\d+)*", shape) or not isinstance(dtype, torch.dtype):
            raise ValueError(f"batch must be shapes with dtypes, as 8x1024:int64,8x16:float32, got {part.strip()!r}")
        tensors.append(torch.empty([int(n) for n in shape.split("x")], dtype=dtype, device="meta"))
    return tuple(tensors)


if __name__ == "__main__":
    sys.exit(main())
