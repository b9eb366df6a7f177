"""Convert a checkpoint: a file of Lightning's, or a folder of lowbit_sharded, which becomes one file.

    lowbit convert last.ckpt --bits 32           the optimizer's states in 32 bits, in the form that torch.optim loads
    lowbit convert last.ckpt --bits 8            and back; weights and all else stay as they are
    lowbit convert folder.ckpt --to file         one file, as it is
    lowbit convert last.ckpt --to torch          states in 32 bits, and low-bit weights decoded
    lowbit convert last.ckpt --to bitsandbytes   the model's weights as safetensors that bitsandbytes reads

The last two need the model if its weights are in low bits: the config of the checkpoint's run says it, or --config.
The result is a new file, written at once or not at all."""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lowbit_lightning import optim
from lowbit_lightning.convert import dequantize, to_bitsandbytes
from lowbit_lightning.memory.result import readable
from lowbit_lightning.optim.options import Options
from lowbit_lightning.state.form import MASTER, STEP, codes_name, scales_name
from lowbit_lightning.strategies import AtomicCheckpointIO

Saved = dict[str, Any]
"""An optimizer's ``state_dict()``."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="a .ckpt file, or a folder that lowbit_sharded saved")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--bits", type=int, choices=(8, 32), help="of the states in the result")
    what.add_argument("--to", choices=("file", "torch", "bitsandbytes"), help="another form")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: NAME-32bit.ckpt or the like")
    parser.add_argument("-c", "--config", action="append", metavar="FILE", help="of the model; default: of its run")
    parser.add_argument("--min-size", type=int, metavar="N", help="parameters with fewer elements stay in 32 bits")
    parser.add_argument("--block-size", type=int, metavar="N", help="elements that share a scale")
    parser.add_argument("--overwrite", action="store_true", help="replace the output where it exists")
    parser.add_argument(
        "--trust",
        action="store_true",
        help="load any Python object that the checkpoint holds, which can run code: for your own files alone",
    )


def run(args: argparse.Namespace) -> int:
    given = {"min_size": args.min_size, "block_size": args.block_size}
    options = {name: value for name, value in given.items() if value is not None}
    if options and args.bits != 8:
        raise ValueError(f"{', '.join(options)} do nothing without --bits 8: leave them out")
    ending = {"bitsandbytes": "-bitsandbytes.safetensors", None: f"-{args.bits}bit.ckpt"}.get(
        args.to, f"-{args.to}.ckpt"
    )
    output = args.output or args.checkpoint.with_name(f"{args.checkpoint.stem}{ending}")
    if output.exists() and not args.overwrite:
        raise FileExistsError(f"{output} exists: give another -o, or --overwrite")
    checkpoint = _load(args.checkpoint, args.trust)
    if args.to is not None:
        return _to(args, checkpoint, output)
    saved = checkpoint.get("optimizer_states") or []
    if not any(optimizer["state"] for optimizer in saved):
        raise ValueError(f"{args.checkpoint} holds no optimizer states: there is nothing to convert")
    checkpoint["optimizer_states"] = [converted(each, args.bits, **options) for each in saved]
    AtomicCheckpointIO().save_checkpoint(checkpoint, output)
    parameters = sum(len(each["state"]) for each in saved)
    size = readable(output.stat().st_size)
    print(f"{args.checkpoint}: the states of {parameters} parameters, in {args.bits} bits -> {output}, {size}")
    return 0


def _to(args: argparse.Namespace, checkpoint: dict[str, Any], output: Path) -> int:
    weights = checkpoint["state_dict"]
    low = [name for name in weights if name.endswith("weight_format")]
    if args.to == "bitsandbytes":
        save_file({name: x.contiguous() for name, x in to_bitsandbytes(_model(args, weights)).items()}, output)
    else:
        if args.to == "torch":
            saved = checkpoint.get("optimizer_states") or []
            checkpoint["optimizer_states"] = [converted(each, 32) for each in saved]
            if low:
                checkpoint["state_dict"] = dequantize(_model(args, weights)).state_dict()
        AtomicCheckpointIO().save_checkpoint(checkpoint, output)
    held = f", {len(low)} weights in low bits" if low else ""
    print(f"{args.checkpoint}{held} -> {output}, {readable(output.stat().st_size)}")
    return 0


def _model(args: argparse.Namespace, weights: Mapping[str, Tensor]) -> nn.Module:
    """The model of a checkpoint with its weights, from the config of its run."""
    from lowbit_lightning.cli.model_of import model_of  # imports jsonargparse and OmegaConf

    model = model_of(args.checkpoint, args.config)
    try:
        model.load_state_dict(dict(weights))
    except RuntimeError as error:
        raise ValueError(
            f"{args.checkpoint} is of another model than its config: {' '.join(str(error).split())}"
        ) from None
    return model


def _load(path: Path, trust: bool) -> dict[str, Any]:
    try:
        return AtomicCheckpointIO().load_checkpoint(path, weights_only=not trust)
    except pickle.UnpicklingError as error:
        what = str(error).partition("\n")[0]
        raise ValueError(
            f"{path} holds more than tensors and plain values, which may run code: --trust loads it, if it is your own "
            f"({what})"
        ) from error


def converted(saved: Saved, bits: int, **options: Any) -> Saved:
    """An optimizer's ``state_dict`` with states of 8 or 32 bits. No model is needed: states have their parameter's
    shape. In 32 bits it is what the optimizer's ``state_dict(bits=32)`` gives, which torch.optim loads.

    Raises:
        ValueError: for states of an optimizer that is not one of ``lowbit_lightning.optim`` nor its twin in torch.
    """
    held = [key for group in saved["param_groups"] for key in group["params"]]
    if not saved["state"]:
        return saved
    stand_ins = {key: _stand_in(saved["state"].get(key, {})) for key in held}
    groups = [{"params": [stand_ins[key] for key in group["params"]]} for group in saved["param_groups"]]
    optimizer = _kind(saved)(groups, bits=bits, **options)
    optimizer.load_state_dict(saved)
    made = optimizer.state_dict(bits=32) if bits == 32 else optimizer.state_dict()
    state = {key: made["state"][number] for number, key in enumerate(held) if key in saved["state"]}
    both = zip(made["param_groups"], saved["param_groups"], strict=True)
    return {**made, "state": state, "param_groups": [{**new, "params": list(old["params"])} for new, old in both]}


def _stand_in(entries: Mapping[str, Any]) -> Tensor:
    """A parameter of the entries' shape; its memory is never touched."""
    whole = (x for name, x in entries.items() if _state_of(name) is not None and not name.endswith(scales_name("")))
    shape = next((x.shape for x in whole if isinstance(x, Tensor)), torch.Size([0]))
    return torch.empty(shape, dtype=torch.bfloat16 if MASTER in entries else torch.float32)


