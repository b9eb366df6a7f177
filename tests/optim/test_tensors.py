"""Parameters, gradients and states of any kind: layouts, forms that change in mid-run, values that are not finite."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from support.optimizers import decoded, parameters, step, twins, values
from torch import Tensor
from torch.nn import Parameter

from lowbit_lightning import kernels, optim
from lowbit_lightning.kernels.formats import BlockGrid
from lowbit_lightning.state import blocks

# -- layouts -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:some parameters of an optimizer are not contiguous")
@pytest.mark.parametrize("bits", [8, 32])
def test_any_memory_layout_gives_the_same(bits: int) -> None:
    """Non-contiguous and channels_last parameters and gradients; 0-d and empty ones beside them."""
    plain = parameters((16, 512), (8, 16, 6, 6), (), (0,), (0, 80))
    odd = twins(plain)
    odd[0] = Parameter(plain[0].detach().T.contiguous().T)
    odd[1] = Parameter(plain[1].detach().contiguous(memory_format=torch.channels_last))
    assert not odd[0].is_contiguous()
    assert not odd[1].is_contiguous()
    a, b = optim.AdamW(plain, bits=bits, min_size=64), optim.AdamW(odd, bits=bits, min_size=64)
    for i in range(4):
        step(a, plain, i)
        for p, q in zip(plain, odd, strict=True):
            assert p.grad is not None
            q.grad = p.grad.clone()
        assert odd[1].grad is not None
        odd[1].grad = odd[1].grad.contiguous(memory_format=torch.channels_last)
        odd[0].grad = odd[0].grad.T.contiguous().T if i % 2 else odd[0].grad  # type: ignore[union-attr]
        b.step()
    for p, q in zip(plain, odd, strict=True):
        assert torch.equal(p, q)
        for name, x in a.state[p].items():
            assert torch.equal(x, b.state[q][name])
    assert not odd[0].is_contiguous()
    assert [float(a.state[p]["step"]) for p in plain] == [4] * 5


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("kind", "dtype", "settings"),
    [
        (optim.AdamW, torch.float32, {}),
        (optim.LAMB, torch.float32, {}),  # two phases
        (optim.SGD, torch.bfloat16, {"momentum": 0.9, "stochastic_rounding": True}),
        (optim.AdamW, torch.bfloat16, {"bits": 32}),
    ],
    ids=["AdamW", "LAMB", "SGD at random", "AdamW in 32 bits"],
)
def test_channels_last_gives_the_same_without_copies(
    kind: Any, dtype: torch.dtype, settings: dict[str, Any], backend: str
) -> None:
    """States are those of contiguous parameters, to the bit. Warnings, as of copies, are errors here."""
    shapes = (8, 16, 3, 3), (5, 70, 3, 5), (4, 24, 2, 3, 3), (16, 64, 1, 1), (64, 64)
    plain = parameters(*shapes, dtype=dtype)
    formats = [torch.channels_last_3d if len(shape) == 5 else torch.channels_last for shape in shapes[:4]]
    last = [Parameter(p.detach().clone(memory_format=f)) for p, f in zip(plain, formats, strict=False)]
    last.append(Parameter(plain[4].detach().clone()))
    assert sum(p.is_contiguous() for p in last) == 2
    a, b = (kind(params, lr=0.1, min_size=64, **settings) for params in (plain, last))
    kernels.step._warn_of_copies.cache_clear()
    with kernels.use_backend(backend):
        for i in range(3):
            step(a, plain, i)
            for n, (p, q) in enumerate(zip(plain, last, strict=True)):
                assert p.grad is not None
                q.grad = p.grad.clone() if i == n else torch.empty_like(q).copy_(p.grad)
            b.step()
    for p, q in zip(plain, last, strict=True):
        assert torch.equal(p, q)
        for name, x in a.state[p].items():
            assert torch.equal(x, b.state[q][name])
            assert b.state[q][name].is_contiguous()


def test_parameters_that_every_step_has_to_copy_are_warned_of_once() -> None:
    kernels.step._warn_of_copies.cache_clear()
    p = Parameter(torch.randn(64, 64).T)
    p.grad = torch.randn(64, 64)
    optimizer = optim.AdamW([p])
    with pytest.warns(UserWarning, match=r"are not contiguous .* every step copies"):
        optimizer.step()
    optimizer.step()


@pytest.mark.parametrize("bits", [8, 32])
def test_parameters_whose_data_was_replaced(bits: int) -> None:
    """By another tensor of the same shape: it is stepped on. Of another shape: the states no longer fit, and that is
    said."""
    (p,) = parameters((16, 512))
    q = twins([p])[0]
    a, b = optim.AdamW([p], bits=bits), optim.AdamW([q], bits=bits)
    for i in range(3):
        p.data = p.data.clone()
        step(a, [p], i)
        step(b, [q], i)
    assert torch.equal(p, q)
    for shape in ((8, 512), (16, 1024)):
        p.grad = None
        p.data = torch.zeros(shape)
        with pytest.raises(ValueError, match=r"exp_avg\[0\] must have the parameter's shape"):
            step(a, [p])
        assert not p.any()


# -- changing the form of the states in mid-run ------------------------------------------------------------------------


def frozen_states(bits: list[int], block_sizes: list[int]) -> tuple[optim.SGD, Parameter, list[dict[str, Tensor]]]:
    """A parameter's state after each change of form, by steps that change neither momentum nor parameter."""
    p = Parameter(torch.randn(37, 700))
    optimizer = optim.SGD([p], lr=1e-2, momentum=0.9, block_size=block_sizes[0], bits=bits[0])
    for i in range(3):
        step(optimizer, [p], i)
    states = [{k: v.clone() for k, v in optimizer.state[p].items()}]
    group = optimizer.param_groups[0]
    group.update(momentum=1.0, dampening=1.0, lr=0.0)  # buffer = 1 * buffer + 0 * g
    for group["bits"], group["block_size"] in zip(bits[1:], block_sizes[1:], strict=True):
        step(optimizer, [p])
        states.append({k: v.clone() for k, v in optimizer.state[p].items()})
    return optimizer, p, states


