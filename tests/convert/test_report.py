"""What a run says of its layers, word for word, on the models that people train."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.transformers_like import GPT2
from torch import Tensor, nn

from lowbit_lightning.convert import NothingToSwap, swap_linears

ALL = "int8 (forward, grad_input, grad_weight)"
HEAD = "output layer (output_layer=None takes it too)"


def named(**parts: nn.Module) -> nn.Module:
    built = nn.Module()
    for name, part in parts.items():
        built.add_module(name, part)
    return built


def resnet18() -> nn.Module:
    """Shapes and names of torchvision's, but for fewer channels."""

    def block(channels: int) -> nn.Module:
        convolution = nn.Conv2d(channels, channels, 3)
        return named(conv1=convolution, bn1=nn.BatchNorm2d(channels), conv2=nn.Conv2d(channels, channels, 3))

    layers = {f"layer{i}": nn.Sequential(block(4 * i), block(4 * i)) for i in (1, 2, 4)}
    return named(conv1=nn.Conv2d(3, 64, 7), bn1=nn.BatchNorm2d(64), **layers, fc=nn.Linear(512, 1000))


def convnext() -> nn.Module:
    def block(width: int) -> nn.Module:
        inverted = nn.Sequential(
            nn.Conv2d(width, width, 7, groups=width),
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
        )
        return named(block=inverted)

    stages = nn.Sequential(*(nn.Sequential(block(width), block(width)) for width in (64, 96)))
    head = nn.Sequential(nn.LayerNorm(96), nn.Flatten(1), nn.Linear(96, 1000))
    return named(features=stages, classifier=head)


def vit(width: int) -> nn.Module:
    blocks = nn.ModuleList(
        named(
            norm=nn.LayerNorm(width),
            attention=nn.MultiheadAttention(width, 4),
            up=nn.Linear(width, 4 * width),
            down=nn.Linear(4 * width, width),
        )
        for _ in range(2)
    )
    return named(patches=nn.Conv2d(3, width, 4), blocks=blocks, head=nn.Linear(width, 100))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.zeros(4, 64, 256))
        self.router = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Any: ...


REPORTS: dict[str, tuple[nn.Module, str]] = {
    "GPT-2": (
        GPT2(),
        f"""\
{ALL} in 8 of 9 layers: transformer.h.*.attn.c_attn (2), transformer.h.*.attn.c_proj (2), \
transformer.h.*.mlp.c_fc (2), transformer.h.*.mlp.c_proj (2)
  not lm_head: {HEAD}""",
    ),
    "ConvNeXt": (
        convnext(),
        f"""\
{ALL} in 8 of 13 layers: features.*.*.block.* (8)
  not features.*.*.block.0 (4): grouped and depthwise convolutions run in high precision
  not classifier.2: {HEAD}""",
    ),
    "ResNet-18": (
        resnet18(),
        f"""\
{ALL} in 4 of 14 layers: layer4.*.conv1 (2), layer4.*.conv2 (2)
  not conv1, layer1.*.conv1 (2), layer1.*.conv2 (2), layer2.*.conv1 (2), layer2.*.conv2 (2): a convolution of \
fewer than 16 channels
  not fc: {HEAD}""",
    ),
    "a distillation pair": (
        named(student=vit(64), teacher=vit(128)),
        f"""\
{ALL} in 16 of 20 layers: student.blocks.*.attention (2), student.blocks.*.attention.out_proj (2), \
student.blocks.*.up (2), student.blocks.*.down (2), teacher.blocks.*.attention (2), \
teacher.blocks.*.attention.out_proj (2), teacher.blocks.*.up (2), teacher.blocks.*.down (2)
  not student.patches, teacher.patches: a convolution of fewer than 16 channels
  not student.head, teacher.head: {HEAD}""",
    ),
    "two heads": (
        named(
            policy=nn.Linear(64, 6),
            value=nn.Linear(64, 1),
            body=nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64)),
        ),
        f"""\
{ALL} in 2 of 4 layers: body.* (2)
  not policy, value: {HEAD}""",
    ),
    "a mixture of experts": (
        named(blocks=nn.ModuleList([Experts()]), proj=nn.Linear(64, 64), head=nn.Linear(64, 500)),
        f"""\
{ALL} in 1 of 3 layers: proj
  not blocks.0.router: fewer than min_features=32 features
  not head: {HEAD}
  not blocks.0: matrices that a module holds itself run in high precision: they are no layers""",
    ),
}

INSTEAD = """\
For models like this, precision='bf16-mixed' is the fast choice; 8-bit optimizers (lowbit_lightning.optim), \
strategy='lowbit_sharded' and paging serve any model."""
REFUSALS: dict[str, tuple[nn.Module, str]] = {
    "an LSTM": (
        named(tokens=nn.Embedding(500, 64), rnn=nn.LSTM(64, 128), head=nn.Linear(128, 500)),
        f"""\
nothing to swap in Module: no layer would run in int8. It has
  head: {HEAD}
  rnn: recurrent weights run in high precision: one fused kernel reads them all
{INSTEAD}""",
    ),
    "only norms": (
        nn.LayerNorm(64),
        f"""\
nothing to swap in LayerNorm: no layer would run in int8. It has
  no layer with a matrix
{INSTEAD}""",
    ),
}


@pytest.mark.parametrize("name", REPORTS)
def test_a_report_says_what_runs_in_int8_and_what_does_not(name: str) -> None:
    model, said = REPORTS[name]
    assert str(swap_linears(model)) == said


@pytest.mark.parametrize("name", REFUSALS)
def test_a_model_with_nothing_to_swap_gets_to_know_what_it_has(name: str) -> None:
    model, said = REFUSALS[name]
    with pytest.raises(NothingToSwap) as caught:
        swap_linears(model)
    assert str(caught.value) == said
