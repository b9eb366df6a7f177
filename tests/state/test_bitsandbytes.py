"""Checkpoints of bitsandbytes' optimizers: real ones, and ones written here after its documented layout."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from lowbit_lightning import kernels, optim
from lowbit_lightning.kernels.formats import BlockGrid

KEY = "__bnb_optimizer_quant_state__"
REAL = Path(__file__).parents[1] / "data" / "bitsandbytes.pt"


@pytest.fixture
def real() -> dict[str, Any]:
    """Checkpoints that bitsandbytes wrote; see data/make_bitsandbytes.py."""
    return torch.load(REAL, weights_only=True)


def decode(part: dict[str, Any], number: int, layer: int | None = None) -> Tensor:
    """A state's values in float64: ``qmap[code] * absmax`` over the flattened tensor in blocks of 256."""
    codes = part[f"state{number}"]
    if codes.dtype != torch.uint8:
        return codes.double()
    absmax = part[f"absmax{number}"]
    if layer is not None:
        codes, absmax = codes[layer], absmax[layer]
    flat = codes.flatten()
    values = torch.empty(flat.numel(), dtype=torch.float64)
    for i in range(0, flat.numel(), 256):
        values[i : i + 256] = part[f"qmap{number}"].double()[flat[i : i + 256].int()] * absmax[i // 256].double()
    return values.reshape(codes.shape)


def params_like(*shapes: tuple[int, ...]) -> list[Parameter]:
    return [Parameter(torch.randn(shape)) for shape in shapes]


def load(optimizer: Any, saved: dict[str, Any]) -> list[dict[str, Tensor]]:
    optimizer.load_state_dict(copy.deepcopy(saved))
    return [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]


def ours_decoded(state: dict[str, Tensor], name: str, codebook: str, block_size: int = 256) -> Tensor:
    if name in state:
        return state[name]
    return kernels.dequantize_blockwise(state[f"{name}_codes"], state[f"{name}_scales"], codebook, block_size)


MAPS = {1: ("exp_avg", "dynamic_signed"), 2: ("exp_avg_sq", "dynamic_unsigned")}

# -- real checkpoints --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 32])
def test_a_real_adamw(real: dict[str, Any], bits: int) -> None:
    """Rows of 512: codes and scales as they are. Rows of 130: requantised on our grid. Twenty elements: 32 bits."""
    saved = real["AdamW8bit"]
    params = params_like((8, 512), (33, 130), (20,))
    optimizer = optim.AdamW(params, lr=0.5, bits=bits)
    states = load(optimizer, saved)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (1e-3, (0.9, 0.999), 1e-8, 0.01)
    assert not {"alpha", "t_alpha", "t_beta3"} & set(group)
    for key, state in enumerate(states):
        part = saved["state"][key][KEY]
        assert float(state["step"]) == 5
        for number, (name, codebook) in MAPS.items():
            values = decode(part, number)
            if bits == 32 or key == 2:
                torch.testing.assert_close(state[name].double(), values, rtol=2e-6, atol=0)
            elif key == 0:
                assert torch.equal(state[f"{name}_codes"], part[f"state{number}"])
                assert torch.equal(state[f"{name}_scales"].flatten(), part[f"absmax{number}"])
            else:
                codes, scales = kernels.quantize_blockwise(values.float(), codebook, 256)
                assert scales.shape == (33, 1)
                torch.testing.assert_close(state[f"{name}_scales"], scales, rtol=2e-6, atol=0)
                assert (state[f"{name}_codes"].int() - codes.int()).abs().max() <= 1
    before = [p.detach().double() for p in params]
    gradients = [torch.randn(p.shape) for p in params]
    for p, g in zip(params, gradients, strict=True):
        p.grad = g
    optimizer.step()
    for key in (0, 2):  # what bitsandbytes' own next step would be, from its values
        part, g = saved["state"][key][KEY], gradients[key].double()
        m, v = 0.9 * decode(part, 1) + 0.1 * g, 0.999 * decode(part, 2) + 0.001 * g * g
        update = 1e-3 * m / (1 - 0.9**6) / ((v / (1 - 0.999**6)).sqrt() + 1e-8)
        expected = before[key] * (1 - 1e-5) - update
        assert (params[key].detach() - expected).norm() <= 1e-5 * update.norm() + 1e-7 * expected.norm()


def test_a_real_sgd(real: dict[str, Any]) -> None:
    """Its momentum is the first of ``betas``; its steps know no dampening, whatever it was given."""
    saved = real["SGD8bit"]
    (p,) = params_like((8, 512))
    optimizer = optim.SGD([p], lr=0.5, momentum=0.1, dampening=0.0)
    (state,) = load(optimizer, saved)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["dampening"]) == (0.1, 0.8, 0.0)
    assert "betas" not in group
    part = saved["state"][0][KEY]
    assert torch.equal(state["momentum_buffer_codes"], part["state1"])
    p.grad, before = torch.randn(8, 512), p.detach().double()
    optimizer.step()
    update = 0.1 * (0.8 * decode(part, 1) + p.grad.double())
    assert (p.detach() - (before - update)).norm() <= 1e-5 * update.norm()


