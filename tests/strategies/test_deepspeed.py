"""What ``DeepSpeedStrategy`` makes of precision, groups, schedulers and partitions, without its engine."""

from __future__ import annotations

import os
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.plugins import DeepSpeedPrecision
from torch import Tensor, nn

from lowbit_lightning import Int8MixedPrecision, kernels, optim
from lowbit_lightning.optim import partitions
from lowbit_lightning.strategies import DeepSpeedStrategy
from lowbit_lightning.strategies.deepspeed import checkpoints
from lowbit_lightning.strategies.deepspeed.groups import SplitGroups

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the deepspeed extra is for Linux"),
    pytest.mark.usefixtures("deepspeed_imported"),
]


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("newer", [0, 1])
def test_of_a_checkpoint_that_was_saved_over_one_of_another_stage_the_newer_counts(tmp_path: Path, newer: int) -> None:
    (tmp_path / checkpoints.FOLDER).mkdir()
    for i, name in enumerate(("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")):
        file = tmp_path / checkpoints.FOLDER / name
        torch.save({"number": i}, file)
        os.utime(file, (1000 + (i == newer),) * 2)
    assert checkpoints.read(tmp_path) == {"number": newer}


# -- precision ---------------------------------------------------------------------------------------------------------


def test_the_strategy_chooses_the_form_of_the_plugin() -> None:
    """The same object for another strategy is the other form again."""
    plugin = Int8MixedPrecision(exclude="head")
    for strategy, engine in (("lowbit_deepspeed_stage_2", True), ("auto", False), (DeepSpeedStrategy(3), True)):
        options: Any = {"accelerator": "cpu", "devices": 1, "logger": False}
        assert L.Trainer(plugins=[plugin], strategy=strategy, **options).precision_plugin is plugin
        assert isinstance(plugin, DeepSpeedPrecision) == engine
        name: Any = strategy if isinstance(strategy, str) else DeepSpeedStrategy(3)
        named = L.Trainer(precision="int8-mixed", strategy=name, **options).precision_plugin  # type: ignore[arg-type]
        assert isinstance(named, DeepSpeedPrecision) == engine
        assert named.precision == "int8-mixed"


# -- groups ------------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(100, 64)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)


def split(make: Any = optim.AdamW, **options: Any) -> tuple[Any, Any, Model]:
    model = Model()
    groups = [{"params": [p], "lr": 0.1 * (i + 1)} for i, p in enumerate(model.parameters())]
    groups[1] = {"params": [*groups[1]["params"], *groups.pop(2)["params"]], "lr": 0.2}  # type: ignore[misc]
    optimizer = make(groups, **options)
    return optimizer, SplitGroups(optimizer, model), model


def test_vectors_and_embeddings_get_groups_of_32_bits() -> None:
    optimizer, _, model = split(weight_decay=0.3)
    owners = {p: name for name, p in model.named_parameters()}
    found = [(group["bits"], [owners[p] for p in group["params"]]) for group in optimizer.param_groups]
    assert found == [(32, ["tokens.weight"]), (8, ["up.weight"]), (8, ["down.weight"]), (32, ["down.bias"]),
                     (32, ["up.bias"])]  # fmt: skip
    assert [group["lr"] for group in optimizer.param_groups][-1] == 0.2
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.3}
    assert len(split(bits=32)[0].param_groups) == 4
    assert len(split(torch.optim.AdamW)[0].param_groups) == 4


def test_frozen_parameters_make_no_group() -> None:
    model = Model()
    model.tokens.requires_grad_(False)
    for layer in (model.up, model.down):
        layer.bias.requires_grad_(False)
    optimizer = optim.AdamW(model.parameters())
    SplitGroups(optimizer, model)
    assert [group["bits"] for group in optimizer.param_groups] == [8]


class Warm(torch.optim.lr_scheduler.LRScheduler):
    """A user's own: one step late, what another scheduler says, which it holds under a name of its own."""

    def __init__(self, optimizer: Any) -> None:
        self.after = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]
        super().__init__(optimizer)

    def get_lr(self) -> Any:
        return [0.1 * lr for lr in self.after[0].get_last_lr()]

    def step(self, epoch: int | None = None) -> None:
        if self.last_epoch >= 0:
            self.after[0].step()
        super().step()


def schedulers(optimizer: Any) -> dict[str, Any]:
    lr = torch.optim.lr_scheduler
    return {
        "lambda": lr.LambdaLR(optimizer, [partial(pow, 0.9 - 0.1 * i) for i in range(4)]),
        "one cycle": lr.OneCycleLR(optimizer, [0.1, 0.2, 0.3, 0.4], total_steps=20),
        "sequential": lr.SequentialLR(
            optimizer, [lr.ConstantLR(optimizer, 0.5), lr.CosineAnnealingLR(optimizer, 20)], [2]
        ),
        "chained": lr.ChainedScheduler([lr.ExponentialLR(optimizer, 0.9), lr.StepLR(optimizer, 2)]),
        "plateau": lr.ReduceLROnPlateau(optimizer, patience=0, min_lr=[0.0, 0.1, 0.2, 0.3]),
        "cyclic": lr.CyclicLR(optimizer, 0.01, [0.1, 0.2, 0.3, 0.4], step_size_up=2),
        "holding another": Warm(optimizer),
    }