def test_8_to_32_to_8_bits_changes_no_code() -> None:
    _, _, states = frozen_states([8, 32, 8], [256, 256, 256])
    assert set(states[1]) == {"step", "momentum_buffer"}
    assert states[2].keys() == states[0].keys()
    for name in ("momentum_buffer_codes", "momentum_buffer_scales"):
        assert torch.equal(states[2][name], states[0][name])
    values_8 = kernels.dequantize_blockwise(states[0]["momentum_buffer_codes"], states[0]["momentum_buffer_scales"])
    assert torch.equal(states[1]["momentum_buffer"], values_8)


def test_another_block_size_requantises() -> None:
    optimizer, _, states = frozen_states([8, 8], [256, 64])
    assert states[1]["momentum_buffer_scales"].shape == BlockGrid.of((37, 700), 64).scales_shape
    assert optimizer.param_groups[0]["state_format"]["block_size"] == 64
    decoded_256 = kernels.dequantize_blockwise(states[0]["momentum_buffer_codes"], states[0]["momentum_buffer_scales"])
    expected = kernels.quantize_blockwise(decoded_256, "dynamic_signed", 64)
    assert torch.equal(states[1]["momentum_buffer_codes"], expected[0])
    assert torch.equal(states[1]["momentum_buffer_scales"], expected[1])


