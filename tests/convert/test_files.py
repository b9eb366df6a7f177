"""Checkpoints on disk become low bits on the way in: every kind of file, what is refused, and the peak of memory."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.transformers_like import Conv1D
from torch import Tensor, nn

from lowbit_lightning import convert, layers


class Net(nn.Module):
    """With a table that is computed and not saved, a tied head and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 128)
        self.layers = nn.ModuleList(nn.Linear(128, 128) for _ in range(3))
        self.head = nn.Linear(128, 40, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.full((128,), 0.5))
        self.register_buffer("table", torch.arange(128.0) / 128, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) * self.scale + self.table
        for layer in self.layers:
            x = x + layer(x).tanh()
        return self.head(x)


def net() -> Net:
    torch.manual_seed(3)
    return Net()


def empty() -> Net:
    with convert.empty_parameters():
        return Net()


X = torch.arange(12).reshape(2, 6)


def saved(state: dict[str, Tensor], folder: Path, kind: str) -> Path:
    state = {name: value.detach().clone() for name, value in state.items()}
    if kind == "safetensors":
        save_file(state, folder / "model.safetensors")
        return folder / "model.safetensors"
    if kind == "torch":
        torch.save(state, folder / "w.pt")
        return folder / "w.pt"
    names = sorted(state)
    parts = {f"part-{i}.safetensors": names[i::3] for i in range(3)}
    for file, own in parts.items():
        save_file({name: state[name] for name in own}, folder / file)
    weight_map = {name: file for file, own in parts.items() for name in own}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def state_without_tied() -> dict[str, Tensor]:
    return {name: value for name, value in net().state_dict().items() if name != "head.weight"}


@pytest.mark.parametrize("kind", ["safetensors", "torch", "folder"])
@pytest.mark.parametrize("weights", ["int8", "nf4-dq", "int3"])
def test_equal_to_quantising_in_place(weights: str, kind: str, tmp_path: Path) -> None:
    loaded = convert.load_quantized(empty(), saved(state_without_tied(), tmp_path, kind), weights, progress=False)
    expected = convert.quantize(net(), weights)
    assert loaded.head.weight is loaded.embed.weight
    assert torch.equal(loaded(X), expected(X))
    assert loaded.state_dict().keys() == expected.state_dict().keys()


def test_low_bit_files_stay_as_they_are(tmp_path: Path) -> None:
    """Whatever format is asked for: rounding twice helps nobody."""
    source = convert.quantize(net(), "int4-g32", overrides={"layers.1": "int8", "layers.2": None})
    state = {name: value for name, value in source.state_dict().items() if name != "head.weight"}
    loaded = convert.load_quantized(empty(), saved(state, tmp_path, "folder"), "nf4", progress=False)
    assert [str(layer.weights) for layer in loaded.layers] == ["int4-g32", "int8", "nf4"]  # type: ignore[union-attr]
    assert torch.equal(loaded.layers[0](torch.ones(128)), source.layers[0](torch.ones(128)))
    assert torch.equal(loaded.layers[1](torch.ones(128)), source.layers[1](torch.ones(128)))


def test_dtypes_choices_and_files_by_list(tmp_path: Path) -> None:
    folder = saved(state_without_tied(), tmp_path, "folder")
    files = sorted(folder.glob("*.safetensors"))
    loaded = convert.load_quantized(
        empty(), files, "nf4", dtype=torch.bfloat16, exclude="layers.0", embeddings=True, progress=False
    )
    assert type(loaded.layers[0]) is nn.Linear
    assert loaded.layers[0].weight.dtype == loaded.scale.dtype == torch.bfloat16
    assert type(loaded.embed) is nn.Embedding, "the head stays in high precision, and shares its weight"
    assert loaded.head.weight is loaded.embed.weight
    assert torch.equal(loaded.head.weight, net().embed.weight.bfloat16())
    everything = convert.load_quantized(empty(), files, embeddings=True, output_layer=None, progress=False)
    assert everything.head.weight is everything.embed.weight
    expected = convert.quantize(net(), embeddings=True, output_layer=None)
    assert torch.equal(everything(X), expected(X))


