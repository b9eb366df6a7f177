"""nn.MultiheadAttention in int8 under torch.compile, checkpointing, transforms, the monitor and the planner."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import planned_memory as real
from support.attentions import HEADS, E, L, N, S, encoder, inputs, int8
from support.int8_models import assert_equal, called, counted, gradients, matmuls
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowbit_lightning import convert, kernels, memory, optim
from lowbit_lightning.callbacks.sample import Sample
from lowbit_lightning.layers import Int8Linear


@pytest.mark.skipif(torch.__version__ < "2.8", reason="torch 2.7's compiler cannot trace it")
def test_a_compiled_encoder_equals_eager() -> None:
    model, x = int8(encoder(1)), torch.randn(N, L, E)
    expected = gradients(model, x)
    kernels.reset_calls()
    assert_equal(gradients(torch.compile(model, fullgraph=True, backend="aot_eager"), x), expected)
    assert matmuls() == 12


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_equals_keeping(reentrant: bool) -> None:
    model, x = int8(encoder(1)), torch.randn(N, L, E)
    expected = gradients(model, x)
    with counted(12 + 4):
        assert_equal(gradients(_Checkpointed(model, reentrant), x), expected)


class _Checkpointed(nn.Module):
    def __init__(self, model: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.model, self.reentrant = model, reentrant

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.model, x, use_reentrant=self.reentrant)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_transforms_differentiate_it() -> None:
    """A directional derivative through both projections, in int8, and per-sample gradients."""
    attention = int8(nn.MultiheadAttention(E, HEADS, batch_first=True))
    plain = copy.deepcopy(attention)
    convert.restore(plain)
    x, dx = torch.randn(N, L, E), torch.randn(N, L, E)
    of = [torch.func.jvp(lambda x, m=m: m(x, x, x)[0], (x,), (dx,))[1] for m in (attention, plain)]  # type: ignore
    assert ((of[0] - of[1]).norm() / of[1].norm()).item() < 0.05
    weights = dict(attention.named_parameters())

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(attention, weights, (x, x, x))[0].square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)
    together = torch.func.grad(loss)(weights, x)
    for name, grads in each.items():
        assert (grads.sum(0) - together[name]).norm() <= 0.05 * together[name].norm() + 1e-5, name


def test_the_monitor_sees_the_input_projections() -> None:
    torch.manual_seed(0)
    attention = int8(nn.MultiheadAttention(E, HEADS, batch_first=True))
    query = inputs("memory")[0]
    memory_ = (torch.randn(N, S, E) * torch.ones(E).index_fill(0, torch.tensor(5), 50.0)).requires_grad_()
    sample = Sample({"attention": attention, "out": attention.out_proj})
    attention(query, memory_, memory_)[0].square().sum().backward()
    slots, values = sample.result()
    sample.remove()
    assert not attention._projection_hooks
    snr = [(s.layer, s.product, s.side, value.item()) for s, value in zip(slots, values[:, 0], strict=True)]
    assert [s[:3] for s in snr].count((0, 0, 0)) == 2  # query; key and value
    assert {s[:3] for s in snr} == {(layer, p, side) for layer in (0, 1) for p in range(3) for side in range(2)}
    low = [s[:3] for s in snr if s[3] < 30]
    assert low == [(0, 0, 0)]  # the memory's outlying feature


def test_a_plan_is_exact() -> None:
    def made() -> nn.Module:
        layer = nn.TransformerEncoderLayer(128, 4, 512, 0.0, batch_first=True, norm_first=True)
        return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)

    data, kept = (torch.randn(8, 64, 128),), list[Any]()

    def build() -> Any:
        model: Any = made()
        convert.swap_linears(model, output_layer=None)
        optimizer = optim.AdamW(model.parameters())

        def step() -> None:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(*data).float().square().sum()
            loss.backward()
            optimizer.step()

        kept.extend([model, optimizer])
        return step

    peak = real.peak_of(build)
    planned = memory.plan(
        real.on_meta(made), batch=data, precision="int8-mixed", int8={"output_layer": None},
        step=lambda model, x: model(x[0]).float().square().sum(),
    )  # fmt: skip
    assert {key: getattr(planned, key) for key in real.EXACT} == real.left_behind(*kept)
    assert real.within(planned.total, peak, 0.05), (planned.total, peak)


def test_what_is_saved_is_a_byte_per_element() -> None:
    """One column form of the input serves query, key and value."""
    attention = int8(nn.MultiheadAttention(E, HEADS, batch_first=True))
    kernels.reset_calls()
    x = torch.randn(N, L, E, requires_grad=True)
    attention(x, x, x, need_weights=False)[0].square().sum().backward()
    assert called() == {"quantize_both": 4, "quantize_rowwise": 2, "quantize_colwise": 2, "int8_matmul": 6}
    assert isinstance(attention.out_proj, nn.Linear)
    assert not isinstance(attention.out_proj, Int8Linear)
