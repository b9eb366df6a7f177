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

import pytest
import torch
from support.optimizers import step
from support.paged_engine import lying_in_wait
from support.paged_optimizers import CHUNK, KINDS, SHAPES, assert_same, both, build, parameters, states, steps
from torch import Tensor
from torch.nn import Parameter

from lowbit_lightning import optim
from lowbit_lightning.optim.loading import all_or_nothing
from lowbit_lightning.state import shards
from lowbit_lightning.state.pages import Entries

# -- bars ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize(("kind", "options"), KINDS, ids=[kind for kind, _ in KINDS])
def test_every_optimizer(kind: str, options: dict[str, Any], bits: int) -> None:
    both(steps, kind, seed=bits, haste=0.3 if bits == 8 else 0.0, resident=200_000, bits=bits, **options)


@pytest.mark.parametrize("seed", range(8))
def test_budgets_and_delays(seed: int) -> None:
    both(steps, seed=seed, haste=(0.0, 0.0, 0.1, 0.5)[seed % 4], resident=(0, 300_000, 10**9)[seed % 3])


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

    monkeypatch.setattr(shards, "sum_over_shards", note)
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
        with pytest.raises(InterruptedError), all_or_nothing([optimizer]):
            optimizer.load_state_dict(saved)
            assert float(optimizer.state[params[0]]["step"]) == 3
            raise InterruptedError
        assert float(optimizer.state[params[0]]["step"]) == 5
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
        for block_size in (256, 64):
            for one in (optimizer, plain):
                one.param_groups[0]["block_size"] = block_size
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
