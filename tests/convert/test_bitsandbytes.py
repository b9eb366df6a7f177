"""bitsandbytes' files of low-bit weights, read and written without it. tests/data has what it saved itself."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lowbit_lightning import convert, layers

DATA = load_file(Path(__file__).parents[1] / "data" / "bitsandbytes_weights.safetensors")
SHAPES = {
    "nf4": (48, 128),
    "nested": (48, 128),
    "fp4": (16, 192),
    "stored": (16, 128),
    "int8": (40, 96),
    "odd": (6, 40),
}


def file(name: str, folder: Path, **changes: Tensor | None) -> Path:
    state = {key.removeprefix(f"{name}."): value for key, value in DATA.items() if key.startswith(f"{name}.")}
    state.pop("decoded")
    state = {key: value for key, value in {**state, **changes}.items() if value is not None}
    save_file({f"0.{key}": value for key, value in state.items()}, folder / "model.safetensors")
    return folder


def model(name: str) -> nn.Sequential:
    rows, length = SHAPES[name]
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(length, rows, bias=False))


def load(name: str, folder: Path, weights: str = "nf4", **changes: Tensor | None) -> layers.LowBitLinear:
    path = file(name, folder, **changes)
    (layer,) = convert.load_quantized(model(name), path, weights, output_layer=None, progress=False)
    assert isinstance(layer, layers.LowBitLinear)
    return layer


@pytest.mark.parametrize("name", ["nf4", "nested", "fp4", "stored", "int8"])
def test_codes_stay_as_they_are(name: str, tmp_path: Path) -> None:
    layer = load(name, tmp_path)
    exact = DATA[f"{name}.decoded"]
    assert layer.format.kind == {"fp4": "fp4", "int8": "int8"}.get(name, "nf4")
    assert torch.allclose(layer.dequantize(torch.float32), exact, rtol=1e-6, atol=1e-6)
    x = torch.randn(5, exact.shape[1])
    assert (layer(x) - x @ exact.T).norm() <= 1e-5 * (x @ exact.T).norm()


def test_blocks_that_cross_rows_are_quantised_again_and_it_is_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"0.weight: rows of 40 are not multiples of .* 64.*quantised again to int8"):
        layer = load("odd", tmp_path, "int8")
    exact = DATA["odd.decoded"]
    assert (layer.dequantize(torch.float32) - exact).norm() <= 0.01 * exact.norm()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("nf4", {"weight.absmax": None}, r"0.weight of bitsandbytes lacks \['absmax'\]"),
        ("nested", {"weight.nested_absmax": None}, "lacks .*nested_absmax"),
        ("nested", {"weight.nested_absmax": torch.ones(0)}, "only 0 nested ones"),
        ("nf4", {"weight": torch.zeros(7, 1, dtype=torch.uint8)}, "must have 3072 bytes of codes and 96 scales, got 7"),
        (
            "nf4",
            {"weight.quant_state.bitsandbytes__nf4": torch.tensor([1, 2], dtype=torch.uint8)},
            "quant_state is damaged",
        ),
        ("int8", {"SCB": torch.ones(3)}, "an SCB for each row"),
        ("int8", {"weight": torch.zeros(96, 40, dtype=torch.int8)}, "only bitsandbytes' row layout"),
    ],
)
def test_damaged_files_are_named(name: str, changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load(name, tmp_path, **changes)


@pytest.mark.parametrize("weights", ["nf4", "nf4-dq", "fp4-g128", "int8"])
def test_written_and_read_again(weights: str, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(256, 32), nn.Linear(32, 4))
    convert.quantize(net, weights)
    state = convert.to_bitsandbytes(net)
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "model.safetensors")
    with torch.device("meta"):
        twin = nn.Sequential(nn.Linear(256, 32), nn.Linear(32, 4))
    convert.load_quantized(twin, tmp_path, "int2", progress=False)
    assert torch.equal(twin[0].dequantize(torch.float32), net[0].dequantize(torch.float32))  # type: ignore[operator]
    x = torch.randn(3, 256)
    assert torch.allclose(twin(x), net(x), atol=1e-6)


def test_what_bitsandbytes_does_not_know_is_refused() -> None:
    with pytest.raises(ValueError, match=r"0.weight is int4 .* bitsandbytes knows int8, nf4 and fp4"):
        convert.to_bitsandbytes(convert.quantize(nn.Sequential(nn.Linear(128, 32)), "int4", output_layer=None))
    with pytest.raises(ValueError, match="rows of 100"):
        convert.to_bitsandbytes(convert.quantize(nn.Sequential(nn.Linear(100, 32)), "nf4", output_layer=None))


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="`pip install -e .[benchmarks]` brings it")
@pytest.mark.parametrize("weights", ["nf4", "fp4", "int8"])
def test_the_real_one_reads_what_we_write(weights: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import bitsandbytes as bnb
    net = nn.Sequential(nn.Linear(256, 64, bias=False))
    convert.quantize(net, weights, output_layer=None)
    state = {key.removeprefix("0."): value for key, value in convert.to_bitsandbytes(net).items()}
    if weights == "int8":
        decoded = bnb.functional.int8_vectorwise_dequant(state["weight"], state["SCB"])
    else:
        packed = state.pop("weight")
        stats = {key.removeprefix("weight."): value for key, value in state.items()}
        p = bnb.nn.Params4bit.from_prequantized(packed, stats, device="cpu")
        decoded = bnb.functional.dequantize_4bit(p.data, p.quant_state)
    assert torch.allclose(decoded, net[0].dequantize(torch.float32), rtol=1e-5, atol=1e-7)  # type: ignore[operator]
