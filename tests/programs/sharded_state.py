"""Optimizer states under FSDP2, on gloo ranks of one machine: ``sharded_state.py FOLDER``.

One process imports everything and forks the ranks of each round in turn. Every rank runs all checks and writes
``FOLDER/ROUND.RANK.json``: for each check the first thing that is wrong, or null. ``tests/state/test_sharded.py``
reads them. The first round, a plain unsharded model in a single process, is the yardstick: gradients are whole
tensors that depend on a seed alone, so every round computes the same, to the bit wherever nothing is summed over
ranks.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from support.ranks import equal, fork, join, write_outcomes
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from lowbit_lightning import kernels, optim

ROUNDS = ("plain", "2", "3", "1", "plain again")  # in the order in which they run
STEPS = 3


class Net(nn.Module):
    """Odd shapes: no rank count divides them, and on three ranks one holds no row of ``pair`` or ``single``."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 301)
        nn.init.normal_(self.embedding.weight, std=0.05)
        self.wide = nn.Linear(301, 512, bias=False)
        self.back = nn.Linear(512, 301)  # 301 rows of 512
        self.norm = nn.LayerNorm(301)
        self.head = nn.Linear(301, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.convolution = nn.Conv2d(16, 33, 3)
        self.small = nn.Linear(77, 5)
        self.pair = nn.Parameter(torch.randn(2, 400))
        self.single = nn.Parameter(torch.randn(1, 400))
        self.to(dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = self.norm(x + self.back(torch.relu(self.wide(x))))
        image = torch.relu(self.convolution(x[..., :256].unflatten(-1, (16, 16)).unsqueeze(-1).expand(-1, -1, -1, 9)))
        extra = self.small(image.flatten(1)[:, :77]).sum() + (self.pair.sum() + self.single.sum()) * 1e-3
        return self.head(x) + extra


OPTIONS = {"lr": 1e-2, "min_size": 310}  # 310: `small` is in 8 bits, norms and biases aren't


def build(world: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Net:
    """The same model in every world; sharded in all but the single process."""
    torch.manual_seed(seed)
    model = Net(dtype)
    if dist.is_initialized():
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    return model


def full(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def placed_like(p: Tensor, whole: Tensor) -> Tensor:
    return distribute_tensor(whole, p.device_mesh, p.placements) if isinstance(p, DTensor) else whole


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    """A step with whole gradients that depend on ``number`` alone."""
    generator = torch.Generator().manual_seed(number)
    for p in model.parameters():
        whole = torch.randn(p.shape, generator=generator) * torch.exp(torch.randn(p.shape, generator=generator))
        p.grad = placed_like(p, whole.to(p.dtype))
    optimizer.step()


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Whole parameters and states by the parameter's name; a collective."""
    return {
        name: {"param": full(p), **{k: full(x) for k, x in optimizer.state[p].items()}}
        for name, p in model.named_parameters()
    }


def save(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=path)


def load(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    """``torch.distributed.checkpoint`` asks for the states of the new optimizer first."""
    state: dict[str, Any] = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    dcp.load(state, checkpoint_id=path)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


def against_single(folder: Path, world: int, name: str, found: dict[str, dict[str, Tensor]]) -> str | None:
    """Compare with what the single process stored under ``name``; it stores."""
    path = folder / f"{name}.pt"
    if not dist.is_initialized() and not path.exists():
        torch.save(found, path)
        return None
    return equal(found, torch.load(path))


# -- checks: (folder, world) -> what is wrong, or None; a name that starts with _ is none ------------------------------


def states_are_the_single_process_states(folder: Path, world: int) -> str | None:
    """Codes, scales, 32-bit states, counts and parameters do not depend on the number of ranks."""
    model = build(world)
    optimizer = optim.AdamW(model.parameters(), **OPTIONS)  # type: ignore[arg-type]
    for number in range(STEPS):
        step(model, optimizer, number)
    found = snapshot(model, optimizer)
    save(model, optimizer, folder / f"checkpoint_{world}")
    step(model, optimizer, STEPS)
    problem = against_single(folder, world, f"trained_{STEPS}", found)
    problem = problem or against_single(folder, world, f"trained_{STEPS + 1}", snapshot(model, optimizer))
    coded = {name for name, entries in found.items() if "exp_avg_codes" in entries}
    expected = {
        "embedding.weight",
        "wide.weight",
        "back.weight",
        "convolution.weight",
        "small.weight",
        "pair",
        "single",
    }
    return problem or (None if coded == expected else f"in 8 bits: {sorted(coded)}")


def checkpoints_of_every_world_load_here(folder: Path, world: int) -> str | None:
    """Bit-exact, and so is the step after it: what a wrong state would show."""
    for source in sorted(folder.glob("checkpoint_*")):
        model = build(world, seed=5)
        optimizer = optim.AdamW(model.parameters(), **{**OPTIONS, "lr": 0.5})  # type: ignore[arg-type]
        load(model, optimizer, source)
        problem = against_single(folder, world, f"trained_{STEPS}", snapshot(model, optimizer))
        step(model, optimizer, STEPS)
        problem = problem or against_single(folder, world, f"trained_{STEPS + 1}", snapshot(model, optimizer))
        if problem:
            return f"{source.name}: {problem}"
    return None


def full_state_dicts_come_and_go(folder: Path, world: int) -> str | None:
    """Gathered on rank 0, as Lightning saves a single file, and broadcast from there."""
    if not dist.is_initialized():
        return None
    model = build(world)
    optimizer = optim.AdamW(model.parameters(), **OPTIONS)  # type: ignore[arg-type]
    for number in range(STEPS):
        step(model, optimizer, number)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole = get_optimizer_state_dict(model, optimizer, options=options)
    weights = get_model_state_dict(model, options=options)
    other = build(world, seed=5)
    resumed = optim.AdamW(other.parameters(), **OPTIONS)  # type: ignore[arg-type]
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(other, weights, options=options)
    set_optimizer_state_dict(other, resumed, whole, options=options)
    step(other, resumed, STEPS)
    return against_single(folder, world, f"trained_{STEPS + 1}", snapshot(other, resumed))


def plain_state_dicts_are_cut(folder: Path, world: int) -> str | None:
    """A state_dict of whole plain tensors, as the single process has it, loads into shards, and into other forms."""
    path = folder / "plain.pt"
    model = build(world)
    optimizer = optim.AdamW(model.parameters(), **OPTIONS)  # type: ignore[arg-type]
    if not dist.is_initialized():
        for number in range(STEPS):
            step(model, optimizer, number)
        if not path.exists():
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    problem = None
    for name, options in {"8": {}, "32": {"bits": 32}, "blocks": {"block_size": 64}}.items():
        saved = torch.load(path)  # once each: as in torch, loaded states are those of the checkpoint, not copies
        model = build(world, seed=5)
        optimizer = optim.AdamW(model.parameters(), **{**OPTIONS, **options})  # type: ignore[arg-type]
        set_model_state_dict(model, saved["model"], options=StateDictOptions(full_state_dict=True))
        optimizer.load_state_dict(saved["optimizer"])
        for entries in optimizer.state.values():
            for x in entries.values():
                local = x.to_local() if isinstance(x, DTensor) else x
                if local.untyped_storage().nbytes() > max(1, local.nbytes):
                    problem = problem or f"{name}: a part keeps {local.untyped_storage().nbytes()} bytes alive"
        step(model, optimizer, STEPS)
        problem = problem or against_single(folder, world, f"converted_{name}", snapshot(model, optimizer))
    return problem


def lambs_norms_are_global(folder: Path, world: int) -> str | None:
    model = build(world)
    optimizer = optim.LAMB(model.parameters(), **OPTIONS)  # type: ignore[arg-type]
    for number in range(STEPS):
        step(model, optimizer, number)
    found, path = snapshot(model, optimizer), folder / "lamb.pt"
    if not dist.is_initialized() and not path.exists():
        torch.save(found, path)
    for name, entries in torch.load(path).items():
        off = (found[name]["param"] - entries["param"]).norm() / entries["param"].norm()
        if not off <= 1e-6:
            return f"{name}: off by {off:.1e}"
    return None


def nothing_moves_where_one_ranks_gradient_is_not_finite(folder: Path, world: int) -> str | None:
    """Also where a rank holds no row of anything."""
    for parts in (("back", "small"), ("single",)):
        model = build(world)
        chosen = [p for name, p in model.named_parameters() if name.split(".")[0] in parts]
        optimizer = optim.AdamW(chosen, skip_nonfinite=True, **OPTIONS)  # type: ignore[arg-type]
        step(model, optimizer, 0)
        before = [full(x) for p in chosen for x in (p, *optimizer.state[p].values())]
        for p in chosen:
            whole = torch.ones(p.shape)
            if p is chosen[0]:
                whole[-1, 3 if p.ndim > 1 else ...] = torch.nan  # on the last rank that has rows
            p.grad = placed_like(p, whole)
        optimizer.step()
        after = [full(x) for p in chosen for x in (p, *optimizer.state[p].values())]
        if not all(torch.equal(x, y) for x, y in zip(before, after, strict=True)):
            return f"{parts}: something moved"
        step(model, optimizer, 1)
        if any(float(optimizer.state[p]["step"]) != 2 for p in chosen):
            return f"{parts}: counts {[float(optimizer.state[p]['step']) for p in chosen]} after 2 good steps"
    return None


def stochastic_rounding_is_the_same(folder: Path, world: int) -> str | None:
    """Vectors too, though their states are in 32 bits."""
    model = build(world, dtype=torch.bfloat16)
    optimizer = optim.AdamW(model.parameters(), stochastic_rounding=True, seed=11, **OPTIONS)  # type: ignore[arg-type]
    with kernels.use_backend("reference"):
        for number in range(STEPS):
            step(model, optimizer, number)
    return against_single(folder, world, "stochastic", snapshot(model, optimizer))


def other_placements_stay_in_32_bits(folder: Path, world: int) -> str | None:
    """Shard(1) cuts blocks. Its state is 32-bit; a whole 8-bit state still loads, decoded before it is cut."""
    whole, single = torch.randn(16, 600, generator=torch.Generator().manual_seed(1)), nn.Parameter(torch.empty(16, 600))
    single.data.copy_(whole)
    coded = optim.AdamW([single])
    module = nn.ParameterList([single])
    step(module, coded, 0)
    plain = nn.Parameter(single.detach().clone())
    yardstick = optim.AdamW([plain], bits=32)
    yardstick.load_state_dict(coded.state_dict())
    p: nn.Parameter = plain
    if dist.is_initialized():
        p = nn.Parameter(distribute_tensor(single.detach().clone(), mesh_of(world), [Shard(1)]))
    else:
        p = nn.Parameter(plain.detach().clone())
    optimizer = optim.AdamW([p], bits=8 if dist.is_initialized() else 32)
    optimizer.load_state_dict(coded.state_dict())
    for number in range(1, STEPS):
        step(nn.ParameterList([plain]), yardstick, number)
        step(nn.ParameterList([p]), optimizer, number)
    if set(optimizer.state[p]) != {"step", "exp_avg", "exp_avg_sq"}:
        return f"entries {sorted(optimizer.state[p])}"
    if dist.is_initialized() and optimizer.state[p]["exp_avg"].placements != (Shard(1),):
        return f"placed as {optimizer.state[p]['exp_avg'].placements}"
    return equal(snapshot(nn.ParameterList([p]), optimizer), snapshot(nn.ParameterList([plain]), yardstick))


def gradients_may_be_placed_otherwise(folder: Path, world: int) -> str | None:
    """A Partial gradient is summed over the ranks, a replicated one cut, before the step."""
    if not dist.is_initialized():
        return None
    generator = torch.Generator().manual_seed(1)
    whole, gradient = torch.randn(10, 600, generator=generator), torch.randn(10, 600, generator=generator)
    results = []
    for placement in (Shard(0), Partial(), Replicate()):
        p = nn.Parameter(distribute_tensor(whole, mesh_of(world), [Shard(0)]))
        if isinstance(placement, Partial):
            mine = gradient if dist.get_rank() == world - 1 else torch.zeros_like(gradient)
            p.grad = DTensor.from_local(mine, mesh_of(world), [placement])
        else:
            p.grad = distribute_tensor(gradient, mesh_of(world), [placement])
        version = p._version
        optim.AdamW([p]).step()
        if p._version == version:
            return "the DTensor's version counter stood still"
        results.append(full(p))
    return None if all(torch.equal(x, results[0]) for x in results[1:]) else "parameters differ"


def a_model_trains_by_its_own_gradients(folder: Path, world: int) -> str | None:
    """FSDP2's forward and backward; equal batches on all ranks give the single process's gradients."""
    model = build(world)
    optimizer = optim.AdamW(model.parameters(), **OPTIONS)  # type: ignore[arg-type]
    tokens = torch.arange(7).repeat(4)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens), (tokens + 1) % 7)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if not losses[-1] < 0.3 * losses[0]:
        return f"losses {losses}"
    path = folder / "losses.json"
    if not dist.is_initialized() and not path.exists():
        path.write_text(json.dumps(losses))
    expected = json.loads(path.read_text())
    off = max(abs(a - b) / b for a, b in zip(losses, expected, strict=True))
    return None if off < 1e-3 else f"losses {losses}, in the single process {expected}"


# -- running them ------------------------------------------------------------------------------------------------------

CHECKS: tuple[Callable[[Path, int], str | None], ...] = (
    states_are_the_single_process_states,
    checkpoints_of_every_world_load_here,
    full_state_dicts_come_and_go,
    plain_state_dicts_are_cut,
    lambs_norms_are_global,
    nothing_moves_where_one_ranks_gradient_is_not_finite,
    stochastic_rounding_is_the_same,
    other_placements_stay_in_32_bits,
    gradients_may_be_placed_otherwise,
    a_model_trains_by_its_own_gradients,
)


def mesh_of(world: int) -> DeviceMesh:
    return init_device_mesh("cpu", (world,))


def rank_main(rank: int, world: int, round_name: str, folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # torch's own, about single-process checkpoints
    sharded = "plain" not in round_name
    if sharded:
        join(rank, world, folder / f"store {round_name}")
    checks = CHECKS if round_name != "plain again" else CHECKS[1:2]
    write_outcomes(folder / f"{round_name}.{rank}.json", checks, folder, world)
    if sharded:
        dist.destroy_process_group()


def main(folder: Path) -> None:
    for round_name in ROUNDS:
        world = int(round_name) if round_name.isdigit() else 1
        fork(rank_main, (world, round_name, folder), world)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
