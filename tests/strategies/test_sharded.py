"""``strategy="lowbit_sharded"`` on several ranks: training, compared with a single device with no strategy of ours.

``make slow`` runs 50 steps on 1, 2, 3 and 4 ranks, with every check on each.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from support import on_ranks as rounds
from support.on_ranks import ALONE, on_ranks
from support.sharded_model import TOKENS, WIDTH, Block, Data, Net, Traffic, raised, round_trip, trainer, whole, world
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from lowbit_lightning import Int8MixedPrecision, optim
from lowbit_lightning.layers import Experts
from lowbit_lightning.strategies import ShardedStrategy

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the ranks are forked")

STEPS = 50 if rounds.THOROUGH else 6
EACH = (4, 1, 3, 2)  # ranks of `make slow`
SIGTERM = 8 * hasattr(_TrainingEpochLoop, "_broadcast_sigterm_tensor")  # bytes of a number that Lightning 2.6 sends
OLD = torch.__version__ < "2.8"  # gloo has no average: replicas are refused
TRIED = torch.__version__ < "2.13"  # one reduce-scatter shows what gloo makes of an average
# Losses may differ from those of one device by this much, at 50 steps. Gradients are summed in another order; 8-bit
# codes magnify what falls on another side of a threshold. int8 products also have scales of a rank's own tokens, and
# weights that were gathered in bfloat16.
LIMITS = {"32": 1e-6, "8": 1e-3, "int8": 5e-3}


def fit(mode: str = "32", model: Any = None, **options: Any) -> tuple[Any, L.Trainer]:
    model = model or Net(steps=STEPS)
    if not dist.is_initialized():
        options["strategy"] = "auto"
        model.optimizer = (
            {"32": torch.optim.AdamW}.get(mode, optim.AdamW)
            if model.optimizer is torch.optim.AdamW
            else model.optimizer
        )
    elif "strategy" not in options:
        options["strategy"] = ShardedStrategy(optimizer_bits=32 if mode == "32" else 8)
    made = trainer(**{"precision": "int8-mixed" if mode == "int8" else "32-true", **options})
    made.fit(model)
    return model, made


def against_single(folder: Path, name: str, found: dict[str, Any], limit: float) -> str | None:
    """Compare tensors or losses with those of the single device, which stores them; relative to the largest."""
    path = folder / f"{name}.pt"
    if not dist.is_initialized():
        torch.save(found, path)
        return None
    for key, expected in torch.load(path).items():
        x, y = torch.as_tensor(found[key]).double(), torch.as_tensor(expected).double()
        off = float((x - y).abs().max() / y.abs().max())
        if not off <= limit:
            return f"{key} is off by {off:.1e}"
    return None


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p) for name, p in model.named_parameters()}


# -- checks: folder -> what is wrong, or None --------------------------------------------------------------------------


@on_ranks(ALONE, 2, 3, slow=(ALONE, *EACH))
def test_trains_like_a_single_device(folder: Path) -> str | None:
    """32 bits against torch's own optimizer, clipping by the global norm included."""
    for mode, limit in LIMITS.items():
        model, made = fit(mode, Net(steps=STEPS, lr=3e-4, length=17), gradient_clip_val=1.0)
        losses = {f"loss {i}": loss for i, loss in enumerate(model.mean_losses())}
        problem = against_single(folder, f"losses_{mode}", losses, limit)
        if problem:
            return f"{mode}: {problem}"
        if dist.is_initialized() and mode != "32":
            for p, entries in made.optimizers[0].state.items():
                rows = -(-p.shape[0] // world())
                for name, x in entries.items():
                    held = x.to_local() if x.ndim else x
                    if held.nbytes > max(4, x.nbytes / x.shape[0] * rows if x.ndim else 4):
                        return f"{mode}: {held.nbytes} bytes of {name} {tuple(p.shape)}"
            if not any("exp_avg_codes" in entries for entries in made.optimizers[0].state.values()):
                return f"{mode}: no codes"
    return None


class WithExperts(Block):
    """Five experts, which no number of ranks divides."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)
        self.router, self.experts = nn.Linear(64, 5), Experts(5, 64, 48)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(self.norm(x)).flatten(0, -2)
        weights, index = self.router(hidden).softmax(-1).topk(2)
        return x + self.down(self.experts(hidden, index, weights)).view_as(x)


@on_ranks(ALONE, 2, slow=(ALONE, *EACH))
def test_experts_in_int8_train_like_on_a_single_device(folder: Path) -> str | None:
    model = Net(steps=STEPS, lr=3e-4, length=17)
    torch.manual_seed(0)
    model.layers = nn.ModuleList([WithExperts(), WithExperts()])
    plugin = Int8MixedPrecision(swap="all", autocast="off")
    fit("int8", model, precision=None, plugins=[plugin])
    if "layers.*.experts (2)" not in str(plugin.report).splitlines()[0]:
        return str(plugin.report)
    losses = {f"loss {i}": loss for i, loss in enumerate(model.mean_losses())}
    return against_single(folder, "losses_experts", losses, LIMITS["int8"])


@on_ranks(ALONE, 2, slow=(ALONE, *EACH))
def test_clipping_and_norms_are_global(folder: Path) -> str | None:
    """In the step, by passes, and in LAMB's and LARS's trust ratios: the parameters of a single device."""
    for name, optimizer, options in (
        ("clipped", lambda groups, lr: optim.SGD(groups, lr=0.5), {"gradient_clip_val": 0.01}),
        (
            "clipped by value",
            lambda groups, lr: optim.SGD(groups, lr=0.5),
            {"gradient_clip_val": 1e-4, "gradient_clip_algorithm": "value"},
        ),
        ("lamb", lambda groups, lr: optim.LAMB(groups, lr=1e-2, bits=32), {}),
        ("lars", lambda groups, lr: optim.LARS(groups, lr=1.0, momentum=0.9, bits=32), {}),
    ):
        model = Net(optimizer, steps=2)
        before = weights(model)
        fit(model=model, **options)
        if all(torch.equal(x, before[key]) for key, x in weights(model).items()):
            return f"{name}: nothing moved"
        problem = against_single(folder, name, weights(model), 1e-3)  # a norm of one rank: off by 0.2
        if problem:
            return f"{name}: {problem}"
    return None


@on_ranks(ALONE, 2, slow=(ALONE, *EACH))
def test_accumulation_reduces_once(folder: Path) -> str | None:
    """Four micro-batches: one reduce-scatter per group of parameters, and the weights of a single device."""
    model = Net(lambda groups, lr: optim.SGD(groups, lr=0.5), steps=4)
    with Traffic() as seen:
        fit(model=model, accumulate_grad_batches=4)
    problem = against_single(folder, "accumulated", weights(model), 1e-5)
    counted = seen.calls["reduce_scatter_base"]
    expected = 3 + TRIED if world() > 1 else 0  # two blocks and the root
    return problem or (None if counted == expected else f"{counted} reduce-scatters, not {expected}")


def formula(model: Net, shards: int, replicas: int, gather_bytes: int, again: bool, clipping: bool) -> dict[str, int]:
    """Bytes per step and rank, by collective: docs/sharding.md's."""

    def padded(p: nn.Parameter) -> int:
        return shards * -(-p.shape[0] // shards) * p[0].numel()

    blocks = set(model.layers.parameters())
    gathered = sum(padded(p) * (2 if again and p in blocks else 1) for p in model.parameters())
    trained = [p for p in model.parameters() if p.requires_grad and p is not model.unused]
    reduced = sum(map(padded, trained))
    found = {
        "allgather_base": gathered * gather_bytes if shards > 1 else 0,
        "reduce_scatter_base": reduced * 4 if shards > 1 else 0,
        "allreduce": (reduced // shards * 4 if replicas > 1 else 0) + (len(trained) * 8 if clipping else 0),
        "broadcast": sum(b.nbytes for b in model.buffers()) + SIGTERM if world() > 1 else 0,
    }
    return {name: size for name, size in found.items() if size}


@on_ranks(2, slow=EACH)
def test_traffic_is_the_formulas(folder: Path) -> str | None:
    for again, dtype, replicas, clip in (
        (True, None, 1, None),
        (False, None, 1, 1.0),
        (True, torch.bfloat16, 1, None),
        *([(True, None, 2, None)] if world() % 2 == 0 and not OLD else []),
    ):
        seen = []
        for steps in (1, 2):  # what the second step adds
            strategy = ShardedStrategy(reshard_after_forward=again, gather_dtype=dtype, replicas=replicas)
            model = Net(steps=steps)
            with Traffic() as traffic:
                fit("8", model=model, strategy=strategy, gradient_clip_val=clip)
            seen.append(traffic.bytes)
        found = dict(seen[1] - seen[0])
        expected = formula(Net(), world() // replicas, replicas, 2 if dtype else 4, again, clip is not None)
        if found != expected:
            return f"{(again, dtype, replicas, clip)}: {found}, by the formula {expected}"
    return None


class Manual(Data):
    """Two models and their optimizers, each stepped once in a training_step: one has repeated blocks, one has none."""

    def __init__(self, toggle: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization, self.toggle = False, toggle
        ends = nn.Linear(TOKENS * self.length, WIDTH), nn.Linear(WIDTH, 8)
        self.generator = nn.Sequential(ends[0], nn.Sequential(Block(), Block()), ends[1])
        self.critic = nn.Sequential(nn.Linear(8, 77), nn.Tanh(), nn.Linear(77, 1))

    def configure_optimizers(self) -> Any:
        kinds = (self.critic, 0.5), (self.generator, 0.05)
        return [torch.optim.SGD(part.parameters(), lr=lr, momentum=0.9) for part, lr in kinds]

    def training_step(self, batch: Any, index: int) -> None:  # type: ignore[override]
        (tokens,) = batch
        seen = nn.functional.one_hot(tokens, TOKENS).flatten(1).float()
        optimizers: Any = self.optimizers()
        for number, optimizer in enumerate(optimizers):
            if self.toggle:
                self.toggle_optimizer(optimizer)
            score = self.critic(self.generator(seen)).square().mean()
            loss = score if number else self.critic(seen[:, :8]).mean() - score
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, 1.0, "norm")
            optimizer.step()
            if self.toggle:
                self.untoggle_optimizer(optimizer)


@on_ranks(ALONE, 2, slow=(ALONE, *EACH))
def test_manual_optimization_works(folder: Path) -> str | None:
    for toggle in (False, True):
        before = weights(Manual(toggle))
        model, _ = fit(model=Manual(toggle))
        if still := [name for name, p in weights(model).items() if torch.equal(p, before[name])]:
            return f"toggle={toggle}: {still} did not move"
        problem = against_single(folder, f"manual_{toggle}", weights(model), 1e-4)
        if problem:
            return f"toggle={toggle}: {problem}"
    return None


class Calling(Net):
    def training_step(self, batch: Any, index: int) -> Tensor:
        (tokens,) = batch
        logits = self(tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        self.losses.append(loss.detach())
        return loss


class Thawing(Net):
    """A block is frozen in the first forward, and trains from the second step on."""

    def on_train_batch_start(self, batch: Any, index: int) -> None:
        self.layers[0].requires_grad_(index > 0)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.dtypes = {p.grad.dtype for p in self.parameters() if p.grad is not None}


@on_ranks(2, slow=EACH)
def test_what_is_frozen_at_first_may_train_later(folder: Path) -> str | None:
    """Under a gather in bfloat16, with gradients that are reduced and kept in float32; also where optimizers take
    turns."""
    strategy = partial(ShardedStrategy, gather_dtype=torch.bfloat16)
    thawing = Thawing(steps=3)
    before = weights(thawing)
    with Traffic() as traffic:
        fit(model=thawing, strategy=strategy())
    with Traffic() as expected:
        fit(model=Net(steps=3), strategy=strategy())
    sent, all_of_it = traffic.bytes["reduce_scatter_base"], expected.bytes["reduce_scatter_base"]
    share = sent / all_of_it if dist.get_world_size() > 1 else 0.9  # one rank sends nothing
    still = [n for n, w in weights(thawing).items() if n.startswith("layers.0") and torch.equal(w, before[n])]
    if still or thawing.dtypes != {torch.float32} or not 0.8 < share < 1:
        return f"{still} stood still; {thawing.dtypes}; {share} of the bytes"
    fit(model=Manual(True), precision="bf16-mixed")
    return None


@on_ranks(ALONE, 2, slow=(ALONE, *EACH))
def test_a_step_may_call_forward(folder: Path) -> str | None:
    model, _ = fit(model=Calling(steps=STEPS))
    return against_single(folder, "calling", {"losses": model.mean_losses()}, LIMITS["32"])


@on_ranks(ALONE, 2, slow=(ALONE, *EACH))
def test_evaluates_without_and_after_fit(folder: Path) -> str | None:
    model = Net(steps=2)
    made = trainer("auto" if not dist.is_initialized() else "lowbit_sharded", limit_val_batches=2)
    found = {"before": made.validate(model, verbose=False)[0]["loss"]}
    predicted = torch.cat(made.predict(model))  # type: ignore[arg-type]
    made.fit(model)
    made.fit_loop.max_epochs = 2
    made.fit(model)  # goes on where it was
    found["after"] = made.test(model, verbose=False)[0]["loss"]
    if predicted.shape != (24 // world(), 5):
        return f"predictions {tuple(predicted.shape)}"
    if len(model.losses) != 4:
        return f"{len(model.losses)} steps"
    return against_single(folder, "evaluated", found, 1e-3)


class Own(Net):
    """Shards itself: the blocks alone."""

    def configure_model(self) -> None:
        if isinstance(self.layers[0], FSDPModule) or not dist.is_initialized():
            return
        for layer in self.layers:
            fully_shard(layer, mesh=init_device_mesh("cpu", (world(),)))
        fully_shard(self, mesh=init_device_mesh("cpu", (world(),)))


class Late(L.LightningModule):
    """Made in configure_model, on the meta device: no rank ever holds all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: Any = None

    def configure_model(self) -> None:
        if self.layers is None:
            with torch.device("meta" if dist.is_initialized() else "cpu"):
                self.layers = nn.Sequential(*(Block() for _ in range(2)))

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.layers(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(4, 301)), batch_size=1)


@on_ranks(ALONE, 2, slow=(ALONE, *EACH))
def test_configure_model_is_respected(folder: Path) -> str | None:
    model, _ = fit(model=Own(steps=STEPS))
    problem = against_single(folder, "own", {"losses": model.mean_losses()}, LIMITS["32"])
    if problem or not dist.is_initialized():
        return problem
    late = Late()
    trainer().fit(late)
    off = [name for name, p in late.named_parameters() if p.is_meta or not torch.isfinite(whole(p)).all()]
    return f"meta, or not finite: {off}" if off else None


@on_ranks(2, slow=EACH)
def test_errors_name_the_remedy(folder: Path) -> str | None:
    class Early(Net):
        def __init__(self) -> None:
            super().__init__()
            self.early = torch.optim.AdamW(self.parameters())

        def configure_optimizers(self) -> Any:
            return self.early

    def nothing(name: str, module: nn.Module) -> bool:
        return False

    return (
        raised(lambda: trainer().fit(Early()), ValueError, "AdamW", "before sharding", "configure_optimizers")
        or raised(lambda: trainer(ShardedStrategy(policy=nothing)).fit(Net()), ValueError, "policy chose no module")
        or raised(
            lambda: trainer(ShardedStrategy(replicas=5)).fit(Net()), ValueError, "replicas must divide", str(world())
        )
    )


@on_ranks(ALONE, 2, slow=(ALONE, *EACH))
def test_ranks_need_no_common_seed(folder: Path) -> str | None:
    model = Net(
        lambda groups, lr: optim.SGD(groups, lr=0.5), steps=1, seed=dist.get_rank() if dist.is_initialized() else 0
    )
    fit(model=model)
    return against_single(folder, "seeds", weights(model), 1e-4)


@on_ranks(2, slow=(4, 2), after=test_trains_like_a_single_device)
def test_replicas_are_equal(folder: Path) -> str | None:
    """HSDP: two groups of ranks, a copy each; the losses of a single device, and checkpoints as ever."""
    strategy = ShardedStrategy(replicas=2)
    if OLD:
        raised(lambda: trainer(strategy).fit(Net()), RuntimeError, "replicas=2", "needs torch 2.8 or newer")
        return None
    model, made = fit("8", Net(steps=STEPS, lr=3e-4, length=17), strategy=strategy, gradient_clip_val=1.0)
    losses = {f"loss {i}": loss for i, loss in enumerate(model.mean_losses())}
    problem = against_single(folder, "losses_8", losses, LIMITS["8"])
    problem = problem or round_trip(folder / f"hsdp_{world()}", model, made, lambda: ShardedStrategy(replicas=2))
    held = {tuple(p.placements) for p in model.parameters()}  # type: ignore[attr-defined]
    return problem or (None if all(len(places) == 2 for places in held) else f"placed as {held}")
