"""Paged states in every optimizer: the numbers of unpaged ones to the bit, whatever happens to the optimizer.

The engine that lies in wait (``paged_engine.py``) stands for a GPU and its copies.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.optimizer import _optimizer_to_device
from optimizers import one_thread, step
from paged_engine import Stream, lying_in_wait
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils.data import DataLoader

from lowbit_lightning import kernels, optim
from lowbit_lightning.optim import base, loading
from lowbit_lightning.state import pages
from lowbit_lightning.state.pages import Entries, Pager

__all__ = ["one_thread"]  # a fixture

KINDS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"momentum": 0.9, "lr": 0.1}),
    ("Adam", {"amsgrad": True}),
    ("AdamW", {}),
    ("RMSprop", {"centered": True, "momentum": 0.5}),
    ("Adagrad", {"initial_accumulator_value": 0.1}),
    ("Lion", {}),
    ("LAMB", {}),
    ("LARS", {"lr": 0.1}),
    ("AdEMAMix", {"t_alpha": 3, "t_beta3": 3}),
]
SHAPES = [(96, 300), (70, 256), (5000,), (33,), (600, 512), (3, 100, 64), (0, 64), (150_001,)]
CHUNK = 150_000  # bytes: some parameters are cut, some share a chunk


def parameters(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def build(kind: str, params: list[Parameter], **options: Any) -> optim.LowBitOptimizer:
    groups = [{"params": params[:4]}, {"params": params[4:], "weight_decay": 0.1}]
    return getattr(optim, kind)(groups, **options)


def states(optimizer: optim.LowBitOptimizer) -> dict[Any, dict[str, Tensor]]:
    return {key: dict(entries) for key, entries in optimizer.state_dict()["state"].items()}


def assert_same(ours: Any, theirs: Any) -> None:
    """Parameters and states of (params, optimizer), to the bit."""
    for i, (p, q) in enumerate(zip(ours[0], theirs[0], strict=True)):
        assert torch.equal(p, q), f"parameter {i}: {(p - q).abs().max()}"
    left, right = states(ours[1]), states(theirs[1])
    assert left.keys() == right.keys()
    for key, entries in left.items():
        assert entries.keys() == right[key].keys()
        for name, value in entries.items():
            assert torch.equal(value, right[key][name]), (key, name)


def both(
    act: Callable[[list[Parameter], optim.LowBitOptimizer], Any],
    kind: str = "AdamW",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    haste: float = 0.0,
    resident: int = 0,
    **options: Any,
) -> None:
    """``act`` on a paged and an unpaged optimizer; what comes out has to be the same."""
    unpaged = parameters(dtype)
    plain = build(kind, unpaged, **options)
    plain = act(unpaged, plain) or plain
    with lying_in_wait(seed, haste, CHUNK):
        params = parameters(dtype)
        paged = build(kind, params, paged=True, resident=resident, **options)
        paged = act(params, paged) or paged
        assert_same((params, paged), (unpaged, plain))
        assert any(isinstance(entries, Entries) for entries in paged.state.values())


def steps(params: list[Parameter], optimizer: torch.optim.Optimizer, numbers: range = range(3)) -> None:
    for number in numbers:
        step(optimizer, params, number)


# -- bars ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize(("kind", "options"), KINDS, ids=[kind for kind, _ in KINDS])
def test_every_optimizer(kind: str, options: dict[str, Any], bits: int) -> None:
    both(steps, kind, seed=bits, haste=0.3 if bits == 8 else 0.0, resident=200_000, bits=bits, **options)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("resident", [0, 300_000, 10**9])
def test_budgets_and_delays(seed: int, resident: int) -> None:
    both(steps, seed=seed, haste=(0.0, 0.0, 0.1, 0.5)[seed % 4], resident=resident)


@pytest.mark.parametrize("options", [{"stochastic_rounding": True, "seed": 7}, {"master": "bf16+8"}], ids=str)
@pytest.mark.parametrize("kind", ["AdamW", "LAMB"])
def test_bfloat16(kind: str, options: dict[str, Any]) -> None:
    both(steps, kind, dtype=torch.bfloat16, **options)


def test_norms_of_a_parameter_that_is_cut() -> None:
    """Rows that are no multiple of a block are not cut under a trust ratio; the others' sums are put together."""
    with lying_in_wait(chunk=CHUNK):
        params = parameters()
        optimizer = build("LAMB", params, paged=True)
        step(optimizer, params)
        pieces = {
            tuple(p.shape): len(optimizer.state[p].pager.pieces[optimizer.state[p].number]) for p in params if p.numel()
        }
    assert pieces[SHAPES[4]] > 1
    assert pieces[SHAPES[7]] > 1
    assert pieces[SHAPES[0]] == 1


