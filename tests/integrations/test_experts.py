"""Mixtures of experts of Transformers: fused experts in int8 while they train, and in four bits."""

from __future__ import annotations

import copy
import pickle
from functools import cache
from typing import Any

import pytest
import torch
from support.hub_models import SIZES, mixtral, tokens
from torch import Tensor, nn

from lowbit_lightning import convert, kernels
from lowbit_lightning.layers.experts import LowBitTensor
from lowbit_lightning.layers.int8 import Int8Layer

pytest.importorskip("transformers")


def gpt_oss() -> Any:
    """Transposed weights, biases, interleaved gates."""
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "num_hidden_layers": 1}
    return GptOssForCausalLM(GptOssConfig(**sizes, layer_types=["full_attention"])).eval()


def nemotron() -> Any:
    """Experts without a gate."""
    from transformers.models.nemotron_h.configuration_nemotron_h import NemotronHConfig
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    config = NemotronHConfig(hidden_size=64, n_routed_experts=4, moe_intermediate_size=128)
    config._experts_implementation = "eager"
    return NemotronHExperts(config)


@cache
def models() -> dict[str, Any]:
    found = {}
    for name, make in (("mixtral", lambda: mixtral(num_hidden_layers=1)), ("gpt_oss", gpt_oss)):
        torch.manual_seed(0)
        found[name] = make()
        with torch.no_grad():
            for p in found[name].parameters():
                p.add_(torch.randn_like(p), alpha=0.05)  # biases and routers, too
    return found


def gradients(model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), found


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_losses_and_gradients_are_near_those_in_float64(name: str) -> None:
    """An int8 product of normal data is off by about 1 %: experts, which have two of them in a row, by a few."""
    model, batch = copy.deepcopy(models()[name]).train(), tokens(8, 16)
    model.set_experts_implementation("eager")  # grouped_mm knows no float64
    exact_loss, exact = gradients(copy.deepcopy(model).double(), batch)
    report = convert.swap_linears(model, include="*.experts")
    assert "experts" in str(report).splitlines()[0]
    experts = next(m for m in model.modules() if isinstance(m, Int8Layer))
    assert isinstance(experts, type(models()[name].model.layers[0].mlp.experts))
    kernels.reset_calls()
    loss, found = gradients(model, batch)
    counts = {op: n for (op, _), n in kernels.calls().items()}
    assert (counts["int8_grouped_matmul"], counts["int8_grouped_outer"]) == (4, 2)
    assert abs(loss - exact_loss) < 0.002 * exact_loss
    for parameter, grad in exact.items():
        error = (found[parameter] - grad).norm() / grad.norm()
        assert error < 0.06, f"{parameter}: {error:.3f}"
        if "experts" in parameter:
            assert error > 1e-4, f"{parameter} is exact: not in int8?"
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(gradients(twin, batch)[0], loss)
    convert.restore(model)
    assert type(experts) is type(models()[name].model.layers[0].mlp.experts)
    assert abs(gradients(model, batch)[0] - exact_loss) < 1e-5 * exact_loss


def test_experts_without_a_gate() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential()
    model.add_module("experts", nemotron())
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.1)
    x, index, weights = torch.randn(40, 64), torch.randint(4, (40, 2)), torch.rand(40, 2)
    wanted = model.experts(x, index, weights)
    convert.swap_linears(model, output_layer=None)
    found = model.experts(x, index, weights)
    assert 1e-4 < (found - wanted).norm() / wanted.norm() < 0.05


def test_training_follows_high_precision() -> None:
    batch, losses = tokens(8, 16), []
    for int8 in (False, True):
        model = copy.deepcopy(models()["mixtral"]).train()
        if int8:
            convert.swap_linears(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        history = []
        for _ in range(20):
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            history.append(loss.item())
        losses.append(torch.tensor(history))
    high, low = losses
    assert high[-1] < 0.8 * high[0]
    assert ((low - high).abs() < 0.03 * high).all(), (high, low)


@pytest.mark.parametrize("how", ["eager", "grouped_mm"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_in_four_bits_as_decoded_expert_by_expert(name: str, how: str) -> None:
    model = copy.deepcopy(models()[name])
    convert.quantize(model, "nf4")
    decoded = convert.dequantize(copy.deepcopy(model), torch.float32)
    for m in (model, decoded):
        m.set_experts_implementation(how)
    assert sum(isinstance(m, LowBitTensor) for m in model.modules()) == 2
    decoded.set_experts_implementation("eager")
    for batch in (tokens(8, 16), tokens(1, 2)):
        kernels.reset_calls()
        found = model(input_ids=batch).logits
        ops = {op for op, _ in kernels.calls()}
        torch.testing.assert_close(found, decoded(input_ids=batch).logits, rtol=1e-4, atol=1e-4)
        if how == "grouped_mm":
            assert "lowbit_dequantize" not in ops, "an expert is read in packed form"
