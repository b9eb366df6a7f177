"""examples/vision.py: its images and their truth, its measures, its verdict, and one small run of the whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import vision
from PIL import Image
from torch import nn
from vision_data import Folder, Scenes
from vision_training import TASKS, Result, Score, in_low_bits

from lowbit_lightning import convert


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return Scenes()


@pytest.fixture
def blank() -> Scenes:
    """Each column of its one photograph has a value of its own, and each digit is a class of its own."""
    scenes = Scenes()
    scenes.photographs = [torch.arange(128.0).expand(3, 64, 128)]
    scenes.written = torch.arange(len(scenes.written))
    return scenes


@pytest.mark.parametrize("held_out", [False, True])
def test_held_out_scenes_share_nothing_with_training(blank: Scenes, held_out: bool) -> None:
    found = blank.classification(200, seed=1, held_out=held_out)
    assert ((found.targets % 5 == 0) == held_out).all()
    columns = found.images[:, 0, :, 0][found.images[:, 0, :, 0] % 1 == 0]  # where nothing was written
    assert ((columns >= 96) == held_out).all()
    assert columns.max() <= 128 - 32


def test_the_truth_of_a_pixel_is_the_digit_written_there(scenes: Scenes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "photographs", [torch.full((3, 64, 128), 2.0)])  # no digit has this colour
    found = scenes.segmentation(50, seed=3)
    written = (found.images < 2).all(1)
    assert written[found.targets < 10].all()
    assert (found.targets[~written] == 10).all()
    shown = [set(target.unique().tolist()) - {10} for target in found.targets]
    assert {len(digits) for digits in shown} == {1, 2}  # twice the same digit, or one behind the other: one
    again, other = scenes.segmentation(50, seed=3), scenes.segmentation(50, seed=4)
    assert torch.equal(found.images, again.images)
    assert torch.equal(found.targets, again.targets)
    assert not torch.equal(found.images, other.images)


def test_a_folder_of_images(tmp_path: Path) -> None:
    for name, colour in (("blue", (0, 0, 255)), ("red", (255, 0, 0))):
        (tmp_path / name).mkdir()
        for number in range(3):
            Image.new("RGB", (40, 30 + number), colour).save(tmp_path / name / f"{number}.png")
    data = Folder(tmp_path, 16).data(False, 20, held_out=10, seed=1)
    assert data.classes == ("blue", "red")
    assert (len(data.training), len(data.held_out)) == (20, 1)  # a fifth of six
    for images in (data.training, data.held_out):
        assert images.images.shape[1:] == (3, 16, 16)
        assert torch.equal(images.images[:, 0, 0, 0] > 0, images.targets == 1)
    with pytest.raises(SystemExit, match="at least two folders"):
        Folder(tmp_path / "red", 16)
    (tmp_path / "green").mkdir()
    with pytest.raises(SystemExit, match="green has no image"):
        Folder(tmp_path, 16)


def test_quality_is_accuracy_or_mean_iou() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(6, 4, 5, 5, generator=generator), torch.randint(0, 3, (6, 5, 5), generator=generator)
    pixels, images = Score(4), Score(4)
    for half in (slice(0, 3), slice(3, 6)):
        pixels.add(logits[half], targets[half])
        images.add(logits[half, :, 0, 0], targets[half, 0, 0])
    predicted = logits.argmax(1)
    both = [
        ((predicted == c) & (targets == c)).sum().item() / ((predicted == c) | (targets == c)).sum().item()
        for c in range(4)
    ]
    assert pixels.quality == pytest.approx(100 * sum(both) / 4)
    assert pixels.loss == pytest.approx(nn.functional.cross_entropy(logits, targets).item())
    right = (predicted == targets)[:, 0, 0].double().mean().item()
    assert images.quality == pytest.approx(100 * right)
    assert torch.equal(pixels.predictions, predicted)


def test_what_of_each_model_is_in_low_bits() -> None:
    models = {name: task.small(10, 32) for name, task in TASKS.items()}
    x = torch.randn(2, 3, 32, 32)
    assert {name: tuple(model(x).shape) for name, model in models.items()} == {
        **dict.fromkeys(("vit", "resnet", "convnext"), (2, 10)),
        "unet": (2, 10, 32, 32),
    }
    assert {name for name, model in models.items() if in_low_bits(model, "nf4") is not None} == {"vit", "convnext"}
    skipped = convert.swap_linears(models["convnext"]).skipped
    assert [name for name in skipped if "depthwise" in name] == [f"body.{i}.depthwise" for i in (1, 2, 4, 5)]
    first_and_last = {"resnet": {"stem.0", "fc"}, "unet": {"down.0.0", "head"}, "vit": {"patches.0", "head"}}
    for name, layers in first_and_last.items():
        assert set(convert.swap_linears(models[name]).skipped) - {""} == layers  # "": the vit's positions


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--models vgg", "vgg: there are vit"),
        ("--models unet --images folder", "a folder of images says nothing about their pixels"),
        ("--steps 3", "--steps 4"),
        ("--size 16", "scenes need 32 pixels"),
    ],
)
def test_bad_arguments_are_named(arguments: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        vision.main(arguments.split())
    assert said in capsys.readouterr().err


def test_more_than_a_point_below_fp32_is_a_failure() -> None:
    def result(quality: float) -> dict[str, Result]:
        return {"fp32": Result([90.0, 92.0]), "int8-mixed": Result([quality, quality])}

    assert vision.complaints({"vit": result(90.1)}) == []
    assert vision.complaints({"vit": result(91.0), "unet": result(89.5)}) == [
        "unet in int8-mixed is 1.5 points below fp32; at most 1.0 is allowed"
    ]


def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = f"--models vit,unet --seeds 1 --steps 4 --batch 2 --held-out 8 --output {tmp_path}"
    assert vision.main(options.split()) in (0, 1)
    results = json.loads((tmp_path / "results.json").read_text())
    trained, used = results["trained"], results["used"]
    assert list(trained["vit"]) == ["fp32", "8-bit optimizer", "int8-mixed"]
    assert list(used["vit"]) == ["fp32", "int8 products", "int8", "nf4", "int3", "int2"]
    assert list(used["unet"]) == ["fp32", "int8 products"]  # it has no linear layer
    for ways in trained.values():
        sizes = [way["bytes"]["states"] for way in ways.values()]
        assert sizes[1] == sizes[2] < 0.35 * sizes[0]
        assert ways["int8-mixed"]["loss"] != ways["fp32"]["loss"]
    weights = [way["bytes"]["weights"] for way in used["vit"].values()]
    assert weights[0] == weights[1]
    assert weights[1:] == sorted(weights[1:], reverse=True)
    for picture in ("classes.png", "masks.png"):
        with Image.open(tmp_path / picture) as image:
            assert image.width < 1100
    assert "| unet | int8-mixed |" in capsys.readouterr().out
