"""Experts in int8: the numbers of ``Int8Linear`` expert by expert, and everything that it promises."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lowbit_lightning import convert, kernels, memory
from lowbit_lightning.layers import Experts, Int8Experts, Int8Linear, Products
from lowbit_lightning.layers.grouped_ops import grouped_linear
from lowbit_lightning.precision.accounting import patch_accounting

EXPERTS, HIDDEN, INNER, TOKENS, TOP = 4, 64, 48, 96, 2


class Moe(nn.Module):
    """A router and experts."""

    def __init__(self, experts: int = EXPERTS, hidden: int = HIDDEN, inner: int = INNER) -> None:
        super().__init__()
        self.router = nn.Linear(hidden, experts)
        self.experts = Experts(experts, hidden, inner)

    def forward(self, x: Tensor) -> Tensor:
        weights, index = self.router(x).softmax(-1).topk(TOP)
        return x + self.experts(x, index, weights)


def swapped(model: nn.Module, **settings: Any) -> Any:
    convert.swap_linears(model, include="experts", **settings)
    return model


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    found = [y.detach(), x.grad, *(p.grad for p in model.parameters())]
    model.zero_grad()
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"save_inputs": "high"},
        {"rotation": "hadamard"},
        {"grad_weight": "high"},
        {"forward": "high", "grad_input": "high"},
        {"grad_input": "high", "grad_weight": "hadamard"},
    ],
    ids=str,
)
def test_each_group_has_the_numbers_of_a_linear_layer(settings: dict[str, Any], transposed: bool) -> None:
    torch.manual_seed(0)
    ends, n, k = [70, 70, 90], 40, 33
    x, weight = torch.randn(95, k), torch.randn(3, n, k)
    bias, dy = torch.randn(3, n), torch.randn(95, n)
    w = nn.Parameter(weight.mT.contiguous() if transposed else weight)
    inputs, b = x.clone().requires_grad_(), nn.Parameter(bias.clone())
    y = grouped_linear(inputs, w, torch.tensor(ends), b, Products(**settings), transposed)
    y.backward(dy)
    dw: Any = w.grad.mT if transposed else w.grad  # type: ignore[union-attr]
    for e, (first, last) in enumerate(zip([0, *ends], ends, strict=False)):
        layer = Int8Linear(k, n, **settings)
        layer.weight.data, layer.bias.data = weight[e], bias[e]
        own = x[first:last].clone().requires_grad_()
        wanted = layer(own)
        wanted.backward(dy[first:last])
        found = y[first:last], inputs.grad[first:last], dw[e], b.grad[e]  # type: ignore[index]
        for ours, theirs in zip(found, (wanted, own.grad, layer.weight.grad, layer.bias.grad), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-5)
    assert not y[ends[-1] :].any()
    assert not inputs.grad[ends[-1] :].any()  # type: ignore[index]


def test_plain_experts_are_a_loop_over_tokens() -> None:
    torch.manual_seed(0)
    experts: Any = Experts(3, 16, 8)
    x = torch.randn(5, 16)
    index, weights = torch.tensor([[0, 2], [1, 0], [2, 1], [0, 3], [3, 3]]), torch.rand(5, 2)
    for t, found in enumerate(experts(x, index, weights)):
        wanted = torch.zeros(16)
        for e, weight in zip(index[t], weights[t], strict=True):
            if e < 3:
                gate, up = (experts.gate_up_proj[e] @ x[t]).chunk(2)
                wanted = wanted + weight * (experts.down_proj[e] @ (nn.functional.silu(gate) * up))
        torch.testing.assert_close(found, wanted)


def test_a_negative_index_is_of_no_expert_and_shapes_must_fit() -> None:
    """In high precision and in int8 alike."""
    for experts in (Experts(3, HIDDEN, INNER), Int8Experts(3, HIDDEN, INNER)):
        x, weights = torch.randn(2, HIDDEN), torch.ones(2, 2)
        index = torch.tensor([[0, -1], [-1, 5]])
        found = experts(x, index, weights)
        torch.testing.assert_close(found[:1], experts(x[:1], index[:1, :1], weights[:1, :1]))
        assert not found[1].any()
        for wrong in ((x, index[:1], weights), (x, index, weights[:, :1]), (x[None], index, weights)):
            with pytest.raises(ValueError, match=r"hidden_states \[tokens, D\], .* do not fit"):
                experts(*wrong)


def test_training_is_near_high_precision_and_counts_as_predicted() -> None:
    torch.manual_seed(0)
    model, x = Moe(), torch.randn(TOKENS, HIDDEN)
    wanted = gradients(model, x)
    report = convert.swap_linears(model, include="experts")
    assert str(report).startswith("int8 (forward, grad_input, grad_weight) in 1 of 2 layers: experts")
    assert isinstance(model.experts, Int8Experts)
    kernels.reset_calls()
    found = gradients(model, x)
    counts = Counter({op: n for (op, _), n in kernels.calls().items()})
    assert counts == {
        "int8_grouped_matmul": 4, "int8_grouped_outer": 2, "quantize_groups": 4, "quantize_rowwise": 2,
        "quantize_group_columns": 2,
    }  # fmt: skip
    for ours, theirs in zip(found, wanted, strict=True):
        assert 1e-4 < (ours - theirs).norm() / theirs.norm() < 0.05
    assert convert.restore(model) == ("experts",)
    assert type(model.experts) is Experts
    assert all(map(torch.equal, gradients(model, x), wanted))


def test_experts_that_nobody_asked() -> None:
    """They get zeros as gradients; no rows at all are fine."""
    experts, x = Int8Experts(4, HIDDEN, INNER), torch.randn(6, HIDDEN)
    experts(x, torch.tensor([[3, 1]] * 6), torch.rand(6, 2)).sum().backward()
    grad: Any = experts.down_proj.grad
    assert [bool(part.any()) for part in grad] == [False, True, False, True]
    y = experts(x[:0], torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2))
    y.sum().backward()
    assert y.shape == (0, HIDDEN)


def test_random_rounding_is_unbiased_and_follows_torchs_seed() -> None:
    """The weights are multiples of their scale, so that only the incoming gradient is rounded."""
    torch.manual_seed(0)
    weight, dy = torch.randint(-127, 128, (2, 16, 8)).float(), torch.randn(6, 16)
    weight[:, 0] = 127
    exact = torch.cat([dy[:4] @ weight[0], dy[4:] @ weight[1]])

    def sample(seed: int, **settings: Any) -> Tensor:
        torch.manual_seed(seed)
        x = torch.randn(6, 8, requires_grad=True)
        grouped_linear(x, weight, torch.tensor([4, 6]), None, Products(**settings)).backward(dy)
        return x.grad - exact  # type: ignore[operator]

    random: dict[str, Any] = {"gradient_rounding": "stochastic"}
    assert torch.equal(sample(1, **random), sample(1, **random))
    draws = torch.stack([sample(seed, **random) for seed in range(100)])
    assert draws.mean(0).norm() < draws[0].norm() / 5
    assert not torch.equal(sample(1), draws[1])


def test_under_autocast_and_in_16_bits() -> None:
    torch.manual_seed(0)
    model, x = swapped(Moe()), torch.randn(TOKENS, HIDDEN)
    wanted = gradients(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(model, x)
    assert [t.dtype for t in found] == [t.dtype for t in wanted]
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).norm() / theirs.norm() < 0.1
    half = model.bfloat16()
    assert {t.dtype for t in gradients(half, x.bfloat16())} == {torch.bfloat16}


def test_evaluation_of_few_rows_is_in_high_precision() -> None:
    model, x = swapped(Moe()).eval(), torch.randn(TOKENS, HIDDEN)
    plain = convert.restore(copy.deepcopy(model))
    assert plain == ("experts",)
    with torch.no_grad():
        kernels.reset_calls()
        model(x)
        assert kernels.calls() == {}
        model(x.repeat(3, 1))
        assert {op for op, _ in kernels.calls()} == {"quantize_rowwise", "int8_grouped_matmul"}


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies(again: Any) -> None:
    model, x = swapped(Moe(), save_inputs="high"), torch.randn(TOKENS, HIDDEN)
    twin = again(model)
    assert type(twin.experts) is Int8Experts
    assert twin.experts.products == Products(save_inputs="high")
    assert all(map(torch.equal, gradients(twin, x), gradients(model, x)))
    twin.load_state_dict(model.state_dict())


def test_compiled_and_checkpointed() -> None:
    model, x = swapped(Moe()), torch.randn(TOKENS, HIDDEN)
    wanted = gradients(model, x)
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(gradients(compiled, x), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)

    class Recomputed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.model, x, use_reentrant=False)

    assert all(map(torch.equal, gradients(Recomputed(), x), wanted))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_other_transforms_and_second_derivatives() -> None:
    torch.manual_seed(0)
    model, x = swapped(Moe(), save_inputs="high"), torch.randn(12, HIDDEN)
    params = dict(model.named_parameters())

    def loss(params: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, params, (x,)).square().sum()

    wanted = dict(zip(params, gradients(model, x)[2:], strict=True))
    for name, grad in torch.func.grad(loss)(params).items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-3, atol=1e-3)
    tangents = {name: torch.randn_like(p) for name, p in params.items()}
    _, along, *_ = torch.func.jvp(loss, (params,), (tangents,))
    total = sum((tangents[name] * grad).sum() for name, grad in wanted.items())
    assert abs(along - total) < 0.05 * abs(total) + 1
    x.requires_grad_()
    (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    first.square().sum().backward()
    second: Any = model.experts.down_proj.grad
    assert second.isfinite().all()
    assert second.any()
    saved = swapped(model, save_inputs="int8")
    (first,) = torch.autograd.grad(saved(x).square().sum(), saved.experts.down_proj, create_graph=True)
    with pytest.raises(RuntimeError, match="save_inputs='high'"):
        first.square().sum().backward()


def test_experts_in_low_bits_are_multiplied_in_one_op_and_planned() -> None:
    model, x = Moe(), torch.randn(TOKENS, HIDDEN)
    convert.quantize(model, "nf4", include="experts*")
    low: Any = copy.deepcopy(model)
    convert.dequantize(low)
    torch.testing.assert_close(model(x), low(x), rtol=1e-4, atol=1e-4)
    plan = memory.plan(model, precision="32-true", batch=torch.empty(TOKENS, HIDDEN), step=lambda m, x: m(x).sum())
    assert plan.activations


def test_flops_and_a_plan() -> None:
    patch_accounting()
    model = swapped(Moe())
    with FlopCounterMode(display=False) as counter:
        gradients(model, torch.randn(TOKENS, HIDDEN))
    experts = 3 * 2 * TOKENS * TOP * 3 * INNER * HIDDEN
    assert counter.get_total_flops() == experts + 3 * 2 * TOKENS * HIDDEN * EXPERTS
    convert.restore(model)

    def step(m: nn.Module, x: Tensor) -> Tensor:
        return m(x).sum()

    big = nn.Sequential(*(swapped(Moe(4, 256, 256)) for _ in range(4)))
    int8 = memory.plan(big, precision="32-true", batch=torch.empty(512, 256), step=step)
    high: Any = copy.deepcopy(big)
    for m in high:
        m.experts.products = Products(save_inputs="high")
    kept = memory.plan(high, precision="32-true", batch=torch.empty(512, 256), step=step)
    rows = 512 * TOP
    saved = kept.activations - int8.activations  # type: ignore[operator]
    assert 0.7 < saved / (4 * 3 * rows * 2 * 256) < 1.3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"min_features": 49}, "not experts: fewer than min_features=49 features"),
        ({"overrides": {"experts": None}}, "not experts: None in overrides"),
        ({"exclude": "exp*"}, "not experts: in exclude"),
    ],
)
def test_what_is_left_out(change: dict[str, Any], says: str) -> None:
    model = nn.Sequential()
    model.add_module("experts", Experts(2, HIDDEN, INNER))
    model.add_module("proj", nn.Linear(64, 64))
    assert says in str(convert.swap_linears(model, output_layer=None, **change))
    assert type(model.experts) is Experts


def test_names_what_does_not_fit() -> None:
    experts: Any = Int8Experts(2, 64, 32)
    index, weights = torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1)
    with pytest.raises(TypeError, match=r"input must have the weight's dtype, torch\.float32"):
        experts(torch.randn(4, 64).double(), index, weights)
    with pytest.raises(ValueError, match=r"x \[S, K\], weight \[E, N, K\] and offs \[E\] do not fit: \(4, 60\)"):
        experts(torch.randn(4, 60), index, weights)
    model = nn.Sequential()
    model.add_module("experts", Experts(2, 64, 32, dtype=torch.float64))
    with pytest.raises(convert.NothingToSwap, match=r"weight is torch\.float64"):
        convert.swap_linears(model)
    model.experts = experts = Experts(2, 64, 32)
    experts._is_expert_parallel = True
    with pytest.raises(convert.NothingToSwap, match="expert parallelism"):
        convert.swap_linears(model)
    with pytest.raises(ValueError, match="grad_weight must be"):
        Int8Experts(2, 64, 32, grad_weight="int4")