@pytest.mark.parametrize("kind", ["LAMB", "LARS"])
def test_the_sums_of_pieces_are_the_sum(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, to the bit: more pieces than are folded at once, and a last one that is short; values of such
    different size that it matters in which order they are added."""
    found: list[Tensor] = []

    def note(_: Any, sums: Tensor) -> Tensor:
        found.append(sums.clone())
        return sums

    monkeypatch.setattr(base.shards, "sum_over_shards", note)
    shape = (300 * 256 * 32 + 1000,)
    with lying_in_wait(chunk=1_000_000):
        variants: list[dict[str, Any]] = [{}, {"paged": True}]
        for options in variants:
            generator = torch.Generator().manual_seed(0)
            size = 2.0 ** torch.randint(-25, 25, shape, generator=generator)
            params = [Parameter(torch.randn(shape, generator=generator) * size)]
            optimizer = getattr(optim, kind)(params, block_size=32, lr=0.1, **options)
            steps(params, optimizer, range(2))
    assert len(found) == 4
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])
    assert (found[1] > 0).all()


# -- what asks for more than plain steps -----------------------------------------------------------------------------


def test_clipping_accumulation_and_missing_gradients() -> None:
    def act(params: list[Parameter], optimizer: optim.LowBitOptimizer) -> None:
        for number in range(5):
            optimizer.zero_grad()
            for micro in range(2):
                generator = torch.Generator().manual_seed(10 * number + micro)
                for i, p in enumerate(params):
                    if (i + number) % 3:
                        grad = torch.randn(p.shape, generator=generator)
                        p.grad = grad if p.grad is None else p.grad + grad
            optimizer.clip_next_step(1.0 if number % 2 else None)
            optimizer.step()

    both(act)
    both(act, "LAMB", resident=200_000, haste=0.2)


@pytest.mark.parametrize("kind", ["AdamW", "LARS"])
def test_skipped_steps(kind: str) -> None:
    """Counts of a cut parameter advance once, and not at all in a step that is skipped."""

    def act(params: list[Parameter], optimizer: optim.LowBitOptimizer) -> None:
        for number in range(4):
            for p in params:
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(number))
            if number == 1:
                params[4].grad[-1, -1] = torch.nan  # type: ignore[index]
            optimizer.step()
        assert [float(optimizer.state[p]["step"]) for p in params] == [3.0] * len(params)

    both(act, kind, skip_nonfinite=True, lr=0.1)


def test_a_scaler() -> None:
    def act(params: list[Parameter], optimizer: optim.LowBitOptimizer) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
        for number in range(4):
            for p in params:
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(number)) * scaler.get_scale()
            if number == 2:
                params[0].grad[0, 0] = torch.inf  # type: ignore[index]
            scaler.scale(torch.zeros(()))  # which makes its state
            scaler.step(optimizer)
            scaler.update()

    both(act)


def test_memory_formats_and_gradients_that_are_not_contiguous() -> None:
    def act(params: list[Parameter], optimizer: optim.LowBitOptimizer) -> None:
        for number in range(3):
            generator = torch.Generator().manual_seed(number)
            for p in params:
                p.grad = torch.randn(*p.shape[::-1], generator=generator).permute(*range(p.ndim - 1, -1, -1))
            optimizer.step()

    both(act)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that copies are made
        odd = torch.randn(64, 64, 3, 3).contiguous(memory_format=torch.channels_last)
        with lying_in_wait(chunk=20_000):
            paged, plain = Parameter(odd.clone()), Parameter(odd.clone())
            ours, theirs = optim.AdamW([paged], paged=True), optim.AdamW([plain])
            steps([paged], ours)
            steps([plain], theirs)
            assert_same(([paged], ours), ([plain], theirs))


# -- what happens to an optimizer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 32])
def test_checkpoints_go_both_ways(bits: int) -> None:
    """paged -> unpaged -> paged, with other bits in between, through a file."""
    expected = parameters()
    yardstick = build("AdamW", expected)
    steps(expected, yardstick)
    with lying_in_wait(3, 0.1, CHUNK):
        params = parameters()
        optimizer = build("AdamW", params, paged=True)
        steps(params, optimizer)
        rounds: list[dict[str, Any]] = [{}, {"paged": True, "resident": 10**6}, {"bits": bits}, {"paged": True}]
        for number, options in enumerate(rounds):
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            assert file.tell() < 1.1 * sum(v.nbytes for s in states(optimizer).values() for v in s.values()) + 60_000
            file.seek(0)
            optimizer = build("AdamW", params, **options)
            optimizer.load_state_dict(torch.load(file))
            paged = [isinstance(optimizer.state[p], Entries) for p in params if p.numel()]
            assert all(paged) == any(paged) == ("paged" in options), "paged as soon as it is loaded"
            if number == 2:
                saved = yardstick.state_dict()
                yardstick = build("AdamW", expected, bits=bits)
                yardstick.load_state_dict(saved)
            if number == 3:
                saved = yardstick.state_dict()
                yardstick = build("AdamW", expected)
                yardstick.load_state_dict(saved)
            steps(params, optimizer, range(number + 3, number + 5))
            steps(expected, yardstick, range(number + 3, number + 5))
        assert_same((params, optimizer), (expected, yardstick))


def test_a_load_that_is_taken_back() -> None:
    """As the sharded strategy does it, where another optimizer's states do not fit."""

    def act(params: list[Parameter], optimizer: optim.LowBitOptimizer) -> None:
        steps(params, optimizer)
        saved = copy.deepcopy(optimizer.state_dict())
        steps(params, optimizer, range(3, 5))
        before = optimizer.state, optimizer.param_groups
        optimizer.load_state_dict(saved)
        step_3 = float(optimizer.state[params[0]]["step"])
        optimizer.state, optimizer.param_groups = before
        assert (step_3, float(optimizer.state[params[0]]["step"])) == (3.0, 5.0)
        steps(params, optimizer, range(5, 7))

    both(act, resident=200_000)


def test_32_bit_checkpoints_for_torch() -> None:
    with lying_in_wait(chunk=CHUNK):
        params = parameters()
        optimizer = build("AdamW", params, paged=True)
        steps(params, optimizer)
        twins = parameters()
        plain = build("AdamW", twins)
        steps(twins, plain)
        ours, theirs = optimizer.state_dict(bits=32), plain.state_dict(bits=32)
        assert "paged" not in ours["param_groups"][0]
        for key, entries in theirs["state"].items():
            assert all(torch.equal(ours["state"][key][name], value) for name, value in entries.items())


def test_toggling() -> None:
    """``paged``, ``bits`` and ``block_size`` of a group, in the middle of a run."""

    def act(params: list[Parameter], optimizer: optim.LowBitOptimizer) -> None:
        pages_now = bool(optimizer.param_groups[0]["paged"])
        step(optimizer, params, 0)
        optimizer.param_groups[0]["bits"] = 32
        step(optimizer, params, 1)
        if pages_now:
            optimizer.param_groups[1]["paged"] = False
        optimizer.param_groups[0]["bits"] = 8
        step(optimizer, params, 2)
        assert not any(isinstance(optimizer.state[p], Entries) for p in params[4:])
        if pages_now:
            optimizer.param_groups[1]["paged"] = True
        optimizer.param_groups[1]["block_size"] = 64
        step(optimizer, params, 3)
        for group in optimizer.param_groups:
            group["resident"] = "200KB"
        step(optimizer, params, 4)

    both(act)


def test_a_run_that_stops_paging_gives_its_memory_back() -> None:
    with lying_in_wait(chunk=CHUNK) as stream:
        params = parameters()
        optimizer = build("AdamW", params, paged=True)
        step(optimizer, params, 0)
        for group in optimizer.param_groups:
            group["paged"] = False
        step(optimizer, params, 1)
        assert [engine.closed for engine in stream.engines] == [True]
        assert optimizer.page_statistics() is None


def test_an_optimizer_that_is_let_go_takes_its_pages_along() -> None:
    with lying_in_wait(chunk=CHUNK):
        params = parameters()
        optimizer = build("AdamW", params, paged=True, resident=200_000)
        steps(params, optimizer)
        pager = weakref.ref(optimizer.state[params[0]].pager)
        gc.disable()
        try:
            del optimizer
            assert pager() is None, "without waiting for the garbage collector"
        finally:
            gc.enable()


def test_counting_goes_on_with_a_new_slab() -> None:
    with lying_in_wait(chunk=CHUNK) as stream:
        params = parameters()
        optimizer = build("AdamW", params, paged=True)
        steps(params, optimizer)
        before = copy.copy(optimizer.page_statistics())
        optimizer.param_groups[0]["bits"] = 32
        step(optimizer, params)
        after = optimizer.page_statistics()
        assert len(stream.engines) == 2
        assert before is not None
        assert after is not None
        assert after.steps == before.steps + 1
        assert after.bytes_in > before.bytes_in
        assert after.far_bytes > before.far_bytes


def test_new_groups_and_parameters_that_thaw() -> None:
    def act(params: list[Parameter], optimizer: optim.LowBitOptimizer) -> None:
        params[0].requires_grad_(False)
        for number in range(4):
            generator = torch.Generator().manual_seed(number)
            for p in params:
                grad = torch.randn(p.shape, generator=generator)
                p.grad = grad if p.requires_grad else None
            optimizer.step()
            if number == 0:
                new = Parameter(torch.ones(300, 256))
                params.append(new)
                optimizer.add_param_group({"params": [new], "lr": 0.1})
            if number == 1:
                params[0].requires_grad_(True)

    both(act)


def test_what_reads_and_writes_the_state_sees_it_as_it_is() -> None:
    def act(params: list[Parameter], optimizer: optim.LowBitOptimizer) -> None:
        held = optimizer.state[params[4]]
        for number in range(4):
            step(optimizer, params, number)
            held = optimizer.state[params[4]]
            seen.append(held["exp_avg_codes"].clone())
            held["exp_avg_codes"] = held["exp_avg_codes"].roll(1)
            optimizer.state[params[0]]["exp_avg_sq_codes"].fill_(17)  # where it lies
            assert sorted(held) == sorted(dict(held))
            assert "exp_avg_codes" in held
            assert len(held) == 5
            assert held.get("nothing") is None

    seen: list[Tensor] = []
    both(act, resident=200_000)
    assert all(torch.equal(a, b) for a, b in zip(seen[:4], seen[4:], strict=True))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_copies(duplicate: Callable[[Any], Any]) -> None:
    def act(params: list[Parameter], optimizer: optim.LowBitOptimizer) -> optim.LowBitOptimizer:
        steps(params, optimizer)
        other = duplicate(optimizer)
        twins = [p for group in other.param_groups for p in group["params"]]
        steps(twins, other, range(3, 6))
        assert not torch.equal(params[0], twins[0])
        steps(params, optimizer, range(6, 8))
        return optimizer

    both(act)


def test_conversion_of_a_torch_optimizer() -> None:
    def act(params: list[Parameter], optimizer: optim.LowBitOptimizer) -> optim.LowBitOptimizer:
        options = {k: optimizer.param_groups[0][k] for k in ("paged", "resident")}
        theirs = torch.optim.AdamW([{"params": params[:4]}, {"params": params[4:]}])
        step(theirs, params, 0)
        ours = optim.convert_(theirs, **options)
        steps(params, ours, range(1, 4))
        return ours

    both(act)


def test_two_optimizers() -> None:
    def act(params: list[Parameter], optimizer: optim.LowBitOptimizer) -> None:
        others = parameters()
        second = build("Lion", others, paged=optimizer.param_groups[0]["paged"])
        for number in range(3):
            step(optimizer, params, number)
            step(second, others, number)
        seen.append((others, states(second)))

    seen: list[Any] = []
    both(act)
    assert all(torch.equal(p, q) for p, q in zip(seen[0][0], seen[1][0], strict=True))


# -- gradient release ------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Its layers are used in another order than they are made in."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(128, 128) for _ in range(6))
        self.sometimes = nn.Parameter(torch.zeros(128))

    def forward(self, x: Tensor, number: int = 1) -> Tensor:
        for i in (3, 0, 5, 1, 2, 4):
            x = torch.tanh(self.layers[i](x))
        return x + self.sometimes if number % 2 else x


@pytest.mark.parametrize("haste", [0.0, 0.3])
def test_gradient_release(haste: float) -> None:
    def train(net: Net, optimizer: optim.LowBitOptimizer) -> None:
        for number in range(5):
            x = torch.randn(8, 128, generator=torch.Generator().manual_seed(number))
            net(x, number).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    plain, paged = Net(), Net()
    theirs = optim.AdamW(plain.parameters(), lr=1e-2)
    train(plain, theirs)
    with lying_in_wait(1, haste, 20_000) as stream:
        matrices, vectors = ([p for p in paged.parameters() if (p.ndim > 1) == wide] for wide in (True, False))
        ours = optim.AdamW([{"params": matrices}, {"params": vectors}], lr=1e-2, paged=True)
        handle = optim.release_gradients(paged, ours)
        train(paged, ours)
        assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), paged.parameters(), strict=True))
        assert len(stream.engines) == 2, "the slab is put in the order of the first pass, once"
        assert [engine.closed for engine in stream.engines] == [True, False]
        places = [ours.state[paged.get_parameter(f"layers.{i}.weight")].number for i in (4, 2, 1, 5, 0, 3)]
        assert places == sorted(places)
        handle.remove()
        train(paged, ours)
        train(plain, theirs)
        assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), paged.parameters(), strict=True))


