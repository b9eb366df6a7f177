"""Adapters on frozen low-bit weights, on gloo ranks: ``lowbit_ranks.py FOLDER ROUND...``.

A round is a number of ranks; "1" comes first: one process without a strategy, the yardstick. Every rank writes
``FOLDER/ROUND.RANK.json``: for each check the first thing that is wrong, or null.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from support.ranks import fork, join, write_outcomes
from support.sharded_model import TOKENS, Data, Traffic, picture, trainer, world
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from lowbit_lightning import LowBitWeights, optim, quantize
from lowbit_lightning.layers import LowBitLinear
from lowbit_lightning.state import shards
from lowbit_lightning.strategies import DeepSpeedStrategy, ShardedStrategy
from lowbit_lightning.strategies.checkpoints import fitted

WIDTH, RANK = 192, 4
BASE: dict[str, Any] = {"include": "*.base", "output_layer": None}


class Adapted(nn.Module):
    """A linear layer in low bits with a LoRA adapter."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs)
        self.down = nn.Linear(inputs, RANK, bias=False)
        self.up = nn.Linear(RANK, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = Adapted(WIDTH, 301), Adapted(301, WIDTH)  # 301 rows: no number of ranks divides them

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(Data):
    def __init__(self, weights: str | None = "nf4", steps: int = 6, bits: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.steps, self.bits = steps, bits
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, TOKENS)
        self.requires_grad_(False)
        if weights is not None:
            quantize(self, weights, **BASE)
        for name, p in self.named_parameters():
            p.requires_grad_(name.endswith(("down.weight", "up.weight")))
        self.losses: list[Tensor] = []

    def _data(self) -> Tensor:
        """Sequences that go on by an equal step."""
        return super()._data()[:, :2].matmul(torch.stack([torch.ones(5), torch.arange(5)]).long()) % TOKENS

    def training_step(self, batch: Any, index: int) -> Tensor:
        (tokens,) = batch
        x = self.embedding(tokens[:, :-1])
        for layer in self.layers:
            x = layer(x)
        loss = nn.functional.cross_entropy(self.head(x).flatten(0, 1), tokens[:, 1:].flatten())
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> Any:
        return optim.AdamW(self.parameters(), lr=2e-3, bits=self.bits, min_size=256)

    def mean_losses(self) -> list[float]:
        losses = torch.stack(self.losses)
        if dist.is_initialized():
            dist.all_reduce(losses)
            losses /= dist.get_world_size()
        return losses.tolist()


def strategy(name: str) -> Any:
    if name.isdigit():
        import deepspeed

        # It would be compiled.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # type: ignore[attr-defined]
        return DeepSpeedStrategy(stage=int(name))
    return "auto" if world() == 1 and name == "ddp" else ShardedStrategy() if name == "sharded" else "ddp"


def fit(name: str, model: Net, **options: Any) -> Any:
    made = trainer(strategy(name), **{"max_epochs": 2, **options})
    made.fit(model)
    return made


def trains_like_one_process(folder: Path) -> str | None:
    for weights in ("nf4", "nf4-dq", "int8", "int3"):
        for name in ("ddp", "sharded"):
            model = Net(weights)
            made = fit(name, model)
            held = picture(model, made.optimizers)
            found: dict[str, Any] = {
                "losses": model.mean_losses(),
                "codes": {k: v for k, v in held[""].items() if "base" in k},
            }
            path = folder / f"{weights}.pt"
            if world() == 1 and name == "ddp":
                torch.save(found, path)
            expected = torch.load(path)
            losses, wanted = torch.tensor(found["losses"]), torch.tensor(expected["losses"])
            if not (losses - wanted).abs().max() <= 1e-5 * wanted.max():
                return f"{weights} {name}: {losses.tolist()} and not {wanted.tolist()}"
            if not (wanted[6:] < wanted[:6]).all():  # the same batches, an epoch later
                return f"{weights}: nothing was learned: {wanted.tolist()}"
            if not all(torch.equal(x, expected["codes"][k]) for k, x in found["codes"].items()):
                return f"{weights} {name}: frozen codes changed"
    return None


def packed_weights_are_sharded_and_travel_packed(folder: Path) -> str | None:
    model = Net("nf4", steps=2)
    with Traffic() as traffic:
        fit("sharded", model, max_epochs=1)
    layers = [m for m in model.modules() if isinstance(m, LowBitLinear)]
    for layer in layers:
        for p in (layer.weight, layer.weight_scales):
            if not isinstance(p, DTensor) or p.to_local().shape[0] > -(-p.shape[0] // world()):
                return f"not sharded: {type(p)} {p.shape}"
    if world() == 1:
        return None
    high = sum(p.numel() * 4 for p in model.parameters() if p.dtype == torch.float32)
    bits = sum(layer.weight.numel() for layer in layers)
    gathers = 2 * (high + bits) * 2  # forward and backward of two steps
    moved = traffic.bytes["allgather_base"] + traffic.bytes["all_gather_into_tensor"]
    return None if moved <= 1.2 * gathers else f"{moved} bytes were gathered, {gathers} are enough ({traffic.bytes})"


def resumes_on_any_number_of_ranks(folder: Path) -> str | None:
    path = folder / "half.ckpt"
    if world() == 2:
        made = fit("sharded", Net(), max_epochs=1)
        made.save_checkpoint(path)
        dist.barrier()
    elif not path.exists():
        return None
    model = Net()
    trainer(strategy("sharded"), max_epochs=2).fit(model, ckpt_path=path)
    wanted = torch.load(folder / "nf4.pt")["losses"][6:]
    losses = torch.tensor(model.mean_losses())
    off = (losses - torch.tensor(wanted)).abs().max()
    return None if off <= 1e-5 * max(wanted) else f"{losses.tolist()} and not {wanted}"


def mixed_precision_rounds_no_scale(folder: Path) -> str | None:
    """Gathers in bfloat16 cast what is in high precision; the losses are those of DDP, which gathers nothing."""
    if world() == 1:
        return None
    losses = {}
    for name in ("ddp", "sharded"):
        model = Net()
        fit(name, model, precision="bf16-mixed")
        losses[name] = torch.tensor(model.mean_losses())
    off = (losses["ddp"] - losses["sharded"]).abs().max()
    return None if off <= 0.02 else f"{losses}"


def quantises_by_plugin(folder: Path) -> str | None:
    """LowBitWeights under DDP and two strategies of FSDP2; what one saves another resumes."""
    if world() != 2:
        return None
    wanted = torch.tensor(torch.load(folder / "nf4.pt")["losses"])
    path = folder / "by_plugin.ckpt"

    class Sharding(Net):
        def configure_model(self) -> None:
            if isinstance(self.embedding, FSDPModule):
                return
            quantize(self, "nf4", **BASE)
            for part in (self.embedding, *self.layers, self.head):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])  # type: ignore[index]

    runs: tuple[tuple[str, Any, Net, int, bool], ...] = (
        ("sharded", ShardedStrategy(), Net(None), 1, False),
        ("ddp, resumed", "ddp", Net(None), 2, True),
        ("sharded, resumed", ShardedStrategy(), Net(None), 2, True),
        (
            "model parallel",
            ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
            Sharding(None),
            2,
            False,
        ),
    )
    for name, chosen, model, epochs, resumes in runs:
        made = trainer(chosen, max_epochs=epochs, plugins=[LowBitWeights("nf4", **BASE)])
        made.fit(model, ckpt_path=path if resumes else None)
        if name == "sharded":
            made.save_checkpoint(path)
            dist.barrier()
            whole = {key: shards.full(x) for key, x in model.state_dict().items() if "base" in key}
            placed = fitted(model, Net(None).state_dict(), True, "a checkpoint in high precision")
            if not all(torch.equal(shards.full(placed[key]), x) for key, x in whole.items()):
                return f"{name}: a state_dict in high precision became other codes"
        found = torch.tensor(model.mean_losses())
        expected = wanted[6:] if resumes else wanted[: len(found)]
        if len(found) != len(expected) or not (found - expected).abs().max() <= 1e-5 * wanted.max():
            return f"{name}: {found.tolist()} and not {expected.tolist()}"
        if len([m for m in model.modules() if isinstance(m, LowBitLinear)]) != 4:
            return f"{name}: not quantised"
    return None