def test_a_real_ademamix(real: dict[str, Any]) -> None:
    """Its two momenta are stacked in ``state1``; the slow one becomes 32 bits."""
    saved = real["AdEMAMix8bit"]
    (p,) = params_like((8, 512))
    optimizer = optim.AdEMAMix([p], alpha=1.0, t_alpha=7)
    (state,) = load(optimizer, saved)
    assert (optimizer.param_groups[0]["alpha"], optimizer.param_groups[0]["t_alpha"]) == (5.0, None)
    part = saved["state"][0][KEY]
    assert torch.equal(state["exp_avg_codes"], part["state1"][0])
    assert torch.equal(state["exp_avg_scales"].flatten(), part["absmax1"][0])
    torch.testing.assert_close(state["exp_avg_slow"].double(), decode(part, 1, 1), rtol=2e-6, atol=0)
    assert torch.equal(state["exp_avg_sq_codes"], part["state2"])
    p.grad = torch.randn(8, 512)
    optimizer.step()
    assert torch.isfinite(p).all()


# -- every optimizer, after the documented layout ----------------------------------------------------------------------


def dynamic_map(signed: bool) -> Tensor:
    """The 8-bit dynamic map after its description (Dettmers et al., 2022): decades of means of evenly spaced bounds."""
    values = [0.0, 1.0]
    for i in range(7):
        bounds = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1, dtype=torch.float64)
        means = ((bounds[1:] + bounds[:-1]) / 2 * 10.0 ** (i - 6)).tolist()
        values += means + ([-m for m in means] if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32)