def test_a_released_step_moves_each_chunk_once() -> None:
    with lying_in_wait(0, 0.0, 20_000):
        net = Net()
        optimizer = optim.AdamW(net.parameters(), paged=True)
        optim.release_gradients(net, optimizer)
        moved = []
        for _ in range(4):
            net(torch.randn(8, 128)).sum().backward()
            optimizer.step()
            statistics = optimizer.page_statistics()
            assert statistics is not None
            moved.append((statistics.bytes_in, statistics.bytes_out))
        total = sum(v.nbytes for s in states(optimizer).values() for n, v in s.items() if n.endswith(("_codes", "exp")))
        assert moved[3][1] - moved[2][1] <= 1.2 * total


# -- Lightning -------------------------------------------------------------------------------------------------------


def test_lightning_moves_nothing() -> None:
    with lying_in_wait(chunk=CHUNK):
        params = parameters()
        optimizer = build("AdamW", params, paged=True)
        steps(params, optimizer)
        before = {p: optimizer.state[p] for p in params if p.numel()}
        _optimizer_to_device(optimizer, torch.device("meta"))  # nothing comes back from there
        assert all(optimizer.state[p] is entries for p, entries in before.items())
        for p in before:
            assert all(value.device.type == "cpu" for value in optimizer.state[p].values())