@pytest.mark.parametrize(
    "name", ["lambda", "one cycle", "sequential", "chained", "plateau", "cyclic", "holding another"]
)
def test_schedulers_go_on_and_new_groups_follow(name: str) -> None:
    """As on an optimizer that was never split, also after its groups were loaded; momenta that cycle too."""
    expected: Any = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": 0.1 * (i + 1)} for i in range(4)],
                                    momentum=0.9)  # fmt: skip
    model = Model()
    groups = [[model.tokens.weight], [model.up.weight, model.up.bias], [model.down.weight], [model.down.bias]]
    optimizer = optim.SGD([{"params": g, "lr": 0.1 * (i + 1)} for i, g in enumerate(groups)], momentum=0.9)
    theirs, ours = schedulers(expected)[name], schedulers(optimizer)[name]
    parts = SplitGroups(optimizer, model)
    parts.hide_from(ours)
    assert isinstance(ours.optimizer, optim.SGD)
    for step in range(6):
        for opt, scheduler in ((expected, theirs), (optimizer, ours)):
            parts.follow()
            opt.step()
            scheduler.step(*([1.0] if name == "plateau" else []))
        if step == 3:
            optimizer.load_state_dict(optimizer.state_dict())
        parts.follow()
        for key in ("lr", "momentum"):
            wanted = [group[key] for group in expected.param_groups]
            assert [group[key] for group in optimizer.param_groups] == [*wanted, wanted[1]], (step, key)