def write(shape: tuple[int, ...], states: int, wrapped: bool = True, signed_only: bool = False) -> dict[str, Any]:
    """The entries of a parameter, with random codes."""
    part: dict[str, Any] = {}
    n = int(torch.tensor(shape).prod())
    for number in range(1, states + 1):
        if n < 4096:
            part[f"state{number}"] = torch.rand(shape)
            continue
        signed = number == 1
        low = 127 if signed_only else 0  # a non-negative state under the signed map
        part[f"state{number}"] = torch.randint(low, 256, shape, dtype=torch.uint8)
        part[f"qmap{number}"] = dynamic_map(signed)
        part[f"absmax{number}"] = torch.rand(-(-n // 256)) * 10.0 ** torch.randint(-6, 2, (-(-n // 256),))
    return {"step": 7, KEY: part} if wrapped else {"step": 7, **part}


def checkpoint(entries: list[dict[str, Any]], **group: Any) -> dict[str, Any]:
    keys = {"lr": 1e-3, "eps": 1e-8, "weight_decay": 0.0, **group}
    return {
        "state": dict(enumerate(entries)),
        "param_groups": [{**keys, "initial_lr": 0.25, "params": list(range(len(entries)))}],
    }


KINDS: list[tuple[str, int, dict[str, Any], dict[str, Any], list[str]]] = [
    ("Adam", 2, {"betas": (0.8, 0.9)}, {"betas": (0.8, 0.9)}, ["exp_avg", "exp_avg_sq"]),
    ("LAMB", 2, {"betas": (0.8, 0.9)}, {"betas": (0.8, 0.9)}, ["exp_avg", "exp_avg_sq"]),
    ("Lion", 1, {"betas": (0.8, 0.9), "eps": 0.0}, {"betas": (0.8, 0.9)}, ["exp_avg"]),
    ("SGD", 1, {"betas": (0.7, 0.5)}, {"momentum": 0.7, "dampening": 0.0, "nesterov": False}, ["momentum_buffer"]),
    ("LARS", 1, {"betas": (0.7, 0), "eps": 0.0}, {"momentum": 0.7, "eps": 0.0}, ["momentum_buffer"]),
    ("RMSprop", 1, {"betas": (0.9, 0.4)}, {"alpha": 0.9, "momentum": 0.0, "centered": False}, ["square_avg"]),
    ("Adagrad", 1, {"betas": (0.0, 0.0)}, {"lr_decay": 0.0}, ["sum"]),
]
UNSIGNED = ("exp_avg_sq", "square_avg", "sum")
SHAPES = ((16, 512), (4, 2, 512), (5000,), (33, 130), (3, 7))


@pytest.mark.parametrize(
    ("kind", "count", "theirs", "ours", "names"), KINDS, ids=lambda c: c if c in dir(optim) else ""
)
@pytest.mark.parametrize("wrapped", [True, False])
def test_every_optimizer(
    kind: str, count: int, theirs: dict[str, Any], ours: dict[str, Any], names: list[str], wrapped: bool
) -> None:
    signed_only = names[0] in ("square_avg", "sum")
    saved = checkpoint([write(shape, count, wrapped, signed_only) for shape in SHAPES], **theirs)
    extra = {"momentum": 0.1} if "momentum" in ours else {}
    optimizer = getattr(optim, kind)(params_like(*SHAPES), **extra)
    states = load(optimizer, saved)
    group = optimizer.param_groups[0]
    assert {k: group[k] for k in ours} == ours
    assert group["initial_lr"] == 0.25
    for shape, entries, state in zip(SHAPES, saved["state"].values(), states, strict=True):
        part = entries[KEY] if wrapped else entries
        grid, small = BlockGrid.of(shape), part["state1"].dtype != torch.uint8
        for number, name in enumerate(names, start=1):
            codebook = "dynamic_unsigned" if name in UNSIGNED else "dynamic_signed"
            values = decode(part, number)
            if small:
                assert torch.equal(state[name], part[f"state{number}"])
            elif (grid.rows == 1 or grid.row_length % 256 == 0) and not signed_only:
                assert torch.equal(state[f"{name}_codes"], part[f"state{number}"])
                assert torch.equal(state[f"{name}_scales"].flatten(), part[f"absmax{number}"])
            else:
                # each value is off by half a step of the map at most: 0.45/64 of its block's extreme at the top
                extreme = state[f"{name}_scales"].abs().repeat_interleave(256, 1)[:, : grid.row_length]
                error = (ours_decoded(state, name, codebook) - values).reshape(grid.rows, -1)
                assert (error.abs() <= 0.45 / 64 * 1.01 * extreme).all()
                assert ((values > 0) <= (ours_decoded(state, name, codebook) != 0)).all() or codebook[8] == "s"
    for p in group["params"]:
        p.grad = torch.randn(p.shape)
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in group["params"])


def test_another_block_size_requantises() -> None:
    saved = checkpoint([write((16, 512), 2)], betas=(0.9, 0.999))
    (state,) = load(optim.AdamW(params_like((16, 512)), block_size=64), saved)
    part = saved["state"][0][KEY]
    for number, (name, codebook) in MAPS.items():
        codes, scales = kernels.quantize_blockwise(decode(part, number).float(), codebook, 64)
        torch.testing.assert_close(state[f"{name}_scales"], scales, rtol=2e-6, atol=0)
        assert (state[f"{name}_codes"].int() - codes.int()).abs().max() <= 1


def test_amsgrad_is_not_taken_up() -> None:
    """bitsandbytes has none: like every other setting, the checkpoint's is taken."""
    optimizer = optim.AdamW(params_like((16, 512)), amsgrad=True)
    load(optimizer, checkpoint([write((16, 512), 2)], betas=(0.9, 0.999)))
    assert optimizer.param_groups[0]["amsgrad"] is False


def test_groups_without_state_are_left_alone() -> None:
    """As after a checkpoint before the first step: nothing tells whose it is."""
    optimizer = optim.AdamW(params_like((16, 512)))
    load(optimizer, {"state": {}, "param_groups": [{"params": [0], "lr": 0.5, "betas": (0.5, 0.5)}]})
    assert optimizer.param_groups[0]["betas"] == (0.5, 0.5)
    assert optimizer.param_groups[0]["eps"] == 1e-8


# -- what does not fit -------------------------------------------------------------------------------------------------


def spoiled(**changes: Any) -> dict[str, Any]:
    entries = write((16, 512), 2)
    entries[KEY].update(changes)
    return checkpoint([{**entries, KEY: {k: v for k, v in entries[KEY].items() if v is not None}}], betas=(0.9, 0.999))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"state2": None}, r"state2 must have 8192 elements for exp_avg_sq, got None: was the checkpoint saved by"),
        ({"state1": torch.zeros(8191, dtype=torch.uint8)}, "state1 must have 8192 elements for exp_avg"),
        ({"qmap2": None}, "state2 is quantised, but qmap2 is missing"),
        ({"absmax1": None}, r"absmax1 is not one value for each 256 elements: None"),
        ({"absmax1": torch.zeros(31)}, r"absmax1 is not one value for each 256 elements: torch\.Size\(\[31\]\)"),
    ],
)
def test_malformed_checkpoints_change_nothing(changes: dict[str, Any], text: str) -> None:
    (p,) = params_like((16, 512))
    optimizer = optim.AdamW([p], lr=0.5)
    with pytest.raises(ValueError, match=text):
        optimizer.load_state_dict(spoiled(**changes))
    assert not optimizer.state
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_a_step_count_that_is_missing() -> None:
    saved = spoiled()
    del saved["state"][0]["step"]
    with pytest.raises(ValueError, match="step must be one finite number, 0 or more, got None"):
        load(optim.AdamW(params_like((16, 512))), saved)


def test_an_ademamix_whose_scales_overlap_is_refused() -> None:
    entries = write((33, 130), 2)
    part = entries[KEY]
    part["state1"], part["absmax1"] = part["state1"].expand(2, 33, 130), part["absmax1"].expand(2, -1)
    with pytest.raises(ValueError, match="overlap where the number of elements, here 4290, is not a multiple of 256"):
        load(optim.AdEMAMix(params_like((33, 130))), checkpoint([entries], betas=(0.9, 0.999, 0.9999)))


def test_another_optimizers_checkpoint_is_refused() -> None:
    saved = checkpoint([write((16, 512), 2)], betas=(0.9, 0.999, 0.9999))  # Adam's: nothing stacked
    with pytest.raises(ValueError, match="state1 must have 8192 elements for exp_avg, got None"):
        load(optim.AdEMAMix(params_like((16, 512))), saved)