def trains_under_deepspeed(folder: Path) -> str | None:
    if world() != 2:
        return None
    wanted = torch.tensor(torch.load(folder / "nf4.pt")["losses"])
    for stage in ("1", "2", "3", "3, by plugin"):
        by_plugin = "plugin" in stage
        model = Net(None if by_plugin else "nf4")
        fit(stage[0], model, plugins=[LowBitWeights("nf4", **BASE)] if by_plugin else [])
        losses = torch.tensor(model.mean_losses())
        if not (losses - wanted).abs().max() <= 1e-5 * wanted.max():
            return f"stage {stage}: {losses.tolist()} and not {wanted.tolist()}"
        if not any(isinstance(m, LowBitLinear) for m in model.modules()):
            return f"stage {stage}: not quantised"
    return None


CHECKS = (
    trains_like_one_process,
    packed_weights_are_sharded_and_travel_packed,
    resumes_on_any_number_of_ranks,
    mixed_precision_rounds_no_scale,
    quantises_by_plugin,
    trains_under_deepspeed,
)


def rank_main(rank: int, ranks: int, round_name: str, folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks), GROUP_RANK="0"
    )
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if ranks > 1:  # as under torchrun
        os.environ.update(TORCHELASTIC_RUN_ID="test", MASTER_ADDR="127.0.0.1", MASTER_PORT="29400")
        join(rank, ranks, folder / f"store {round_name}")
    write_outcomes(folder / f"{round_name}.{rank}.json", CHECKS, folder)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    for round_name in sys.argv[2:]:
        ranks = int(round_name.split()[0])
        fork(rank_main, (ranks, round_name, Path(sys.argv[1])), ranks)