# -- partitions --------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 700), st.integers(-25, 25), st.integers(0, 2**31), st.booleans())
def test_saved_values_quantise_to_the_codes_they_were(length: int, exponent: int, seed: int, signed: bool) -> None:
    """Decoding and quantising again is the identity: short and empty blocks, zeros, either map, 50 decades."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(length, generator=generator) * 10.0 ** (3 * torch.randn(length, generator=generator))
    values = values.where(torch.rand(length, generator=generator) < 0.8, 0.0)
    values[: length // 3] = 0  # a block of zeros
    codebook = "dynamic_signed" if signed else "dynamic_unsigned"
    values = (values if signed else values.square()) * 10.0**exponent
    values = values.clamp(-1e30, 1e30)
    codes, scales = kernels.quantize_blockwise(values, codebook, 256)
    decoded = kernels.dequantize_blockwise(codes, scales, codebook, 256)
    again = kernels.quantize_blockwise(decoded, codebook, 256)
    assert torch.equal(scales, again[1])
    normal = scales[0].repeat_interleave(256)[:length].abs() > 1e-30  # below, values lose digits: not normal numbers
    assert torch.equal(codes[normal], again[0][normal])


def partition(values: Tensor) -> Tensor:
    p = values.clone().requires_grad_()
    p.grad = torch.ones_like(values)
    return p


def test_partitions_are_told_from_parameters() -> None:
    assert partitions.is_partition(torch.zeros(5, requires_grad=True))
    assert not partitions.is_partition(nn.Parameter(torch.zeros(5)))
    assert not partitions.is_partition(torch.zeros(5, 1, requires_grad=True))
    assert not partitions.are_partitions([])


def test_saved_states_are_float32_and_load_to_the_bit() -> None:
    optimizer = optim.AdamW([partition(torch.randn(5000))])
    optimizer.step()
    before = {k: x.clone() for k, x in optimizer.state[optimizer.param_groups[0]["params"][0]].items()}
    saved = optimizer.state_dict()
    assert {k: x.dtype for k, x in saved["state"][0].items()} == dict.fromkeys(
        ("step", "exp_avg", "exp_avg_sq"), torch.float32
    )
    assert not {"bits", "state_format", "min_size", "block_size"} & set(saved["param_groups"][0])
    torch.optim.AdamW([torch.zeros(5000, requires_grad=True)]).load_state_dict(saved)
    other = optim.AdamW([partition(torch.randn(5000))], bits=8)
    other.load_state_dict(saved)
    after = other.state[other.param_groups[0]["params"][0]]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_states_that_deepspeed_writes_are_taken_over() -> None:
    """Float32 beside codes of before, and one step for all partitions, in whatever dtype."""
    params = [partition(torch.zeros(5000)), partition(torch.zeros(5000))]
    optimizer = optim.AdamW([{"params": [p], "bits": bits} for p, bits in zip(params, (8, 32), strict=True)], lr=0.1)
    optimizer.step()
    step, written = torch.tensor(7), torch.randn(5000)
    for p in params:
        optimizer.state[p] |= {"step": step, "exp_avg": written.clone(), "exp_avg_sq": written.square()}
    reference = [partition(p.detach()) for p in params]
    twin = torch.optim.AdamW(reference, lr=0.1)
    for p in reference:
        twin.state[p] = {"step": torch.tensor(7.0), "exp_avg": written.clone(), "exp_avg_sq": written.square()}
    groups = optimizer.param_groups
    for group in groups:  # as DeepSpeed does
        optimizer.param_groups = [group]
        optimizer.step()
    optimizer.param_groups = groups
    twin.step()
    assert [float(optimizer.state[p]["step"]) for p in params] == [8.0, 8.0]
    assert step == 7
    assert set(optimizer.state[params[0]]) == {
        f"{name}_{part}" for name in ("exp_avg", "exp_avg_sq") for part in ("codes", "scales")
    } | {"step"}
    assert torch.allclose(params[1], reference[1], rtol=1e-6, atol=1e-7)
    assert (params[0] - reference[0]).norm() < 0.05 * (reference[0] - 0).norm()


@pytest.mark.parametrize("paged", [False, "disk"])
@pytest.mark.parametrize(
    "changes",
    [[{"block_size": 64}, {"block_size": 512}], [{"bits": 32}, {"bits": 8}], [{"bits": 32, "block_size": 64}]],
)
def test_sub_groups_follow_their_group(changes: list[dict[str, Any]], paged: bool | str, page_dir: Path) -> None:
    """Stage 3 shows a group as several, one at a time; settings that change between steps count for each of them, and
    for what is saved before the next step, of all at once."""
    sizes, generator = (70_001, 5000, 9000), torch.Generator().manual_seed(0)
    values = [torch.randn(size, generator=generator) for size in sizes]
    parameters, parts = [nn.Parameter(value.clone()) for value in values], [partition(value) for value in values]
    whole = optim.AdamW(parameters, lr=0.1)
    cut = optim.AdamW([{"params": parts}], lr=0.1, paged=paged, page_dir=str(page_dir) if paged else None)
    for settings_then in ({}, *changes):
        for optimizer in (whole, cut):
            optimizer.param_groups[0].update(settings_then)
        cut.param_groups[0]["params"] = list(parts)
        expected, saved = whole.state_dict(bits=32)["state"], cut.state_dict()["state"]
        cut.param_groups[0]["params"] = []
        assert saved.keys() == expected.keys()
        for key, entries in expected.items():
            assert all(torch.equal(value, saved[key][name]) for name, value in entries.items())
        for _ in range(2):
            for p, part in zip(parameters, parts, strict=True):
                p.grad = torch.randn(p.shape, generator=generator)
                part.grad = p.grad.clone()
            whole.step()
            for part in parts:  # as DeepSpeed does
                cut.param_groups[0]["params"] = [part]
                cut.step()
                cut.param_groups[0]["params"] = []
        for p, part in zip(parameters, parts, strict=True):
            assert torch.equal(p, part)
            assert whole.state[p].keys() == cut.state[part].keys()
            assert all(torch.equal(value, cut.state[part][name]) for name, value in whole.state[p].items())


@pytest.mark.parametrize("bits", [8, 32])
def test_partitions_may_be_paged(bits: int, tmp_path: Path) -> None:
    """Groups are shown one at a time, as DeepSpeed does: one pager, and the states without paging, to the bit."""
    steps: list[int] = []

    def trained(**options: Any) -> Any:
        generator = torch.Generator().manual_seed(0)
        params = [partition(torch.randn(size, generator=generator)) for size in (70_000, 5000, 9000)]
        optimizer = optim.AdamW([{"params": [p]} for p in params], lr=0.1, bits=bits, **options)
        groups = optimizer.param_groups
        for _ in range(3):
            for group in groups:
                group["params"][0].grad = torch.randn(group["params"][0].shape, generator=generator)
                optimizer.param_groups = [group]
                optimizer.step()
            statistics = optimizer.page_statistics()
            steps.append(statistics.steps if statistics else 0)
        optimizer.param_groups = groups
        return optimizer

    plain, paged = trained(), trained(paged="disk", page_dir=str(tmp_path))
    for p, q in zip(plain.state, paged.state, strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(x, paged.state[q][name]) for name, x in plain.state[p].items())
    assert [after - before for before, after in pairwise(steps[3:])] == [1, 1], "a pass over all groups is a step"
    assert paged.page_statistics().far_bytes == pytest.approx((2 if bits == 8 else 8) * 84_000, rel=0.05)
    assert paged.state_dict()["state"][0]["exp_avg"].dtype == torch.float32
