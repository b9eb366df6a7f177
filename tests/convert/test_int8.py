"""Which layers are swapped, why the others aren't, and that a swap leaves the model what it was."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from lowbit_lightning.convert import NothingToSwap, restore, swap_linears
from lowbit_lightning.layers import Int8Linear, Products


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.gate = nn.Linear(64, 192), nn.Linear(64, 64), nn.Linear(64, 4)


class Model(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 64)
        self.head = nn.Linear(64, 256, bias=False)
        self.blocks = nn.ModuleList([Block() for _ in range(2)])
        self.last = nn.Linear(64, 64)
        if tied:
            self.head.weight = self.embedding.weight


def block(model: Model, index: int) -> Block:
    found = model.blocks[index]
    assert isinstance(found, Block)
    return found


BODY = ("blocks.0.qkv", "blocks.0.out", "blocks.1.qkv", "blocks.1.out")


def int8_names(module: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, m in module.named_modules() if type(m) is Int8Linear)


def test_swap_is_in_place_and_reversible() -> None:
    model = Model()
    before = copy.deepcopy(model.state_dict())
    parameters = {name: id(p) for name, p in model.named_parameters()}
    objects = {name: id(m) for name, m in model.named_modules()}
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    seen: list[str] = []
    block(model, 0).qkv.register_forward_hook(lambda *_: seen.append("hook"))

    report = swap_linears(model)
    assert report.swapped == int8_names(model) == (*BODY, "last")
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert {name: id(m) for name, m in model.named_modules()} == objects
    assert list(model.state_dict()) == list(before)
    block(model, 0).qkv(torch.randn(2, 64))
    assert seen == ["hook"]

    assert restore(model) == report.swapped
    assert int8_names(model) == ()
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(type(m) is nn.Linear for m in model.modules() if isinstance(m, nn.Linear))


@pytest.mark.parametrize("tied", [True, False])
def test_the_output_layer_is_left_alone(tied: bool) -> None:
    model = Model(tied)
    report = swap_linears(model)
    assert report.skipped["head"].startswith("output layer")
    assert "last" in report.swapped
    assert (model.head.weight is model.embedding.weight) == tied


def test_output_layer_can_be_named_or_none() -> None:
    assert "head" in swap_linears(Model(), output_layer="head").skipped
    assert set(swap_linears(Model(), output_layer=None).swapped) == {"head", *BODY, "last"}
    with pytest.raises(ValueError, match="output_layer='decoder' matches no layer; there are: head, blocks"):
        swap_linears(Model(), output_layer="decoder")


def test_names_by_pattern() -> None:
    model = Model()
    assert swap_linears(model, include="blocks.*", exclude=["*.out"]).swapped == ("blocks.0.qkv", "blocks.1.qkv")
    assert swap_linears(model, filter=lambda name, m: m.out_features == 192).skipped["last"] == "refused by filter"
    for argument in ("include", "exclude"):
        with pytest.raises(ValueError, match=rf"{argument}='layers\.\*' matches no layer; there are: head"):
            swap_linears(model, **{argument: ["layers.*"]})  # type: ignore[arg-type]


def test_overrides_by_pattern() -> None:
    model = Model()
    overrides = {"*.out": {"grad_weight": "high"}, "blocks.1.*": {"save_inputs": "high"}, "last": None}
    report = swap_linears(model, gradient_rounding="stochastic", overrides=overrides)
    products = {name: m.products for name, m in model.named_modules() if isinstance(m, Int8Linear)}
    base = Products(gradient_rounding="stochastic")
    assert products == {
        "blocks.0.qkv": base,
        "blocks.0.out": replace(base, grad_weight="high"),
        "blocks.1.qkv": replace(base, save_inputs="high"),
        "blocks.1.out": replace(base, grad_weight="high", save_inputs="high"),
    }
    assert report.skipped["last"] == "None in overrides"
    assert report.overridden == {name: own for name, own in products.items() if own != base}
    assert "  but blocks.0.out: int8 (forward, grad_input, gradients rounded at random), by overrides" in str(report)
    assert swap_linears(model, overrides={"*": None, "*.qkv": {}}).swapped == ("blocks.0.qkv", "blocks.1.qkv")
    assert swap_linears(model).overridden == {}


@pytest.mark.parametrize(
    ("overrides", "error", "said"),
    [
        ({"*.down": None}, ValueError, r"overrides='\*\.down' matches no layer; there are: head"),
        (
            {"head": {"forward": "fp8"}},
            ValueError,
            r"overrides\['head'\]=.* forward must be 'int8', 'hadamard' or 'high'",
        ),
        ({"head": {"grad_wieght": "high"}}, TypeError, r"overrides\['head'\]=.*'grad_wieght'"),
        ({"head": "high"}, TypeError, r"overrides\['head'\]='high' must be None or settings"),
    ],
)
def test_bad_overrides(overrides: Any, error: type[Exception], said: str) -> None:
    model = Model()
    with pytest.raises(error, match=said):
        swap_linears(model, overrides=overrides)
    assert int8_names(model) == ()


def test_convolutions_of_few_channels_are_listed() -> None:
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.ConvTranspose2d(64, 64, 3), nn.Linear(64, 64), nn.Linear(64, 64))
    assert str(swap_linears(model)).splitlines() == [
        "int8 (forward, grad_input, grad_weight) in 1 of 3 layers: 2",
        "  not 0: a convolution of fewer than 16 channels",
        "  not 3: output layer (output_layer=None takes it too)",
        "  not 1: transposed convolutions run in high precision",
    ]


def test_a_later_call_replaces_an_earlier_one() -> None:
    model = Model()
    first = swap_linears(model)
    assert swap_linears(model) == first
    narrower = swap_linears(model, include="blocks.0.*", grad_weight="high")
    assert int8_names(model) == narrower.swapped == ("blocks.0.qkv", "blocks.0.out")
    qkv = block(model, 0).qkv
    assert isinstance(qkv, Int8Linear)
    assert qkv.products == Products(grad_weight="high")
    assert type(model.head) is nn.Linear


def test_layers_that_int8_cannot_serve() -> None:
    model = nn.Module()
    model.double = nn.Linear(64, 64, dtype=torch.float64)  # type: ignore[assignment]
    model.parametrised = parametrizations.weight_norm(nn.Linear(64, 64))
    model.own = Int8Linear(64, 64, forward="high")
    model.patched = nn.Linear(64, 64)
    model.patched.forward = lambda input: input  # type: ignore[method-assign]
    model.small = nn.Linear(31, 64)
    model.body = nn.Linear(64, 64)
    model.end = nn.Linear(64, 100)
    report = swap_linears(model)
    assert report.swapped == ("body",)
    for name, reason in {
        "double": "weight is torch.float64",
        "parametrised": "ParametrizedLinear is a subclass of nn.Linear",
        "own": "was built as Int8Linear",
        "patched": "its forward was replaced",
        "small": "fewer than min_features=32",
        "end": "output layer",
    }.items():
        assert reason in report.skipped[name], name
    assert model.own.products == Products(forward="high")
    assert "small" in swap_linears(model, min_features=16).swapped


def test_nothing_left_to_swap_raises_and_says_what_is_there() -> None:
    with pytest.raises(NothingToSwap, match=r"nothing to swap in Sequential: .*\n  0: the model's last conv.*\nFor"):
        swap_linears(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()))
    with pytest.raises(NothingToSwap, match=r"It has\n  0: output layer \(output_layer=None .*\nFor models"):
        swap_linears(nn.Sequential(nn.Linear(64, 64)))
    with pytest.raises(ValueError, match="forward must be 'int8', 'hadamard' or 'high', got 'fp8'"):
        swap_linears(Model(), forward="fp8")  # type: ignore[arg-type]


def test_a_call_that_raises_changes_nothing() -> None:
    model = Model()
    swap_linears(model)
    with pytest.raises(ValueError, match="nothing to swap"):
        swap_linears(model, filter=lambda *_: False)
    assert int8_names(model) == (*BODY, "last")


def test_layers_that_were_parametrized_after_the_swap() -> None:
    """They compute with what the parametrization gives; to turn them back it has to go first."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 10))
    swap_linears(model)
    parametrizations.weight_norm(model[0])
    assert model[0](torch.randn(3, 64)).shape == (3, 64)
    assert swap_linears(model).swapped == ("0",)
    for call in (restore, lambda m: swap_linears(m, output_layer=None, exclude="0", min_features=1)):
        with pytest.raises(ValueError, match=r"0: parametrized after it became an int8 layer.*remove_parametrizations"):
            call(model)
    parametrize.remove_parametrizations(model[0], "weight")
    assert restore(model) == ("0",)
    assert type(model[0]) is nn.Linear


def test_weights_that_a_strategy_has_taken_apart_are_swapped_too() -> None:
    """DeepSpeed's stage 3 leaves parameters of no elements in the model; what counts is what the layer takes."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 10))
    for p in model.parameters():
        p.data = torch.empty(0)
    assert swap_linears(model).swapped == ("0",)


def test_a_shared_module_is_swapped_once() -> None:
    shared = nn.Linear(64, 64)
    model = nn.Sequential(shared, shared, nn.Linear(64, 64))
    assert swap_linears(model).swapped == ("0",)
    assert restore(model) == ("0",)


def test_report_is_a_few_lines() -> None:
    lines = str(swap_linears(Model())).splitlines()
    assert lines == [
        "int8 (forward, grad_input, grad_weight) in 5 of 8 layers: blocks.*.qkv (2), blocks.*.out (2), last",
        "  not head: output layer (output_layer=None takes it too)",
        "  not blocks.*.gate (2): fewer than min_features=32 features",
    ]
