"""Optimizer checkpoints: exact to the bit where the form is the same, converted where it is not, refused by name."""

from __future__ import annotations

import copy
import io
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.optimizers import close, parameters, step, twins, values
from torch import Tensor
from torch.nn import Parameter

from lowbit_lightning import kernels, optim
from lowbit_lightning.kernels.formats import BlockGrid
from lowbit_lightning.optim import loading

SHAPES = ((16, 512), (37, 301), (300,), ())
KINDS: list[tuple[type, dict[str, Any]]] = [
    (optim.AdamW, {}),
    (optim.AdamW, {"amsgrad": True, "block_size": 64}),
    (optim.AdamW, {"bits": 32}),
    (optim.SGD, {"momentum": 0.9, "lr": 0.1}),
    (optim.SGD, {"lr": 0.1}),
    (optim.LAMB, {}),
]


def trained(kind: type, options: dict[str, Any], steps: int = 3) -> tuple[Any, list[Parameter]]:
    torch.manual_seed(1)
    params = parameters(*SHAPES)
    optimizer = kind(params, **options)
    for i in range(steps):
        step(optimizer, params, i)
    return optimizer, params


def through_file(saved: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def states(optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    """All states, in the parameters' order; copies."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [{k: v.clone() for k, v in optimizer.state[p].items()} if p in optimizer.state else {} for p in params]


def same(a: list[dict[str, Tensor]], b: list[dict[str, Tensor]]) -> bool:
    return all(
        x.keys() == y.keys() and all(torch.equal(x[k], y[k]) and x[k].dtype == y[k].dtype for k in x)
        for x, y in zip(a, b, strict=True)
    )


# -- the same form -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_resumes_to_the_bit(kind: type, options: dict[str, Any]) -> None:
    optimizer, params = trained(kind, options)
    saved = through_file(optimizer.state_dict())
    others = twins(params)
    resumed = kind(others, **{**options, "lr": 0.5, "weight_decay": 0.5})  # the checkpoint's are taken
    resumed.load_state_dict(saved)
    assert same(states(optimizer), states(resumed))
    own = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    assert [{k: v for k, v in group.items() if k != "params"} for group in resumed.param_groups] == own
    for i in range(3, 6):
        step(optimizer, params, i)
        step(resumed, others, i)
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
    assert same(states(optimizer), states(resumed))


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_one_optimizer_loads_twice(kind: type, options: dict[str, Any]) -> None:
    optimizer, params = trained(kind, options)
    early = copy.deepcopy(optimizer.state_dict())
    kept = states(optimizer)
    step(optimizer, params, 3)
    late = copy.deepcopy(optimizer.state_dict())
    for saved in (early, late, early):
        optimizer.load_state_dict(copy.deepcopy(saved))
    assert same(states(optimizer), kept)


def test_saving_before_the_first_step_and_with_parameters_left_out() -> None:
    """Frozen and gradient-less parameters have no state, and get none by loading."""
    params = parameters(*SHAPES)
    params[1].requires_grad_(False)
    fresh = optim.AdamW(params)
    fresh.load_state_dict(through_file(fresh.state_dict()))
    assert not fresh.state
    step(fresh, [params[0], params[2]])
    others = twins(params)
    resumed = optim.AdamW(others)
    resumed.load_state_dict(through_file(fresh.state_dict()))
    assert set(resumed.state) == {others[0], others[2]}
    assert same(states(fresh), states(resumed))


def test_groups_are_restored_one_by_one() -> None:
    def build(params: list[Parameter]) -> optim.AdamW:
        groups = [{"params": params[:1], "bits": 32, "lr": 1.0}, {"params": params[1:], "amsgrad": True}]
        return optim.AdamW(groups, lr=1e-2, block_size=128)

    params = parameters(*SHAPES)
    optimizer = build(params)
    step(optimizer, params)
    others = twins(params)
    resumed = build(others)
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    assert same(states(optimizer), states(resumed))
    assert [group["lr"] for group in resumed.param_groups] == [1.0, 1e-2]


def test_the_format_names_version_maps_and_block_size() -> None:
    optimizer, _ = trained(optim.AdamW, {"block_size": 64}, steps=1)
    saved = through_file(optimizer.state_dict())
    maps = {"exp_avg": "dynamic_signed", "exp_avg_sq": "dynamic_unsigned"}
    assert saved["param_groups"][0]["state_format"] == {"version": 1, "block_size": 64, "maps": maps}
    assert set(saved["state"][0]) == {"step", *(f"{n}_{part}" for n in maps for part in ("codes", "scales"))}
    assert set(saved["state"][2]) == {"step", *maps}


def test_torchs_load_hooks_run_around() -> None:
    optimizer, params = trained(optim.AdamW, {})
    saved = optimizer.state_dict()
    resumed = optim.AdamW(twins(params))
    seen: list[Any] = []

    def before(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        seen.append(len(resumed.state))
        groups = [{**group, "lr": 0.25} for group in state_dict["param_groups"]]
        return {**state_dict, "param_groups": groups}

    resumed.register_load_state_dict_pre_hook(before)
    resumed.register_load_state_dict_post_hook(lambda o: seen.append(len(o.state)))
    optimizer.register_state_dict_post_hook(lambda _, state_dict: {**state_dict, "note": 1})
    resumed.load_state_dict(saved)
    assert seen == [0, len(params)]  # the states are there when the post hook looks
    assert resumed.param_groups[0]["lr"] == 0.25
    assert optimizer.state_dict()["note"] == 1
    assert len(resumed._optimizer_load_state_dict_pre_hooks) == 1
    assert len(resumed._optimizer_load_state_dict_post_hooks) == 1


def test_a_load_that_an_interrupt_struck_leaves_nothing_for_the_next() -> None:
    optimizer, params = trained(optim.AdamW, {}, steps=1)
    first = copy.deepcopy(optimizer.state_dict())
    step(optimizer, params, 1)
    second, code = optimizer.state_dict(), loading.load.__code__
    struck = 0
    for line in sorted({line for _, _, line in code.co_lines() if line is not None}):
        resumed = optim.AdamW(twins(params))

        def strike(frame: Any, event: str, _: Any, line: int = line) -> Any:
            if event == "line" and frame.f_lineno == line:
                raise KeyboardInterrupt
            return strike if frame.f_code is code else None

        before = sys.gettrace()
        sys.settrace(strike)
        try:
            resumed.load_state_dict(first)
        except KeyboardInterrupt:
            struck += 1
        finally:
            sys.settrace(before)
        resumed.load_state_dict(second)
        assert same(states(resumed), states(optimizer)), line
    assert struck > 5


# -- another form ------------------------------------------------------------------------------------------------------


def decode(saved: dict[str, Tensor], name: str, codebook: str, block_size: int = 256) -> Tensor:
    return kernels.dequantize_blockwise(saved[f"{name}_codes"], saved[f"{name}_scales"], codebook, block_size)


MAPS = {"exp_avg": "dynamic_signed", "exp_avg_sq": "dynamic_unsigned"}


def test_8_bits_into_32_and_back_is_exact() -> None:
    optimizer, params = trained(optim.AdamW, {})
    full = optim.AdamW(twins(params), bits=32)
    full.load_state_dict(through_file(optimizer.state_dict()))
    for ours, theirs in zip(states(full)[:2], states(optimizer)[:2], strict=True):
        assert set(ours) == {"step", *MAPS}
        for name, codebook in MAPS.items():
            assert torch.equal(ours[name], decode(theirs, name, codebook))
        assert torch.equal(ours["step"], theirs["step"])
    back = optim.AdamW(twins(params))
    back.load_state_dict(through_file(full.state_dict()))
    assert same(states(optimizer), states(back))


def test_32_bits_into_8_quantises() -> None:
    full, params = trained(optim.AdamW, {"bits": 32})
    optimizer = optim.AdamW(twins(params))
    optimizer.load_state_dict(through_file(full.state_dict()))
    for theirs, ours in zip(states(full)[:2], states(optimizer)[:2], strict=True):
        for name, codebook in MAPS.items():
            codes, scales = kernels.quantize_blockwise(theirs[name], codebook)
            assert torch.equal(ours[f"{name}_codes"], codes)
            assert torch.equal(ours[f"{name}_scales"], scales)
    assert same(states(full)[2:], states(optimizer)[2:])


def test_another_block_size_requantises() -> None:
    optimizer, params = trained(optim.AdamW, {"block_size": 256})
    other = optim.AdamW(twins(params), block_size=32)
    other.load_state_dict(through_file(optimizer.state_dict()))
    assert other.param_groups[0]["block_size"] == 32
    for theirs, ours in zip(states(optimizer)[:2], states(other)[:2], strict=True):
        for name, codebook in MAPS.items():
            codes, scales = kernels.quantize_blockwise(decode(theirs, name, codebook), codebook, 32)
            assert torch.equal(ours[f"{name}_codes"], codes)
            assert torch.equal(ours[f"{name}_scales"], scales)
            assert scales.shape == BlockGrid.of(theirs[f"{name}_codes"].shape, 32).scales_shape
    again = optim.AdamW(twins(params), block_size=32)
    again.load_state_dict(through_file(other.state_dict()))
    assert same(states(other), states(again))


def test_a_checkpoint_with_amsgrad_brings_it_along() -> None:
    optimizer, params = trained(optim.AdamW, {"amsgrad": True})
    first = optim.AdamW(twins(params))
    first.load_state_dict(through_file(optimizer.state_dict()))
    second = optim.AdamW(twins(params))
    second.load_state_dict(through_file(first.state_dict()))  # before any step: the format knows the third state
    assert same(states(optimizer), states(second))


@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        (optim.AdamW, torch.optim.AdamW, {}),
        (optim.AdamW, torch.optim.AdamW, {"amsgrad": True}),
        (optim.SGD, torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5, "lr": 0.1}),
        (optim.SGD, torch.optim.SGD, {"lr": 0.1}),
    ],
)
def test_from_and_to_torch(ours: type, theirs: type, options: dict[str, Any]) -> None:
    a, params = trained(theirs, options)
    others = twins(params)
    b = ours(others, bits=32, seed=7)
    b.load_state_dict(through_file(a.state_dict()))
    assert b.param_groups[0]["seed"] == 7  # what torch's checkpoint does not know is ours
    for i in range(3, 6):
        step(a, params, i)
        step(b, others, i)
    close(others, params)
    back = twins(others)
    c = theirs(back)
    c.load_state_dict(through_file(b.state_dict()))
    for i in range(6, 9):
        step(a, params, i)
        step(c, back, i)
    close(back, params)


def test_from_torch_with_states_in_half_precision_and_with_a_buffer_that_is_not_there_yet() -> None:
    params = parameters((16, 512), dtype=torch.bfloat16)
    theirs = torch.optim.SGD(params, lr=0.1, momentum=0.9, dampening=0.5)
    step(theirs, params)
    saved = through_file(theirs.state_dict())
    ours = optim.SGD(twins(params), bits=32)
    ours.load_state_dict(saved)
    assert torch.equal(states(ours)[0]["momentum_buffer"], saved["state"][0]["momentum_buffer"].float())

    saved["state"][0]["momentum_buffer"] = None  # as older versions of torch saved it
    p, q = parameters((16, 512), (16, 512))
    q.data = p.detach().clone()
    a, b = optim.SGD([p], bits=32), torch.optim.SGD([q])
    a.load_state_dict(saved)
    b.load_state_dict({**saved, "state": {}})
    step(a, [p])
    step(b, [q])  # the first step of a buffer: no dampening
    close([p], [q])


# -- what is refused, and then nothing has changed ---------------------------------------------------------------------


def drop(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda saved: saved["state"][1].pop(name)


def put(name: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    return lambda saved: saved["state"][1].update({name: change(saved["state"][1][name])})


def form(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda saved: saved["param_groups"][0]["state_format"].update(changes)


MALFORMED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "unknown version": (form(version=99), "format version 99; this library reads version 1"),
    "no version": (form(version=None), "format version None"),
    "no maps": (form(maps=None), "maps must give one of"),
    "unknown map": (form(maps={"exp_avg": "cubic", "exp_avg_sq": "dynamic_unsigned"}), "maps must give one of.*cubic"),
    "map missing": (form(maps={"exp_avg_sq": "dynamic_unsigned"}), "names no map for exp_avg"),
    "bad block size": (form(block_size=7), "block_size must be a power of two"),
    "no block size": (form(block_size=None), "block_size must be a number"),
    "another block size": (form(block_size=128), r"exp_avg_scales must have shape \(16, 4\).*got \(16, 2\)"),
    "no format": (lambda s: s["param_groups"][0].pop("state_format"), "exp_avg_codes comes without a state_format"),
    "format of another kind": (lambda s: s["param_groups"][0].update(state_format=1), "state_format must be a dict"),
    "no step": (drop("step"), "step must be one finite number, 0 or more, got None"),
    "many steps": (put("step", lambda _: torch.zeros(2)), "step must be one finite number"),
    "infinite step": (put("step", lambda _: math.inf), "step must be one finite number, 0 or more, got inf"),
    "no number": (put("step", lambda _: math.nan), "step must be one finite number, 0 or more, got nan"),
    "negative step": (put("step", lambda _: -1.0), r"step must be one finite number, 0 or more, got -1\.0"),
    "step tensor": (put("step", lambda step: step * math.inf), r"step must be one finite number.*got tensor\(inf\)"),
    "negative scale": (put("exp_avg_sq_scales", Tensor.neg), "exp_avg_sq_scales of a state without negative values"),
    "scale of NaN": (put("exp_avg_sq_scales", lambda s: s * float("nan")), "exp_avg_sq_scales .* must be 0 or more"),
    "no codes": (drop("exp_avg_codes"), "holds neither exp_avg nor exp_avg_codes"),
    "no scales": (drop("exp_avg_sq_scales"), "exp_avg_sq_scales must be a tensor, got None"),
    "codes cast": (
        put("exp_avg_codes", Tensor.float),
        "exp_avg_codes must be uint8, got torch.float32: something",
    ),
    "scales cast": (put("exp_avg_scales", Tensor.half), "exp_avg_scales must be float32, got torch.float16"),
    "wrong shape": (put("exp_avg_sq_codes", Tensor.t), r"exp_avg_sq_codes must have shape \(37, 301\)"),
    "no tensor": (put("exp_avg_codes", lambda _: "codes"), "exp_avg_codes must be a tensor, got 'codes'"),
    "one group more": (lambda s: s["param_groups"].append({"params": [9]}), "different number of parameter groups"),
    "one group less": (lambda s: s["param_groups"].pop(), "different number of parameter groups"),
    "one parameter less": (lambda s: s["param_groups"][0]["params"].pop(), "doesn't match the size"),
    "one parameter more": (lambda s: s["param_groups"][0]["params"].append(9), "doesn't match the size"),
}


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_checkpoints_change_nothing(case: str, bits: int) -> None:
    spoil, text = MALFORMED[case]
    optimizer, params = trained(optim.AdamW, {"bits": bits})
    source, _ = trained(optim.AdamW, {}, steps=5)
    saved = through_file(source.state_dict())
    spoil(saved)
    before = states(optimizer), copy.deepcopy([{**g, "params": 0} for g in optimizer.param_groups]), values(params)
    hooks = len(optimizer._optimizer_load_state_dict_pre_hooks)
    with pytest.raises(ValueError, match=text):
        optimizer.load_state_dict(saved)
    assert same(states(optimizer), before[0])
    assert [{**g, "params": 0} for g in optimizer.param_groups] == before[1]
    assert all(torch.equal(x, y) for x, y in zip(values(params), before[2], strict=True))
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == hooks
    step(optimizer, params)  # and goes on


def test_torchs_own_loading_spoils_codes_and_ours_says_so() -> None:
    """A checkpoint that went through a torch.optim optimizer: its load_state_dict casts codes to the parameter's
    dtype."""
    source, params = trained(optim.AdamW, {})
    spoiled = torch.optim.AdamW(twins(params))
    spoiled.load_state_dict(source.state_dict())
    with pytest.raises(ValueError, match=r"exp_avg_codes must be uint8, got torch\.float32.*torch's own"):
        optim.AdamW(twins(params)).load_state_dict(spoiled.state_dict())