class Module(L.LightningModule):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.net, self.options = Net(), options

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return optim.AdamW(self.parameters(), lr=1e-2, **self.options)


def fit(module: Module, folder: Any, epochs: int, resume: bool = False) -> L.Trainer:
    data = torch.randn(24, 128, generator=torch.Generator().manual_seed(3))
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        default_root_dir=folder,
        enable_checkpointing=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=2,
        gradient_clip_val=0.5,
    )
    loader: DataLoader[Any] = DataLoader(list(data), batch_size=4)  # type: ignore[arg-type]
    trainer.fit(module, loader, ckpt_path=folder / "last.ckpt" if resume else None)
    trainer.save_checkpoint(folder / "last.ckpt")
    return trainer


def test_a_run_under_lightning_is_saved_and_resumed(tmp_path: Any) -> None:
    plain = Module()
    fit(plain, tmp_path, 4)
    with lying_in_wait(5, 0.2, 20_000):
        fit(Module(paged=True), tmp_path, 2)
        paged = Module(paged=True, resident=30_000)
        trainer = fit(paged, tmp_path, 4, resume=True)
        assert isinstance(trainer.optimizers[0].state[paged.net.get_parameter("layers.0.weight")], Entries)
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), paged.parameters(), strict=True))


# -- another device --------------------------------------------------------------------------------------------------


