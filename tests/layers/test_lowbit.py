"""Low-bit layers behave like modules: numbers of the decoded weight, saving, loading, moving, copying, wrapping."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lowbit_lightning import kernels, layers
from lowbit_lightning.kernels.formats import weight_format

FORMATS = ("int8", "nf4", "nf4-dq", "fp4", "fp4-g128", "int4", "int4-g32", "int3", "int2")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def linear(weights: str = "nf4", **settings: Any) -> layers.LowBitLinear:
    torch.manual_seed(1)
    return layers.LowBitLinear(160, 48, weights=weights, **settings)


def decoded(layer: layers.LowBitLinear) -> Tensor:
    """The weight, by the reference."""
    with kernels.use_backend("reference"):
        return layer.dequantize(torch.float32).double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", FORMATS)
def test_it_is_a_linear_layer_of_the_decoded_weight(weights: str, dtype: torch.dtype) -> None:
    layer = linear(weights).to(dtype)
    x = torch.randn(2, 5, 160, dtype=dtype, requires_grad=True)
    y = layer(x)
    y.backward(grad := torch.randn_like(y))
    expected = x.double() @ decoded(layer).T + layer.bias.double()
    assert y.dtype == dtype
    accuracy = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert (y.double() - expected).norm() <= accuracy * expected.norm()
    assert x.grad is not None
    wanted = grad.double() @ decoded(layer)
    assert (x.grad.double() - wanted).norm() <= accuracy * wanted.norm()
    assert layer.bias.grad is not None
    assert torch.allclose(layer.bias.grad.double(), grad.double().flatten(0, 1).sum(0), rtol=2e-2, atol=1e-1)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype:UserWarning")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors(layout: torch.layout) -> None:
    layer, parts = linear(), [torch.randn(n, 160) for n in (3, 9)]
    y = layer(torch.nested.nested_tensor(parts, layout=layout, requires_grad=True))
    assert y.layout == layout
    assert torch.allclose(torch.cat(y.unbind()), layer(torch.cat(parts)))


@pytest.mark.parametrize("weights", FORMATS)
def test_the_error_is_what_snr_says(weights: str) -> None:
    plain = nn.Linear(160, 48)
    exact = plain.weight.detach().double()
    layers.LowBitLinear.adopt(plain, layers.Weights.of(weights))
    assert isinstance(plain, layers.LowBitLinear)
    error = decoded(plain) - exact
    snr = 10 * math.log10(float(exact.square().sum() / error.square().sum()))
    assert plain.snr_db == pytest.approx(snr, abs=1e-3)
    floor = {8: 35, 4: 15, 3: 12, 2: 8}[weight_format(weights).bits]
    assert snr > floor


@pytest.mark.parametrize("kind", ["Linear8bit", "Linear4bit", "Linear3bit", "Linear2bit"])
def test_names_by_bits(kind: str) -> None:
    layer = getattr(layers, kind)(64, 32)
    assert layer.format.bits == int(kind[6])
    assert isinstance(layer, nn.Linear)
    assert layer(torch.randn(3, 64)).shape == (3, 32)


# -- saved and loaded --------------------------------------------------------------------------------------------------


def through_safetensors(state: dict[str, Tensor], folder: Any) -> dict[str, Tensor]:
    save_file(state, folder / "weights.safetensors")
    return load_file(folder / "weights.safetensors")


def through_torch(state: dict[str, Tensor], folder: Any) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("through", [through_safetensors, through_torch])
@pytest.mark.parametrize("weights", ["int8", "nf4", "nf4-dq", "int3"])
def test_strict_round_trips(weights: str, through: Any, tmp_path: Any) -> None:
    """Into a fresh layer, one that was quantised from other weights, and one on the meta device."""
    source = linear(weights)
    state = through(source.state_dict(), tmp_path)
    assert set(state) == {"weight", "weight_scales", "weight_format", "bias"}
    x = torch.randn(3, 160)
    for target in (linear(weights), layers.LowBitLinear(160, 48, weights=weights)):
        target.load_state_dict(state, strict=True)
        assert torch.equal(target(x), source(x))
    with torch.device("meta"):
        empty = layers.LowBitLinear(160, 48, weights=weights)
    empty.load_state_dict(state, strict=True, assign=True)
    assert torch.equal(empty(x), source(x))
    with torch.device("meta"):
        empty = layers.LowBitLinear(160, 48, weights=weights)
    empty = empty.to_empty(device="cpu")
    empty.load_state_dict(state, strict=True)
    assert torch.equal(empty(x), source(x))
    assert empty.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in empty.state_dict().items())


def test_another_format_is_refused_by_name() -> None:
    """nf4 and fp4 have equal shapes: without a name the codes would be read by the wrong table."""
    layer = linear("fp4")
    before = layer.weight.clone()
    with pytest.raises(RuntimeError, match=r"weight was saved as nf4 but this layer is fp4.*weights='nf4'"):
        layer.load_state_dict(linear("nf4").state_dict())
    assert torch.equal(layer.weight, before)
    with pytest.raises(RuntimeError, match="weight_scales"):
        layer.load_state_dict({k: v for k, v in linear("fp4").state_dict().items() if k != "weight_scales"})
    with pytest.raises(RuntimeError, match=r"Unexpected.*weight_scales|size mismatch"):
        nn.Linear(160, 48).load_state_dict(layer.state_dict())


def test_a_high_precision_weight_is_quantised_on_the_way_in() -> None:
    plain, layer = nn.Linear(160, 48), linear("nf4")
    before = plain.weight.detach().clone()
    layer.load_state_dict(plain.state_dict())
    assert torch.equal(plain.weight, before)
    layers.LowBitLinear.adopt(plain, layers.Weights.of("nf4"))
    assert torch.equal(layer.weight, plain.get_parameter("weight"))
    assert torch.equal(layer.weight_scales, plain.get_parameter("weight_scales"))
    with pytest.raises(RuntimeError, match=r"weight must be of shape \(48, 160\), got \(48, 100\)"):
        layer.load_state_dict({"weight": torch.randn(48, 100), "bias": torch.zeros(48)})


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_copies(duplicate: Any) -> None:
    layer = linear("int4")
    twin = duplicate(layer)
    x = torch.randn(3, 160)
    assert torch.equal(twin(x), layer(x))
    assert twin.weight.data_ptr() != layer.weight.data_ptr()


@pytest.mark.parametrize("weights", ["int8", "nf4", "nf4-dq"])
def test_casts_change_what_is_computed_and_no_code(weights: str) -> None:
    layer = linear(weights)
    codes, scales = layer.weight.clone(), layer.weight_scales.clone()
    for cast in (lambda m: m.to(torch.bfloat16), nn.Module.half, nn.Module.double, nn.Module.float):
        cast(layer)
        assert torch.equal(layer.weight, codes)
        assert torch.equal(layer.weight_scales, scales)
        assert layer.weight_scales.dtype == scales.dtype
    layer.bfloat16()
    assert layer.dequantize().dtype == layer.bias.dtype == torch.bfloat16
    assert layer(torch.randn(2, 160, dtype=torch.bfloat16)).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 160)).dtype == torch.bfloat16
    computed = linear(weights, compute_dtype=torch.bfloat16)
    assert computed(torch.randn(2, 160)).dtype == torch.float32


def test_moving_to_meta_and_back_keeps_the_format() -> None:
    layer = linear("int3").to("meta")
    assert layer.weight.is_meta
    layer = layer.to_empty(device="cpu")
    assert bytes(layer.weight_format.tolist()) == b"int3"
    layer.reset_parameters()
    assert layer(torch.randn(1, 160)).isfinite().all()


def test_it_compiles_as_one_graph() -> None:
    layer = linear("nf4")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 160, requires_grad=True)
    assert torch.allclose(compiled(x), layer(x))
    compiled(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    net = nn.Sequential(linear("nf4"), nn.Tanh(), nn.Linear(48, 8))
    x = torch.randn(4, 160, requires_grad=True)
    torch.utils.checkpoint.checkpoint(net, x, use_reentrant=reentrant).sum().backward()
    twin = x.detach().requires_grad_()
    net(twin).sum().backward()
    assert x.grad is not None
    assert twin.grad is not None
    assert torch.equal(x.grad, twin.grad)


def test_the_backward_keeps_no_decoded_copy() -> None:
    saved: list[Tensor] = []
    layer = linear("nf4")
    x = torch.randn(4, 160, requires_grad=True)

    def keep(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer(x)
    kept = sum(t.nbytes for t in {t.data_ptr(): t for t in saved}.values())
    assert kept <= layer.weight.nbytes + layer.weight_scales.nbytes


# -- LLM.int8() --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_outlier_columns_do_not_take_the_others_resolution(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    plain = nn.Linear(256, 64, bias=False)
    x = torch.randn(40, 256)
    x[:, torch.randperm(256)[:6]] *= 60
    exact = x.to(dtype).double() @ plain.weight.detach().double().T
    errors = {}
    for threshold in (1e9, 6.0):
        layer = copy.deepcopy(plain)
        layers.LowBitLinear.adopt(layer, layers.Weights.of("int8", threshold=threshold))
        found = layer.to(dtype)(x.to(dtype)).detach().double()
        errors[threshold] = float((found - exact).norm() / exact.norm())
    assert errors[6.0] < 0.01 < errors[1e9]


def test_outlier_steps_in_training_and_beyond_float16() -> None:
    """Four-dimensional input, weights beyond float16's range, and the gradient of the decoded weight."""
    layer = linear("int8", threshold=6.0)
    layer.keep(torch.randn(48, 160) * 1e6, layer.weights)
    x = torch.randn(2, 3, 4, 160, requires_grad=True)
    y = layer(x)
    expected = x.double() @ decoded(layer).T + layer.bias.double()
    assert (y.double() - expected).norm() <= 0.02 * expected.norm()
    y.backward(grad := torch.randn_like(y))
    assert x.grad is not None
    wanted = grad.double() @ decoded(layer)
    assert (x.grad.double() - wanted).norm() <= 1e-5 * wanted.norm()


