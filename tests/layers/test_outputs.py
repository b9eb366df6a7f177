"""Which layers are taken for a model's outputs, on the kinds of models that a simple rule gets wrong."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor, nn

from lowbit_lightning.convert import swap_linears
from lowbit_lightning.layers.outputs import output_layers
from lowbit_lightning.layers.select import stacked

WIDTH, VOCABULARY, CLASSES = 64, 100, 10


class Block(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)


def module(**parts: nn.Module) -> nn.Module:
    """A module that holds these in this order."""
    built = nn.Module()
    for name, part in parts.items():
        built.add_module(name, part)
    return built


def blocks(count: int = 2, width: int = WIDTH) -> nn.ModuleList:
    return nn.ModuleList(Block(width) for _ in range(count))


def gpt(width: int = WIDTH, vocabulary: int = VOCABULARY, tied: bool = False) -> nn.Module:
    built = module(
        head=nn.Linear(width, vocabulary, bias=False),
        tokens=nn.Embedding(vocabulary, width),
        blocks=blocks(width=width),
    )
    if tied:
        built.head.weight = built.tokens.weight  # type: ignore[union-attr]
    return built


def vit(width: int = WIDTH, classes: int = CLASSES) -> nn.Module:
    return module(
        patches=nn.Conv2d(3, width, 4),
        blocks=blocks(width=width),
        norm=nn.LayerNorm(width),
        head=nn.Linear(width, classes),
    )


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def transformers_like(tied: bool = False) -> nn.Module:
    """Says by a method what gives its outputs."""
    body = module(tokens=nn.Embedding(VOCABULARY, WIDTH), h=blocks(), projection=nn.Linear(WIDTH, 2 * WIDTH))
    built: Any = module(transformer=body, lm_head=nn.Linear(2 * WIDTH, VOCABULARY), extra=nn.Linear(WIDTH, 50))
    built.get_output_embeddings = lambda: built.lm_head
    return built


def with_classes() -> nn.Module:
    """As many classes as some inner layer takes features: only its settings tell."""
    built = module(body=blocks(), head=nn.Linear(WIDTH, 4 * WIDTH), late=nn.Linear(WIDTH, WIDTH))
    built.config = SimpleNamespace(num_labels=4 * WIDTH)  # type: ignore[assignment]
    return built


def unet() -> nn.Module:
    def level(channels: int) -> nn.Module:
        return module(time=nn.Linear(256, channels), conv=nn.Conv2d(channels, channels, 3), attention=Block(channels))

    return module(
        time=mlp(WIDTH, 256, 256),
        down=nn.ModuleList([level(64), level(128)]),
        mid=level(128),
        up=nn.ModuleList([level(128), level(64)]),
        out=nn.Conv2d(64, 3, 3),
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "an MLP": (lambda: mlp(784, 128, 128, 10), "4"),
    "an MLP whose layers are all alike": (lambda: mlp(64, 64, 64), "2"),
    "wrapped in a LightningModule": (lambda: module(net=mlp(784, 128, 10), metric=nn.Identity()), "net.2"),
    "a GPT whose head is defined first": (gpt, "head"),
    "of bytes, as many as hidden features": (lambda: gpt(64, 256), "head"),
    "tied": (lambda: gpt(tied=True), "head"),
    "tied, with a head for values outside": (
        lambda: module(policy=gpt(tied=True), value=nn.Linear(WIDTH, 1)),
        "policy.head, value",
    ),
    "a ViT": (vit, "head"),
    "with two heads": (
        lambda: module(policy=nn.Linear(WIDTH, 6), value=nn.Linear(WIDTH, 1), body=blocks()),
        "policy, value",
    ),
    "with heads in a list": (
        lambda: module(body=blocks(), heads=nn.ModuleList([nn.Linear(WIDTH, 5), nn.Linear(WIDTH, 7)])),
        "heads.* (2)",
    ),
    "with a head of several layers": (lambda: module(body=blocks(), head=mlp(WIDTH, 4 * WIDTH, CLASSES)), "head.2"),
    "with a head of its own class": (
        lambda: module(
            body=module(blocks=blocks(), pooler=nn.Linear(WIDTH, WIDTH)),
            classifier=module(dense=nn.Linear(WIDTH, WIDTH), out=nn.Linear(WIDTH, 3)),
        ),
        "classifier.out",
    ),
    "a distillation pair, the teacher last": (
        lambda: module(student=vit(), teacher=vit(2 * WIDTH)),
        "student.head, teacher.head",
    ),
    "a distillation pair with a projection": (
        lambda: module(student=vit(), projection=nn.Linear(WIDTH, 2 * WIDTH), teacher=vit(2 * WIDTH)),
        "student.head, teacher.head",
    ),
    "dueling networks and their targets": (
        lambda: module(
            **{
                n: module(body=mlp(8, WIDTH, WIDTH), value=nn.Linear(WIDTH, 1), advantage=nn.Linear(WIDTH, 4))
                for n in ("net", "target")
            }
        ),
        "net.value, net.advantage, target.value, target.advantage",
    ),
    "an ensemble": (lambda: module(members=nn.ModuleList(mlp(32, WIDTH, 5) for _ in range(3))), "members.*.2 (3)"),
    "Transformers'": (transformers_like, "lm_head"),
    "Transformers' in a LightningModule": (lambda: module(model=transformers_like()), "model.lm_head"),
    "by the number of classes": (with_classes, "head"),
    "with a pooler as wide as there are positions": (
        lambda: module(
            positions=nn.Embedding(WIDTH, WIDTH),
            blocks=blocks(),
            pooler=nn.Linear(WIDTH, WIDTH),
            classifier=nn.Linear(WIDTH, 3),
        ),
        "classifier",
    ),
    "a CNN": (
        lambda: module(
            conv=nn.Conv2d(3, 64, 3), layer1=nn.Sequential(nn.Conv2d(64, 512, 3)), fc=nn.Linear(512, CLASSES)
        ),
        "fc",
    ),
    "a UNet, whose output is a convolution": (unet, "none"),
    "a body alone": (blocks, "none"),
}


def linears(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


@pytest.mark.parametrize("name", MODELS)
def test_output_layers_are_known(name: str) -> None:
    make, expected = MODELS[name]
    model = make()
    outputs = output_layers(model, linears(model))
    assert outputs.doubtful == {}
    assert stacked(n for n in linears(model) if n in outputs.known) == expected


def gan() -> nn.Module:
    return module(generator=mlp(32, WIDTH, 784), discriminator=mlp(784, WIDTH, 1))


def test_what_only_another_part_takes_is_doubtful() -> None:
    model = gan()
    outputs = output_layers(model, linears(model))
    assert outputs.known == {"discriminator.2"}
    assert outputs.doubtful == {"generator.2": "nothing in generator takes what it gives"}
    with pytest.warns(
        UserWarning, match=r"not sure which layers of Module are output layers.*generator\.2 \(nothing in"
    ):
        report = swap_linears(gan())
    assert report.swapped == ("generator.0", "discriminator.0")
    assert "perhaps an output layer" in report.skipped["generator.2"]
    assert swap_linears(gan(), output_layer="*.2").swapped == report.swapped


@pytest.mark.parametrize(
    ("make", "guessed"),
    [
        (lambda: module(a=nn.Linear(WIDTH, WIDTH), b=nn.Linear(WIDTH, WIDTH)), "b"),
        (lambda: module(a=nn.Linear(784, 32), b=nn.Linear(32, 784)), "b"),
        (Block, "down"),
    ],
)
def test_a_guess_is_doubtful(make: Callable[[], nn.Module], guessed: str) -> None:
    model = make()
    outputs = output_layers(model, linears(model))
    assert outputs.known == set()
    assert outputs.doubtful == {guessed: "the last linear layer that the model defines"}


def test_methods_of_another_meaning_are_ignored() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = blocks(), nn.Linear(WIDTH, 5)

        def get_classifier(self, kind: str) -> str:
            return kind

        def get_output_embeddings(self) -> Tensor:
            raise NotImplementedError

    model = Odd()
    assert output_layers(model, linears(model)).known == {"head"}


def test_timm_gives_a_tuple_for_two_heads() -> None:
    model = module(
        body=blocks(), head=nn.Linear(WIDTH, 5), pool=nn.Linear(WIDTH, 2 * WIDTH), dist=nn.Linear(2 * WIDTH, 5)
    )
    model.get_classifier = lambda: (model.head, model.dist)  # type: ignore[assignment]
    assert output_layers(model, linears(model)).known == {"head", "dist"}
