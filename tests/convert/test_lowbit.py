"""``quantize`` and ``dequantize``: which layers, tied weights, the report, and what is refused."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowbit_lightning import convert, layers


class Net(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(80, 128)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(128, 256), "down": nn.Linear(256, 128)}) for _ in range(2)
        )
        self.head = nn.Linear(128, 80, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block["down"](block["up"](x).relu())  # type: ignore[index]
        return self.head(x)


BODY = {f"blocks.{i}.{part}" for i in range(2) for part in ("up", "down")}


def low(module: nn.Module) -> dict[str, str]:
    return {name: str(m.weights) for name, m in module.named_modules() if isinstance(m, layers.LowBitLinear)}


def test_the_body_by_default_and_everything_on_request() -> None:
    assert convert.quantize(net := Net()) is net
    assert low(net) == dict.fromkeys(BODY, "nf4")
    assert type(net.embed) is nn.Embedding
    everything = convert.quantize(Net(), "int4", output_layer=None, embeddings=True)
    assert set(low(everything)) == BODY | {"head"}
    assert isinstance(everything.embed, layers.LowBitEmbedding)
    assert all(not p.requires_grad for n, p in everything.named_parameters() if "bias" not in n)


def test_choices_by_name() -> None:
    net = convert.quantize(
        Net(),
        exclude="blocks.0.up",
        overrides={"*.down": "int8", "blocks.1.down": {"weights": "int4", "fit": "absmax"}, "blocks.1.up": None},
        fit="lsq",
    )
    assert low(net) == {"blocks.0.down": "int8", "blocks.1.down": "int4 (absmax)"}
    net = convert.quantize(Net(), filter=lambda name, layer: bool(layer.out_features == 256))
    assert set(low(net)) == {"blocks.0.up", "blocks.1.up"}
    again = convert.quantize(net, "int3", include="*.down")  # what is in low bits already stays
    assert low(again) == {"blocks.0.up": "nf4", "blocks.1.up": "nf4", "blocks.0.down": "int3", "blocks.1.down": "int3"}


def test_there_and_back() -> None:
    net, x = Net(), torch.randint(80, (2, 5))
    exact = net(x).detach()
    keys = set(net.state_dict())
    quantised = convert.quantize(net.bfloat16(), "int8", embeddings=True, output_layer=None)
    expected = copy.deepcopy(quantised)
    plain = convert.dequantize(quantised, torch.float32)
    assert {type(m) for m in plain.modules()} == {Net, nn.ModuleList, nn.ModuleDict, nn.Linear, nn.Embedding}
    assert set(plain.state_dict()) == keys
    assert plain.head.weight.dtype == torch.float32
    assert torch.equal(plain.head.weight, expected.head.dequantize(torch.float32))  # type: ignore[operator]
    assert (plain.float()(x) - exact).norm() < 0.02 * exact.norm()
    again = convert.dequantize(convert.quantize(Net().bfloat16()))
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}


def test_tied_weights_stay_one() -> None:
    net = convert.quantize(Net(tied=True))
    assert type(net.head) is nn.Linear
    assert net.head.weight is net.embed.weight
    net = convert.quantize(Net(tied=True), "int8", embeddings=True, output_layer=None)
    assert net.head.weight is net.embed.weight
    assert net.head.weight_scales is net.embed.weight_scales
    x = torch.randint(80, (2, 5))
    expected = nn.functional.linear(net.embed(x), net.embed.dequantize(torch.float32))  # type: ignore[operator]
    assert torch.allclose(net.head(net.embed(x)), expected, atol=1e-5)
    plain = convert.dequantize(net)
    assert plain.head.weight is plain.embed.weight
    assert len({id(m.weight) for m in plain.modules() if isinstance(m, nn.Linear)}) == 5


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype:UserWarning")
@pytest.mark.parametrize("padded", [False, True])
def test_an_encoder_of_torch_evaluates_its_low_bit_layers(padded: bool) -> None:
    """Torch's fused path takes the weights of linear layers itself; with padding it gives them nested tensors."""
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, activation="gelu", batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).requires_grad_(False).eval()
    x, unused = torch.randn(3, 7, 64), torch.arange(7).repeat(3, 1) > torch.tensor([[6], [3], [5]])
    options = {"src_key_padding_mask": unused} if padded else {}
    low = copy.deepcopy(convert.quantize(encoder, "int8", output_layer=None))
    assert {type(m) for name, m in low.named_modules() if name.endswith("linear1")} == {layers.LowBitLinear}
    plain = convert.dequantize(encoder)
    assert plain.layers[0].activation_relu_or_gelu == 2
    with torch.no_grad():
        assert torch.allclose(low(x, **options)[~unused], plain(x, **options)[~unused], atol=1e-5)