@pytest.mark.parametrize(("length", "block_sizes"), [(64, [64, 256]), (1000, [1024, 4096]), (1000, [2048, 4096])])
def test_one_block_for_a_row_is_never_requantised(
    length: int, block_sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its scale is the same under every block size that reaches over the row."""

    def converts(*_: Any) -> None:
        raise AssertionError

    (p,) = parameters((70, length))
    optimizer = optim.AdamW([p], block_size=block_sizes[0])
    step(optimizer, [p])
    before = {k: v.clone() for k, v in optimizer.state[p].items()}
    monkeypatch.setattr(blocks, "convert", converts)
    group = optimizer.param_groups[0]
    group["block_size"] = block_sizes[1]
    for _ in range(2):
        optimizer.settings(group).keep_format(optimizer._store)
    assert group["state_format"]["block_size"] == block_sizes[1]
    assert all(torch.equal(value, optimizer.state[p][name]) for name, value in before.items())


def test_scales_that_fit_no_block_size_are_refused() -> None:
    params = parameters((16, 512), (10, 1000))
    optimizer = optim.AdamW(params)
    step(optimizer, params)
    optimizer.state[params[1]]["exp_avg_scales"] = torch.zeros(10, 7)
    optimizer.param_groups[0]["block_size"] = 64
    before = copy.deepcopy((values(params), [dict(optimizer.state[p]) for p in params]))
    words = r"exp_avg_scales must have one of the shapes \[\(10, 1\), .*\(1[06], 32\)\].*\(10, 1000\), got \(10, 7\)"
    for action in (lambda: step(optimizer, params), lambda: optimizer.state_dict(bits=32)):
        with pytest.raises(ValueError, match=words):
            action()
        after = values(params), [dict(optimizer.state[p]) for p in params]
        assert all(map(torch.equal, before[0], after[0]))
        for old, new in zip(before[1], after[1], strict=True):
            assert all(torch.equal(old[name], new[name]) for name in old)


def test_a_run_with_changes_of_bits_stays_close() -> None:
    ours = parameters((16, 512))
    theirs = twins(ours)
    a, b = optim.AdamW(ours), torch.optim.AdamW(theirs)
    before = values(ours)[0]
    for i in range(30):
        a.param_groups[0]["bits"] = 32 if 10 <= i < 20 else 8
        step(a, ours, i)
        step(b, theirs, i)
        assert ("exp_avg" in a.state[ours[0]]) == (10 <= i < 20)
    moved = (theirs[0].detach() - before).norm()
    assert (ours[0].detach() - theirs[0].detach()).norm() < 0.05 * moved


# -- non-finite gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 32])
def test_skip_nonfinite_skips_the_whole_step(bits: int) -> None:
    params = parameters((16, 512), (300,))
    optimizer = optim.AdamW([{"params": [params[0]]}, {"params": [params[1]]}], skip_nonfinite=True, bits=bits)
    step(optimizer, params, 1)
    before = copy.deepcopy((values(params), [dict(optimizer.state[p]) for p in params]))
    for bad in (math.nan, math.inf, -math.inf):
        for p in params:
            p.grad = torch.ones_like(p)
        params[1].grad[7] = bad  # type: ignore[index]
        optimizer.step()
    after = values(params), [dict(optimizer.state[p]) for p in params]
    assert all(torch.equal(x, y) for x, y in zip(before[0], after[0], strict=True))
    for old, new in zip(before[1], after[1], strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old)
    step(optimizer, params, 2)
    assert all(float(optimizer.state[p]["step"]) == 2 for p in params)
    assert all((p.detach() != old).all() for p, old in zip(params, before[0], strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_gradient_stays_where_it_is(bad: float) -> None:
    """Its parameter becomes non-finite, as in torch; its states are zero; nothing else differs from a zero gradient."""
    (p,) = parameters((16, 512))
    q = twins([p])[0]
    a, b = optim.AdamW([p], weight_decay=0.0), optim.AdamW([q], weight_decay=0.0)
    for i in range(5):
        p.grad = torch.randn(16, 512)
        p.grad[2, 5] = 0.0
        q.grad = p.grad.clone()
        if i == 1:
            p.grad[2, 5] = bad
        a.step()
        b.step()
    assert not torch.isfinite(p.detach()[2, 5])
    others = torch.ones(16, 512, dtype=torch.bool)
    others[2, 5] = False
    assert torch.equal(p.detach()[others], q.detach()[others])
    for name, codebook in (("exp_avg", "dynamic_signed"), ("exp_avg_sq", "dynamic_unsigned")):
        assert torch.equal(decoded(a, p, name, codebook), decoded(b, q, name, codebook))
        assert decoded(a, p, name, codebook)[2, 5] == 0
