"""What the optimizers refuse, by name and before anything is changed."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from support.optimizers import parameters, step, values
from torch import nn
from torch.nn import Parameter

from lowbit_lightning import optim

REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"bits": 3}, ValueError, "bits must be 8 or 32, got 3"),
    ({"block_size": 7}, ValueError, "block_size must be a power of two from 32 to 4096, got 7"),
    ({"block_size": 96}, ValueError, "block_size must be a power of two"),
    ({"min_size": -1}, ValueError, "min_size must be .*got -1"),
    ({"lr": -1.0}, ValueError, "lr must be 0 or more, got -1.0"),
    ({"lr": math.nan}, ValueError, "lr must be 0 or more"),
    ({"eps": -1e-8}, ValueError, "eps must be 0 or more"),
    ({"weight_decay": -0.1}, ValueError, "weight_decay must be 0 or more"),
    ({"betas": (1.0, 0.9)}, ValueError, r"betas\[0\] must be in \[0, 1\), got 1.0"),
    ({"betas": (0.9, -0.1)}, ValueError, r"betas\[1\] must be in"),
    ({"betas": (0.9,)}, ValueError, "betas must be 2 numbers"),
    ({"betas": (0.9, 0.99, 0.999)}, ValueError, "betas must be 2 numbers"),
    ({"differentiable": True}, ValueError, "differentiable=True is not supported"),
    ({"bitz": 8}, TypeError, "unknown options .'bitz'.; known: .'bits', 'block_size'"),
    ({"percentile_clipping": 5}, TypeError, "unknown options"),
]


@pytest.mark.parametrize(("options", "error", "text"), REFUSED)
def test_bad_options(options: dict[str, Any], error: type[Exception], text: str) -> None:
    (p,) = parameters((3,))
    with pytest.raises(error, match=text):
        optim.AdamW([p], **options)
    own = {k: v for k, v in options.items() if k not in ("differentiable", "bitz", "percentile_clipping")}
    if own:  # as a key of a later group too, and the optimizer is as it was
        optimizer = optim.AdamW(parameters((3,)))
        with pytest.raises(error, match=text):
            optimizer.add_param_group({"params": [p], **own})
        assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("options", [{"momentum": 0.0}, {"momentum": 0.9, "dampening": 0.1}])
def test_nesterov_needs_momentum_without_dampening(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="nesterov=True needs momentum > 0 and dampening 0"):
        optim.SGD(parameters((3,)), nesterov=True, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    p = Parameter(torch.zeros(4, dtype=dtype))
    with pytest.raises(TypeError, match=r"params\[1\] must be float32, float16 or bfloat16"):
        optim.AdamW([*parameters((3,)), p])
    optimizer = optim.AdamW(parameters((3,)))
    with pytest.raises(TypeError, match=r"params\[0\] must be float32"):
        optimizer.add_param_group({"params": [p]})
    assert len(optimizer.param_groups) == 1


def test_sparse_gradients_are_refused_before_anything_changes() -> None:
    embedding = nn.Embedding(100, 64, sparse=True)
    (other,) = parameters((300,))
    optimizer = optim.AdamW([other, embedding.weight])
    before = values([other])[0]
    other.grad = torch.ones(300)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match=r"shape \(100, 64\) has a sparse gradient .*sparse=False"):
        optimizer.step()
    assert torch.equal(other.detach(), before)
    assert not optimizer.state


@pytest.mark.parametrize(("key", "value"), [("bits", 3), ("block_size", 7)])
def test_bad_changes_in_mid_run(key: str, value: int) -> None:
    (p,) = parameters((16, 512))
    optimizer = optim.AdamW([p])
    step(optimizer, [p])
    before = copy.deepcopy((p.detach(), dict(optimizer.state[p])))
    optimizer.param_groups[0][key] = value
    with pytest.raises(ValueError, match=f"{key} must be"):
        step(optimizer, [p])
    assert torch.equal(p.detach(), before[0])
    assert all(torch.equal(x, before[1][name]) for name, x in optimizer.state[p].items())


def test_stochastic_rounding_where_it_cannot_work() -> None:
    with pytest.warns(UserWarning, match="stochastic_rounding has no effect: no parameter of the group is bfloat16"):
        optim.AdamW(parameters((3,)), stochastic_rounding=True)
    half = parameters((3,), dtype=torch.float16)
    with pytest.raises(TypeError, match=r"stochastic_rounding serves bfloat16 parameters; params\[0\] is float16"):
        optim.AdamW(half, stochastic_rounding=True)
