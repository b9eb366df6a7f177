"""``bitsandbytes.nn``: layers that are quantised when they are moved; state_dicts go both ways to the real one's."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lowbit_lightning.bitsandbytes as bnb

real: Any = pytest.importorskip("bitsandbytes")
LINEAR = {
    "nf4": lambda n, k: bnb.nn.LinearNF4(k, n),
    "fp4": lambda n, k: bnb.nn.Linear4bit(k, n, compress_statistics=False, quant_storage=torch.bfloat16),
    "int8": lambda n, k: bnb.nn.Linear8bitLt(k, n, has_fp16_weights=False, threshold=6.0),
}
TABLES = {"nf4": bnb.nn.EmbeddingNF4, "fp4": bnb.nn.EmbeddingFP4, "int8": bnb.nn.Embedding8bit}
Make = Callable[[int, int], Any]


def decoded(layer: Any) -> torch.Tensor:
    weight = layer.weight
    if isinstance(weight, bnb.nn.Int8Params):
        assert weight.SCB is not None
        return bnb.functional.int8_vectorwise_dequant(weight.data, weight.SCB)
    return bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()


@pytest.mark.parametrize("width", [64, 40])
@pytest.mark.parametrize("make", LINEAR.values(), ids=LINEAR)
def test_a_layer_multiplies_its_decoded_weight(make: Make, width: int) -> None:
    plain, layer = nn.Linear(width, 32), make(32, width)
    layer.load_state_dict(plain.state_dict())
    assert layer.weight.dtype == torch.float32
    layer = layer.to("cpu")
    assert layer.weight.dtype in (torch.int8, torch.uint8, torch.bfloat16)
    assert (decoded(layer) - plain.weight).norm() < 0.15 * plain.weight.norm()
    x = torch.randn(2, 3, width, requires_grad=True)
    y = layer(x)
    expected = nn.functional.linear(x, decoded(layer), plain.bias)
    assert torch.allclose(y, expected, atol=1e-5)
    y.sum().backward()
    assert torch.allclose(x.grad, decoded(layer).sum(0).expand_as(x), atol=1e-5)  # type: ignore[arg-type]
    assert layer(x.detach().half()).dtype == torch.float16
    assert layer.bias.dtype == torch.float32  # bitsandbytes casts it, in place
    assert layer.half()(x.detach().half()).dtype == torch.float16


@pytest.mark.parametrize("make", LINEAR.values(), ids=LINEAR)
def test_a_layer_loads_its_own_state(make: Make) -> None:
    x, layer = torch.randn(4, 64), make(32, 64)
    expected = layer(x)  # quantises
    state = layer.state_dict()
    with torch.device("meta"):
        empty = make(32, 64)
    for fresh, assign in ((make(32, 64), False), (make(32, 64).to("cpu"), False), (empty, True)):
        fresh.load_state_dict(state, strict=True, assign=assign)
        assert torch.equal(fresh(x), expected)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.copy(layer)):
        assert torch.equal(twin(x), expected)
        assert type(twin.weight) is type(layer.weight)
    plain = nn.Linear(64, 32)
    layer.load_state_dict(plain.state_dict())  # quantised on the way
    assert torch.allclose(layer(x), plain(x), atol=0.5)
    assert layer.weight.dtype != torch.float32
    del state["weight"]
    with pytest.raises(RuntimeError, match=r'Missing key.* "weight"'):
        make(32, 64).load_state_dict(state)


@pytest.mark.parametrize("make", LINEAR.values(), ids=LINEAR)
def test_states_that_do_not_fit_are_refused(make: Make) -> None:
    layer = make(32, 64).to("cpu")
    alone = {"weight": layer.state_dict()["weight"], "bias": layer.bias}
    with pytest.raises(RuntimeError, match=r"weight: codes of shape .* without"):
        make(32, 64).to("cpu").load_state_dict(alone)
    other = make(32, 128).to("cpu").state_dict()
    with pytest.raises(RuntimeError, match="weight"):
        layer.load_state_dict(other)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_real_one_reads_four_bits_and_back(quant_type: str) -> None:
    x = torch.randn(4, 64)
    mine = bnb.nn.Linear4bit(64, 32, quant_type=quant_type).to("cpu")
    state = mine.state_dict()
    stats = {key: value for key, value in state.items() if key.startswith("weight.")}
    read = real.nn.Params4bit.from_prequantized(state["weight"], stats, device="cpu")
    assert torch.equal(real.functional.dequantize_4bit(read.data, read.quant_state), decoded(mine))

    theirs = real.nn.Linear4bit(64, 32, quant_type=quant_type).to("cpu")
    fresh = bnb.nn.Linear4bit(64, 32)
    fresh.load_state_dict(theirs.state_dict())
    weight = real.functional.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state)
    assert torch.equal(decoded(fresh), weight)
    assert torch.allclose(fresh(x), nn.functional.linear(x, weight, theirs.bias), atol=1e-5)


def test_the_real_one_reads_eight_bits_and_back() -> None:
    mine = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False).to("cpu")
    theirs = real.nn.Linear8bitLt(64, 32, has_fp16_weights=False).to("cpu")
    theirs.load_state_dict(mine.state_dict())
    assert torch.equal(theirs.weight.data, mine.weight.data)
    fresh = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
    fresh.load_state_dict(theirs.state_dict())
    assert torch.equal(decoded(fresh), decoded(mine))


@pytest.mark.parametrize("width", [64, 40])
@pytest.mark.parametrize("kind", TABLES.values(), ids=TABLES)
def test_tables(kind: Any, width: int) -> None:
    plain, table = nn.Embedding(50, width), kind(50, width)
    table.load_state_dict(plain.state_dict())
    indices = torch.randint(50, (3, 7))
    found = table.to("cpu")(indices)
    assert torch.allclose(found, decoded(table)[indices])
    assert (found - plain(indices)).norm() < 0.2 * plain(indices).norm()
    fresh = kind(50, width)
    fresh.load_state_dict(table.state_dict())
    assert torch.equal(fresh(indices), found)


def test_a_float_weight_trains() -> None:
    torch.manual_seed(0)
    layer, x = bnb.nn.Linear8bitLt(64, 32), torch.randn(128, 64)
    target = x @ torch.randn(64, 32)
    optimizer = bnb.optim.Adam(layer.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.05 * losses[0]
    assert layer.weight.dtype == torch.float32


def test_parameters_are_quantised_by_a_move_alone() -> None:
    weight = bnb.nn.Params4bit(torch.randn(32, 64), quant_type="nf4", lost="is ignored")
    assert not weight.bnb_quantized
    assert weight.to(torch.float16).dtype == torch.float16
    moved = weight.to("cpu")
    assert moved is weight
    assert weight.shape == (1024, 1)
    again = bnb.nn.Params4bit(decoded(nn.ParameterDict({"weight": weight})), **vars(weight))
    assert torch.equal(again, again.to("cpu"))  # said to be quantised
    assert all(type(part) is bnb.nn.Params4bit for part in torch.chunk(weight, 4))
    assert weight.absmax.dtype == torch.uint8
    assert weight.nested_absmax.dtype == torch.float32
    with pytest.raises(AttributeError, match="'Params4bit' object has no attribute 'absmax'"):
        _ = bnb.nn.Params4bit(torch.randn(4, 4)).absmax


def test_products_of_their_own() -> None:
    x, w = torch.randn(9, 64), torch.randn(32, 64)
    state = bnb.MatmulLtState()
    state.has_fp16_weights = False
    assert torch.allclose(bnb.matmul(x, w, state=state), x @ w.T, atol=0.6)
    assert state.CB is not None
    assert torch.equal(bnb.matmul(x, state.CB, state=state), bnb.matmul(x, w, state=state))
    codes, quant_state = bnb.functional.quantize_4bit(w.T.contiguous(), quant_type="nf4")
    with pytest.warns(DeprecationWarning, match="Re-quantize from the weight"):
        y = bnb.matmul_4bit(x, codes, quant_state)
    assert torch.allclose(y, x @ bnb.functional.dequantize_4bit(codes, quant_state), atol=1e-4)
    with pytest.raises(ValueError, match="quant_state must be"):
        bnb.matmul_4bit(x, codes, None)  # type: ignore[arg-type]


@pytest.mark.skipif(torch.__version__.startswith("2.7"), reason="torch 2.7's compiler cannot trace it")
@pytest.mark.parametrize("make", LINEAR.values(), ids=LINEAR)
def test_compiles_without_a_break(make: Make) -> None:
    layer, x = make(32, 64).to("cpu"), torch.randn(4, 64)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("layer", [bnb.nn.Linear8bitLt, bnb.nn.Linear4bit])
@pytest.mark.parametrize("fullgraph", [True, False])
def test_compiled_layers_in_use(layer: Any, fullgraph: bool) -> None:
    """Without fullgraph Dynamo once followed the parameter's ``__torch_function__`` for ever."""
    options = {"has_fp16_weights": False} if layer is bnb.nn.Linear8bitLt else {}
    net = nn.Sequential(layer(64, 64, **options), layer(64, 64, **options))
    net.to("cpu")
    x = torch.randn(8, 64)
    with torch.no_grad():
        assert torch.equal(torch.compile(net, backend="aot_eager", fullgraph=fullgraph)(x), net(x))


@pytest.mark.parametrize("layer", [bnb.nn.Linear8bitLt, bnb.nn.Linear4bit])
def test_compiled_layers_under_activation_checkpointing(layer: Any) -> None:
    options = {"has_fp16_weights": False} if layer is bnb.nn.Linear8bitLt else {}
    one = layer(64, 64, **options).to("cpu")

    def run(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(one, x, use_reentrant=False)

    torch.compiler.reset()
    x = torch.randn(8, 64, requires_grad=True)
    found, expected = torch.compile(run, backend="aot_eager", fullgraph=True)(x), one(x)
    assert torch.equal(found, expected)
    dy = torch.randn(8, 64)
    assert torch.equal(*(torch.autograd.grad(y, x, dy)[0] for y in (found, expected)))