def test_the_report() -> None:
    net = Net()
    before = sum(p.nbytes for p in net.parameters())
    convert.quantize(net, overrides={"*.down": "int8"})
    report = convert.weight_report(net)
    assert report.bytes_before == 4 * 128 * 256 * 4
    assert report.bytes_after == 2 * (128 * 256 // 2 + 256 * 2 * 4) + 2 * (128 * 256 + 128 * 4)
    assert report.rest == before - report.bytes_before
    text = str(report)
    assert "4 weights in low bits: 524.3 kB became 103.4 kB (5.1x less); all else takes 85.0 kB" in text
    assert "nf4: blocks.*.up (2); SNR " in text
    assert "int8: blocks.*.down (2); SNR " in text
    assert str(convert.weight_report(Net())) == "no low-bit weights"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weights": "int7"}, ValueError, "got 'int7'"),
        ({"exclude": "*.nothing"}, ValueError, "exclude='\\*.nothing' matches no"),
        ({"overrides": {"*.up": "int7"}}, ValueError, "overrides\\['\\*.up'\\]='int7' .*int7"),
        ({"overrides": {"*.up": {"fitt": "lsq"}}}, TypeError, "fitt"),
        ({"exclude": "*"}, ValueError, "nothing to quantize in Net.*blocks.0.up"),
        ({"threshold": 6.0}, ValueError, "threshold"),
    ],
)
def test_bad_arguments_change_nothing(options: dict[str, Any], error: type[Exception], message: str) -> None:
    net = Net()
    with pytest.raises(error, match=f"(?s){message}"):
        convert.quantize(net, **options)
    assert not low(net)


def test_what_is_left_alone_is_said() -> None:
    class Odd(nn.Linear):
        pass

    net = nn.Sequential(Odd(64, 64), nn.Linear(64, 64).double(), nn.Embedding(9, 64, max_norm=1.0))
    with pytest.raises(ValueError, match=r"(?s)0: Odd is a class of its own.*1: weight is torch.float64.*2: max_norm"):
        convert.quantize(net, embeddings=True, output_layer=None)
    with pytest.raises(TypeError, match=r"dtype must be .* got torch.float64"):
        convert.dequantize(net, torch.float64)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_stay_visible(bad: float) -> None:
    net = nn.Sequential(nn.Linear(128, 32, bias=False), nn.Linear(32, 2))
    with torch.no_grad():
        net.get_parameter("0.weight")[3, 70] = bad
    y = convert.quantize(net)[0](torch.ones(1, 128))
    assert y[0, 3].isnan()
    assert y[0, [i for i in range(32) if i != 3]].isfinite().all()


class Experts(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up, self.down = nn.Parameter(torch.randn(3, 64, 128)), nn.Parameter(torch.randn(3, 128, 64))


def test_experts_in_high_precision_load_into_low_bits() -> None:
    state = nn.Sequential(Experts(0)).state_dict()
    expected = convert.quantize(nn.Sequential(Experts(0))).state_dict()
    model = convert.quantize(nn.Sequential(Experts(1)))
    found = convert.lowbit.quantised_state(model, state)
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        one.load_state_dict(state)
        for name, value in expected.items():
            assert torch.equal(one.state_dict()[name], value), name
            assert torch.equal(found[name], value), name
        assert found.keys() == one.state_dict().keys()
        plain = convert.dequantize(one)
        plain.load_state_dict(state)
        assert torch.equal(plain.state_dict()["0.up"], state["0.up"])