# -- embeddings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", FORMATS)
def test_embeddings_are_rows_of_the_decoded_table(weights: str) -> None:
    table = layers.LowBitEmbedding(50, 96, padding_idx=0, weights=weights)
    indices = torch.randint(50, (3, 7))
    assert torch.equal(table(indices), table.dequantize(torch.float32)[indices])
    assert table.bfloat16()(indices).dtype == torch.bfloat16
    fresh = layers.LowBitEmbedding(50, 96, padding_idx=0, weights=weights)
    fresh.load_state_dict(table.state_dict(), strict=True)
    assert torch.equal(fresh.bfloat16()(indices), table(indices))
    with pytest.raises(IndexError, match="out of range"):
        table(torch.tensor([50]))


def test_stable_embedding() -> None:
    table = layers.StableEmbedding(50, 64, padding_idx=3)
    expected = nn.functional.layer_norm(table.weight[torch.tensor([1, 3])], (64,))
    assert torch.allclose(table(torch.tensor([1, 3])), expected)
    assert (table.weight[3] == 0).all()
    assert table.weight.abs().max() <= math.sqrt(6 / (50 + 64))


# -- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": "int5"}, "got 'int5'"),
        ({"weights": "nf4", "fit": "best"}, "fit must be one of .* got 'best'"),
        ({"weights": "int8", "fit": "lsq"}, "fit must be"),
        ({"weights": "nf4-g48"}, "48"),
        ({"weights": "nf4", "threshold": 6.0}, "threshold must be 0, or positive for int8, got 6.0 for nf4"),
        ({"weights": "int8", "threshold": -1.0}, "threshold must be"),
        ({"weights": "nf4", "compute_dtype": torch.float64}, "compute_dtype must be .* got torch.float64"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layers.LowBitLinear(64, 32, **settings)


def test_inputs_that_do_not_fit_are_named() -> None:
    layer = linear("nf4")
    with pytest.raises(ValueError, match=r"160|packed"):
        layer(torch.randn(3, 100))
    with pytest.raises(TypeError, match="float64"):
        layer(torch.randn(3, 160, dtype=torch.float64))


@pytest.mark.parametrize("weights", FORMATS)
def test_odd_small_and_empty_shapes(weights: str) -> None:
    for rows, length in ((3, 7), (1, 1), (5, 33), (2, 129), (0, 64)):
        plain = nn.Linear(length, rows) if rows else nn.Linear(length, 1)
        if not rows:
            plain.weight, plain.bias = nn.Parameter(torch.zeros(0, length)), nn.Parameter(torch.zeros(0))
        layers.LowBitLinear.adopt(plain, layers.Weights.of(weights))
        x = torch.randn(4, length)
        expected = x @ plain.dequantize(torch.float32).T + plain.bias  # type: ignore[operator]
        assert torch.allclose(plain(x), expected, atol=1e-5), (rows, length)
        assert plain(torch.randn(0, length)).shape == (0, rows)