class Nowhere:
    """A transport under a device without memory: what mixes near and far in one operation raises there."""

    device = torch.device("meta")

    def allocate(self, nbytes: int) -> Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8)

    def buffer(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device="meta")

    def __getattr__(self, name: str) -> Callable[..., None]:
        assert name in ("fetch", "store", "computed", "wait", "settle", "trim", "close"), name
        return lambda *_, **__: None


@pytest.mark.parametrize("kind", ["AdamW", "LAMB"])
def test_near_and_far_may_be_different_devices(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps, conversions, checkpoints: what is paged is on the CPU, kernels see nothing that is, and no state of the
    device is as large as a parameter's."""

    def on_device(arguments: kernels.StepArguments, norms: Tensor | None = None) -> Tensor:
        arguments.check()
        assert arguments.device.type == "meta"
        return torch.empty(len(arguments.params), 2, dtype=torch.float64, device="meta")

    def written(pager: Pager, number: int, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            far = pager.far[number][name]
            assert (value.shape, value.dtype, far.device.type) == (far.shape, far.dtype, "cpu")

    monkeypatch.setattr(pages, "open_transport", lambda *_: Nowhere())
    monkeypatch.setattr(kernels, "optimizer_step", on_device)
    monkeypatch.setattr(kernels, "optimizer_norms", on_device)
    monkeypatch.setattr(Pager, "write", written)
    monkeypatch.setattr(loading, "away", lambda p, value: torch.empty(value.shape, dtype=value.dtype))
    monkeypatch.setattr(pages.layout, "CHUNK", CHUNK)
    params = [Parameter(p.detach().to("meta")) for p in parameters(torch.bfloat16)]
    optimizer = build(kind, params, paged=True, master="bf16+8")

    def act() -> None:
        for p in params:
            p.grad = torch.empty_like(p)
        optimizer.step()
        for entries in optimizer.state_dict()["state"].values():
            for name, value in entries.items():
                paged = name not in ("step", "exp_avg_scales", "exp_avg_sq_scales") and value.numel()
                assert value.device.type == ("cpu" if paged else "meta"), name

    act()
    act()
    optimizer.param_groups[0]["bits"] = 32
    act()
    optimizer.param_groups[0]["bits"] = 8
    optimizer.param_groups[1]["block_size"] = 64
    act()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    act()
    decoded = optimizer.state_dict(bits=32)["state"][0]
    assert decoded["exp_avg"].device.type == "cpu"
    for group in optimizer.param_groups:
        group["paged"] = False
    for p in params:
        p.grad = torch.empty_like(p)
    optimizer.step()
    assert all(v.device.type == "meta" for p in params for v in optimizer.state[p].values())


# -- bounds, warnings, errors ----------------------------------------------------------------------------------------


def test_near_memory_is_the_budget_and_the_ring() -> None:
    def near(stream: Stream) -> int:
        return sum(buffer.numel() for engine in stream.engines for buffer in engine.buffers)

    with lying_in_wait(chunk=CHUNK) as stream:
        params = parameters()
        optimizer = build("AdamW", params, bits=32, paged=True, resident="700KB")
        steps(params, optimizer)
        statistics = optimizer.page_statistics()
        assert statistics is not None
        assert near(stream) == statistics.near_bytes <= 700_000 + 3 * CHUNK
        assert 700_000 - CHUNK < statistics.resident_bytes <= 700_000
        assert statistics.far_bytes > 4_000_000
        assert statistics.steps == 3
        assert statistics.bytes_in >= statistics.far_bytes > statistics.resident_bytes
        assert 0 < statistics.resident_share < 0.2
        assert statistics.overlap is not None
        assert 0 <= statistics.overlap <= 1
        kept = statistics.near_bytes
        steps(params, optimizer, range(3, 6))
        assert near(stream) == kept, "nothing is allocated in later steps"
        assert len(stream.engines) == 1


def test_a_steady_step_only_travels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each streamed byte in and out once, and the host waits for no copy."""
    with lying_in_wait(chunk=CHUNK) as stream:
        params = parameters()
        optimizer = build("AdamW", params, paged=True)
        steps(params, optimizer)
        before = copy.copy(optimizer.page_statistics())
        settled: list[Any] = []
        engine = stream.engines[0]
        monkeypatch.setattr(engine, "settle", settled.append)
        step(optimizer, params, 5)
        after = optimizer.page_statistics()
        assert before is not None
        assert after is not None
        total = sum(moves.nbytes for kind, moves in engine.last if kind == "store")
        assert after.bytes_out - before.bytes_out == total
        assert after.bytes_in - before.bytes_in == total
        assert not settled


def test_paging_to_host_memory_means_nothing_on_a_cpu() -> None:
    params = parameters()
    optimizer = build("AdamW", params, paged=True)
    with pytest.warns(UserWarning, match='paged=True has no effect on cpu.*paged="disk"'):
        step(optimizer, params, 0)
    step(optimizer, params, 1)  # without another warning
    assert optimizer.page_statistics() is None
    for group in optimizer.param_groups:
        group["paged"] = "disk"
    step(optimizer, params, 2)
    assert optimizer.page_statistics() is not None
    for group in optimizer.param_groups:
        group["paged"] = True
    step(optimizer, params, 3)
    assert optimizer.page_statistics() is None
    assert not any(isinstance(entries, Entries) for entries in optimizer.state.values())


def test_a_file_under_a_gpu_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r'paged="disk".*cuda:0.*paged=True'):
        pages.open_transport("disk", torch.device("cuda:0"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"paged": "ram"}, "paged must be False, True .* got 'ram'"),
        ({"paged": True, "resident": "many"}, "resident must be a number of bytes.*got 'many'"),
        ({"paged": True, "resident": -1}, "resident must be .*got -1"),
        ({"paged": True, "resident": 0.5}, "resident must be .*got 0.5"),
        ({"paged": "disk", "page_dir": 3}, "page_dir must be .* got 3"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optim.AdamW(parameters(), **options)


@pytest.mark.parametrize(
    ("text", "count"), [(7, 7), ("7", 7), ("2 KB", 2000), ("512MiB", 2**29), ("1.5gib", 3 * 2**29), ("1TB", 10**12)]
)
def test_bytes(text: int | str, count: int) -> None:
    assert optim.options.parse_bytes(text) == count


def test_inert_options_warn() -> None:
    with pytest.warns(UserWarning, match="resident has no effect with paged=False"):
        optim.AdamW(parameters(), resident="1GB")
    with pytest.warns(UserWarning, match="page_dir has no effect with paged=True"):
        optim.AdamW(parameters(), paged=True, page_dir="/somewhere")


def test_budgets_of_groups_must_be_equal() -> None:
    with lying_in_wait(chunk=CHUNK):
        params = parameters()
        groups = [{"params": params[:4], "resident": 10}, {"params": params[4:], "resident": 20}]
        with pytest.raises(ValueError, match=r"equal in all param groups that are paged, got \(True, 10, None\)"):
            optim.AdamW(groups, paged=True)
        groups[1].pop("resident")
        optimizer = optim.AdamW(groups, paged=True)
        assert optimizer.param_groups[1]["resident"] == 10
        optimizer.param_groups[1]["resident"] = 20
        before = [p.detach().clone() for p in params]
        with pytest.raises(ValueError, match=r"equal in all param groups that are paged, got \(True, 10, None\)"):
            step(optimizer, params)
        assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True)), "before anything is changed"