class Mixed(nn.Module):
    """Experts, and a GPT-2's kind of linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.experts = nn.Parameter(torch.randn(3, 64, 128))
        self.fc = Conv1D(64, 128)
        nn.init.normal_(self.fc.weight)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.experts[1]) + self.fc(x)


@pytest.mark.parametrize("saved_in", ["high", "low"])
def test_experts_and_conv1d(saved_in: str, tmp_path: Path) -> None:
    source = Mixed() if saved_in == "high" else convert.quantize(Mixed(), "int8", output_layer=None)
    path = saved(source.state_dict(), tmp_path, "folder")
    with convert.empty_parameters():
        model = Mixed()
    convert.load_quantized(model, path, "int8", output_layer=None, progress=False)
    expected = convert.quantize(Mixed(), "int8", output_layer=None)
    x = torch.randn(4, 128)
    assert torch.equal(model(x), expected(x))
    assert (model(x) - Mixed()(x)).norm() < 0.02 * Mixed()(x).norm()
    plain = convert.dequantize(model)
    assert type(plain.fc) is Conv1D
    shapes = {name: p.shape for name, p in Mixed().named_parameters()}
    assert {name: p.shape for name, p in plain.named_parameters()} == shapes
    assert torch.allclose(plain(x), expected(x), atol=1e-4)


def test_what_does_not_fit_is_said_before_anything_is_changed(tmp_path: Path) -> None:
    state = state_without_tied()
    del state["layers.1.bias"]
    path = saved({**state, "stranger": torch.ones(2)}, tmp_path, "safetensors")
    model = empty()
    with pytest.raises(ValueError, match=r"the files lack \['layers.1.bias'\], the model lacks \['stranger'\].*strict"):
        convert.load_quantized(model, path, progress=False)
    assert not any(isinstance(m, layers.LowBitLinear) for m in model.modules())
    loose = convert.load_quantized(model, path, strict=False, progress=False)
    assert loose.layers[1].bias.is_meta
    state = {**state_without_tied(), "layers.1.bias": torch.ones(3)}
    with pytest.raises(ValueError, match=r"layers.1.bias must be of shape \(128,\), the files have \(3,\)"):
        convert.load_quantized(empty(), saved(state, tmp_path, "safetensors"), progress=False)


def test_buffers_that_no_file_has(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = Net()
    with pytest.raises(ValueError, match=r"\['table'\] are still without values.*empty_parameters"):
        convert.load_quantized(model, saved(state_without_tied(), tmp_path, "safetensors"), progress=False)


@pytest.mark.parametrize(
    ("prepare", "error", "message"),
    [
        (lambda f: f / "nothing", FileNotFoundError, "nothing is not there"),
        (lambda f: f, FileNotFoundError, "has none of"),
        (lambda f: write(f / "x.safetensors", b"\xff" * 100), ValueError, "damaged or no safetensors"),
        (lambda f: write(f / "x.safetensors", b""), ValueError, "damaged or no safetensors"),
        (lambda f: write(f / "x.bin", b"not a file of torch"), ValueError, "damaged, or not a file of tensors"),
        (lambda f: index(f, b"{}"), ValueError, "is not the index"),
        (
            lambda f: write(f / "model.safetensors.index.json", b'{"weight_map": {"a": 3}}').parent,
            ValueError,
            "name files",
        ),
        (
            lambda f: write(f / "model.safetensors.index.json", b'{"weight_map": {"a": "gone.safetensors"}}').parent,
            FileNotFoundError,
            "lists files that are not there",
        ),
    ],
)
def test_files_that_are_no_checkpoints(prepare: Any, error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        convert.load_quantized(empty(), prepare(tmp_path), progress=False)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def index(folder: Path, content: bytes) -> Path:
    return write(folder / "model.safetensors.index.json", content).parent


def test_truncated_files_and_hostile_pickles(tmp_path: Path) -> None:
    path = saved(state_without_tied(), tmp_path, "safetensors")
    write(path, path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="damaged"):
        convert.load_quantized(empty(), path, progress=False)
    hostile = tmp_path / "hostile.bin"
    torch.save({"embed.weight": Hostile(tmp_path / "was here")}, hostile)
    with pytest.raises(ValueError, match="damaged, or not a file of tensors"):
        convert.load_quantized(empty(), hostile, progress=False)
    assert not (tmp_path / "was here").exists()


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_low_bit_parts_that_are_missing_or_damaged(tmp_path: Path) -> None:
    source = convert.quantize(net(), "nf4")
    state = {name: value for name, value in source.state_dict().items() if name != "head.weight"}
    for change, message in (
        ({"layers.0.weight_scales": None}, r"layers.0.weight_scales|lacks its \['weight_scales'\]"),
        ({"layers.0.weight_scales": torch.ones(128, 3)}, "weight_scales of nf4 must be torch.uint8 of shape"),
        ({"layers.0.weight_format": torch.tensor([255, 0], dtype=torch.uint8)}, "the format of weights must be one of"),
    ):
        damaged = {name: value for name, value in {**state, **change}.items() if value is not None}
        with pytest.raises(ValueError, match=message):
            convert.load_quantized(empty(), saved(damaged, tmp_path, "safetensors"), progress=False)


PEAK = """
import resource, sys, torch
from torch import nn
from lowbit_lightning import convert, kernels

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

convert.quantize(nn.Linear(64, 64), output_layer=None)  # compiles, allocates what is allocated once
kernels.lowbit_quantize(torch.randn(1024, 1024), "nf4")
torch.set_num_threads(1)
def build():
    return nn.ModuleList(nn.Linear({width}, {width}, bias=False) for _ in range({count}))
with torch.device("meta"):
    model = build()
before = peak()
convert.load_quantized(model, sys.argv[1], "nf4-dq", output_layer=None, progress=False)
print(peak() - before, sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("width", "count"), [(2048, 8), pytest.param(8192, 15, marks=pytest.mark.slow)])
def test_the_peak_is_the_low_bit_model_and_its_largest_layer(width: int, count: int, tmp_path: Path) -> None:
    """Four files of bfloat16 weights; the slow one has 1.0 B parameters in 2 GB."""
    for part in range(4):
        state = {f"{i}.weight": torch.full((width, width), 0.01).bfloat16() for i in range(part, count, 4)}
        save_file(state, tmp_path / f"part-{part}.safetensors")
    script = textwrap.dedent(PEAK).format(width=width, count=count)
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    grown, model = map(int, done.stdout.split())
    assert model * 8 / (count * width * width) <= 4.13
    assert grown <= model + width * width * 2 + 200e6, f"{grown / 1e6:.0f} MB for a model of {model / 1e6:.0f} MB"
