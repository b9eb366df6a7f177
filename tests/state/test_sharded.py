"""Optimizer states on 1, 2 and 3 ranks: shards, checkpoints, and what is summed over ranks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.on_ranks import AGAIN, ALONE, on_ranks
from support.ranks import equal
from support.sharded_state import OPTIONS, build, full, load, mesh, placed_like, save, snapshot, step
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from lowbit_lightning import kernels, optim

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the ranks are forked")

STEPS = 3


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 0


def against_single(folder: Path, name: str, found: dict[str, dict[str, Tensor]]) -> str | None:
    """Compare with what the single process stored under ``name``; it stores."""
    path = folder / f"{name}.pt"
    if not dist.is_initialized() and not path.exists():
        torch.save(found, path)
        return None
    return equal(found, torch.load(path))


@on_ranks(ALONE, 2, 3, 1)
def test_states_are_the_single_process_states(folder: Path) -> str | None:
    """Codes, scales, 32-bit states, counts and parameters do not depend on the number of ranks."""
    model = build()
    optimizer = optim.AdamW(model.parameters(), **OPTIONS)  # type: ignore[arg-type]
    for number in range(STEPS):
        step(model, optimizer, number)
    found = snapshot(model, optimizer)
    save(model, optimizer, folder / f"checkpoint_{world()}")
    step(model, optimizer, STEPS)
    problem = against_single(folder, f"trained_{STEPS}", found)
    problem = problem or against_single(folder, f"trained_{STEPS + 1}", snapshot(model, optimizer))
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


@on_ranks(ALONE, 2, 3, 1, AGAIN, after=test_states_are_the_single_process_states)
def test_checkpoints_of_every_world_load_here(folder: Path) -> str | None:
    """Bit-exact, and so is the step after it: what a wrong state would show."""
    for source in sorted(folder.glob("checkpoint_*")):
        model = build(seed=5)
        optimizer = optim.AdamW(model.parameters(), **{**OPTIONS, "lr": 0.5})  # type: ignore[arg-type]
        load(model, optimizer, source)
        problem = against_single(folder, f"trained_{STEPS}", snapshot(model, optimizer))
        step(model, optimizer, STEPS)
        problem = problem or against_single(folder, f"trained_{STEPS + 1}", snapshot(model, optimizer))
        if problem:
            return f"{source.name}: {problem}"
    return None


@on_ranks(2, 3, 1, after=test_states_are_the_single_process_states)
def test_full_state_dicts_come_and_go(folder: Path) -> str | None:
    """Gathered on rank 0, as Lightning saves a single file, and broadcast from there."""
    model = build()
    optimizer = optim.AdamW(model.parameters(), **OPTIONS)  # type: ignore[arg-type]
    for number in range(STEPS):
        step(model, optimizer, number)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole = get_optimizer_state_dict(model, optimizer, options=options)
    weights = get_model_state_dict(model, options=options)
    other = build(seed=5)
    resumed = optim.AdamW(other.parameters(), **OPTIONS)  # type: ignore[arg-type]
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(other, weights, options=options)
    set_optimizer_state_dict(other, resumed, whole, options=options)
    step(other, resumed, STEPS)
    return against_single(folder, f"trained_{STEPS + 1}", snapshot(other, resumed))


@on_ranks(ALONE, 2, 3, 1)
def test_plain_state_dicts_are_cut(folder: Path) -> str | None:
    """A state_dict of whole plain tensors, as the single process has it, loads into shards, and into other forms."""
    path = folder / "plain.pt"
    model = build()
    optimizer = optim.AdamW(model.parameters(), **OPTIONS)  # type: ignore[arg-type]
    if not dist.is_initialized():
        for number in range(STEPS):
            step(model, optimizer, number)
        if not path.exists():
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    problem = None
    for name, options in {"8": {}, "32": {"bits": 32}, "blocks": {"block_size": 64}}.items():
        saved = torch.load(path)  # once each: as in torch, loaded states are those of the checkpoint, not copies
        model = build(seed=5)
        optimizer = optim.AdamW(model.parameters(), **{**OPTIONS, **options})  # type: ignore[arg-type]
        set_model_state_dict(model, saved["model"], options=StateDictOptions(full_state_dict=True))
        optimizer.load_state_dict(saved["optimizer"])
        for entries in optimizer.state.values():
            for x in entries.values():
                local = x.to_local() if isinstance(x, DTensor) else x
                if local.untyped_storage().nbytes() > max(1, local.nbytes):
                    problem = problem or f"{name}: a part keeps {local.untyped_storage().nbytes()} bytes alive"
        step(model, optimizer, STEPS)
        problem = problem or against_single(folder, f"converted_{name}", snapshot(model, optimizer))
    return problem


@on_ranks(ALONE, 2, 3, 1)
def test_lambs_norms_are_global(folder: Path) -> str | None:
    model = build()
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


@on_ranks(ALONE, 2, 3, 1)
def test_nothing_moves_where_one_ranks_gradient_is_not_finite(folder: Path) -> str | None:
    """Also where a rank holds no row of anything."""
    for parts in (("back", "small"), ("single",)):
        model = build()
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


@on_ranks(ALONE, 2, 3, 1)
def test_stochastic_rounding_is_the_same(folder: Path) -> str | None:
    """Vectors too, though their states are in 32 bits."""
    model = build(dtype=torch.bfloat16)
    optimizer = optim.AdamW(model.parameters(), stochastic_rounding=True, seed=11, **OPTIONS)  # type: ignore[arg-type]
    with kernels.use_backend("reference"):
        for number in range(STEPS):
            step(model, optimizer, number)
    return against_single(folder, "stochastic", snapshot(model, optimizer))


@on_ranks(ALONE, 2, 3, 1)
def test_other_placements_stay_in_32_bits(folder: Path) -> str | None:
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
        p = nn.Parameter(distribute_tensor(single.detach().clone(), mesh(), [Shard(1)]))
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


@on_ranks(2, 3, 1)
def test_gradients_may_be_placed_otherwise(folder: Path) -> str | None:
    """A Partial gradient is summed over the ranks, a replicated one cut, before the step."""
    generator = torch.Generator().manual_seed(1)
    whole, gradient = torch.randn(10, 600, generator=generator), torch.randn(10, 600, generator=generator)
    results = []
    for placement in (Shard(0), Partial(), Replicate()):
        p = nn.Parameter(distribute_tensor(whole, mesh(), [Shard(0)]))
        if isinstance(placement, Partial):
            mine = gradient if dist.get_rank() == dist.get_world_size() - 1 else torch.zeros_like(gradient)
            p.grad = DTensor.from_local(mine, mesh(), [placement])
        else:
            p.grad = distribute_tensor(gradient, mesh(), [placement])
        version = p._version
        optim.AdamW([p]).step()
        if p._version == version:
            return "the DTensor's version counter stood still"
        results.append(full(p))
    return None if all(torch.equal(x, results[0]) for x in results[1:]) else "parameters differ"


@on_ranks(ALONE, 2, 3, 1)
def test_a_model_trains_by_its_own_gradients(folder: Path) -> str | None:
    """FSDP2's forward and backward; equal batches on all ranks give the single process's gradients."""
    model = build()
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
