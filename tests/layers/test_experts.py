"""Experts in low bits: modules that read a three-dimensional parameter go on as they are."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowbit_lightning import convert, kernels
from lowbit_lightning.layers.experts import LowBitMatrix, LowBitTensor

EXPERTS, HIDDEN, INNER = 4, 128, 96


class Experts(nn.Module):
    """As Transformers has them: fused parameters, and a loop over the experts that were hit."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, HIDDEN) / HIDDEN**0.5)
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER) / INNER**0.5)

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        result = torch.zeros_like(x)
        for expert in chosen.unique():
            rows = (chosen == expert).nonzero().flatten()
            gate, up = nn.functional.linear(x[rows], self.gate_up_proj[expert]).chunk(2, -1)
            result = result.index_add(0, rows, nn.functional.linear(gate.sigmoid() * up, self.down_proj[expert]))
        return result


class Whole(Experts):
    """Takes all experts at once."""

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        gate, up = torch.bmm(x.expand(EXPERTS, -1, -1), self.gate_up_proj.transpose(1, 2)).chunk(2, -1)
        return ((gate.sigmoid() * up) @ self.down_proj.mT).sum(0)


X, CHOSEN = torch.randn(10, HIDDEN), torch.arange(10) % 3


@pytest.mark.parametrize("weights", ["int8", "nf4-dq", "int2"])
@pytest.mark.parametrize("kind", [Experts, Whole])
def test_numbers_are_those_of_the_decoded_weights(kind: Any, weights: str) -> None:
    plain = kind()
    low = convert.quantize(nn.Sequential(kind()), weights)[0]
    assert isinstance(low.gate_up_proj, LowBitTensor)
    with torch.no_grad():
        for name in ("gate_up_proj", "down_proj"):
            plain.get_parameter(name).copy_(low.get_submodule(name).dequantize())  # type: ignore[operator]
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    out, expected = low(x, CHOSEN), plain(y, CHOSEN)
    assert torch.allclose(out, expected, atol=1e-5)
    out.square().sum().backward()
    expected.square().sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    assert torch.allclose(x.grad, y.grad, atol=1e-4)


def quantised() -> Any:
    return convert.quantize(nn.Sequential(Experts()))[0]


def test_accelerate_offloads_them(tmp_path: Path) -> None:
    """Nobody calls the module that holds a weight, so its codes are fetched where they are read."""
    accelerate = pytest.importorskip("accelerate")
    to_disk = partial(accelerate.disk_offload, offload_dir=tmp_path)
    for kind, offload in ((Experts, accelerate.cpu_offload), (Whole, to_disk)):
        low: Any = convert.quantize(nn.Sequential(kind()))[0]
        expected = low(X, CHOSEN)
        offload(low, execution_device=torch.device("cpu"))
        assert low.gate_up_proj.weight.is_meta
        x = X.clone().requires_grad_()
        found = low(x, CHOSEN)
        found.sum().backward()
        assert torch.equal(found, expected)
        assert low.gate_up_proj.weight.is_meta


def test_one_expert_is_multiplied_as_it_is_kept() -> None:
    low = quantised()
    assert isinstance(low.gate_up_proj[1], LowBitMatrix)
    kernels.reset_calls()
    low(X, CHOSEN)
    counts = kernels.calls()
    assert sum(counts.values()) == 6, counts  # three experts, two products
    assert not any("dequantize" in op for op, _ in counts)


def test_it_looks_like_the_parameter() -> None:
    held = quantised().down_proj
    assert (held.shape, held.ndim, len(held), held.dtype) == ((EXPERTS, HIDDEN, INNER), 3, EXPERTS, torch.float32)
    assert held[2].shape == (HIDDEN, INNER)
    assert torch.equal(held[1, 3:5], held.dequantize()[1, 3:5])
    assert torch.equal(torch.stack([e.dequantize() for e in held]), held.dequantize())
    assert torch.equal(X[:, :INNER] @ held[0].T, X[:, :INNER] @ held.dequantize()[0].T)
    with pytest.raises(AttributeError, match="nonsense"):
        held.nonsense  # noqa: B018


def test_there_and_back_and_through_a_state_dict() -> None:
    source = convert.quantize(nn.Sequential(Experts()))
    state = source.state_dict()
    parts = ("weight", "weight_scales", "weight_format")
    assert set(state) == {f"0.{name}.{part}" for name in ("gate_up_proj", "down_proj") for part in parts}
    twin = convert.quantize(nn.Sequential(Experts()), "nf4", overrides={"*.down_proj": None})
    assert isinstance(twin[0].down_proj, nn.Parameter)
    twin = convert.quantize(nn.Sequential(Experts()))
    twin.load_state_dict(state, strict=True)
    assert torch.equal(twin[0](X, CHOSEN), source[0](X, CHOSEN))
    decoded = source[0].down_proj.dequantize()  # type: ignore[union-attr, operator]
    back = convert.dequantize(source)
    assert set(back.state_dict()) == {"0.gate_up_proj", "0.down_proj"}
    assert torch.equal(back[0].down_proj, decoded)  # type: ignore[arg-type]


def test_other_three_dimensional_parameters_stay() -> None:
    net = nn.Sequential(nn.Conv1d(64, 64, 32), nn.Bilinear(64, 64, 64), Experts())
    convert.quantize(net)
    assert type(net[0].weight) is type(net[1].weight) is nn.Parameter
    stays = convert.quantize(nn.Sequential(nn.Linear(64, 64), Experts()), experts=False, output_layer=None)
    assert isinstance(stays[1].down_proj, nn.Parameter)