def _state_of(entry: str) -> str | None:
    """The state that an entry belongs to; None for a step count and a master copy."""
    if entry in (STEP, MASTER):
        return None
    return next((entry.removesuffix(name("")) for name in (codes_name, scales_name) if entry.endswith(name(""))), entry)


def _kind(saved: Saved) -> Callable[..., optim.LowBitOptimizer]:
    """The optimizer that keeps such states, and whose hyperparameters the groups have: among several, which keep them
    alike, that which has most."""
    names = {_state_of(entry) for entries in saved["state"].values() for entry in entries} - {None}
    found: list[tuple[bool, int, type[optim.LowBitOptimizer]]] = []
    for cls in vars(optim).values():
        if not (isinstance(cls, type) and issubclass(cls, optim.LowBitOptimizer)) or cls is optim.LowBitOptimizer:
            continue
        probe = cls([torch.empty(0)])  # type: ignore[call-arg, arg-type]
        own = set(probe.defaults) - set(Options.__annotations__) - {"state_format"}
        kept = {s.name for g in saved["param_groups"] for s in probe.rule_of({**probe.defaults, **g}).states}
        if names == kept:
            known = own & set(saved["param_groups"][0])
            found.append((known == own, len(known), cls))
    if not found:
        raise ValueError(f"states {sorted(map(str, names))} are of no optimizer that lowbit_lightning.optim has")
    return max(found, key=lambda one: one[:2])[-1]
