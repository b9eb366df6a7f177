"""``lowbit plan``: what it prints, how it ends, and what it says of bad arguments."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from lowbit_lightning import cli, memory
from lowbit_lightning.memory.batch import parse_batch
from lowbit_lightning.optim.options import parse_bytes

MODEL = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self, width=256):
            super().__init__()
            self.layers = nn.Sequential(*[nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(4)])
        def forward(self, x):
            assert x.is_floating_point()
            return self.layers(x)

    class Later(nn.Module):
        def configure_model(self):
            self.net = Net()

    def wide(width):
        return Net(width)

    def number():
        return 3

    def bad():
        raise ZeroDivisionError

    size = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "planned_net.py").write_text("\n".join(line[4:] for line in MODEL.splitlines()))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "planned_net", raising=False)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = cli.main(["plan", *arguments])
    return status, *capsys.readouterr()


def test_json_is_what_plan_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = ["--world-size", "8", "--precision", "int8-mixed", "--optimizer", "Lion", "--block-size", "64"]
    status, out, err = run(capsys, "planned_net:Net", *told, "--batch", "32x256", "--json")
    assert (status, err) == (0, "")
    with torch.device("meta"):
        model = sys.modules["planned_net"].Net()
    batch = torch.empty(32, 256, device="meta")
    kind, precision = "Lion", "int8-mixed"
    expected = memory.plan(
        model,
        world_size=8,
        strategy="sharded",
        precision=precision,  # type: ignore[arg-type]
        optimizer=kind,
        block_size=64,
        batch=batch,
    )
    assert json.loads(out) == expected.to_dict()


def test_a_model_that_makes_its_layers_later(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = [json.loads(run(capsys, f"planned_net:{name}", "--json")[1]) for name in ("Net", "Later")]
    assert found[0] == found[1]


def test_a_table_and_advice_where_it_does_not_fit(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "planned_net:Net", "--bits", "32", "--memory", "3MB")
    assert status == 1
    assert re.search(r"^optimizer states +2,1\d\d,\d\d\d ", out, re.MULTILINE)
    assert "does not fit in 2.86 MiB" in out
    assert "bits=8: saves" in out
    assert run(capsys, "planned_net:Net", "--memory", "3MB")[0] == 0
    status, out, _ = run(capsys, "planned_net:Net", "--bits", "32", "--memory", "3MB", "--json")
    found = json.loads(out)
    assert (status, found["fits"], found["memory"]) == (1, False, 3_000_000)
    assert found["advice"][0]["saves"] > 0


def test_each_option_arrives(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def settings(*arguments: str) -> dict:
        return json.loads(run(capsys, "planned_net:Net", "--json", *arguments)[1])

    plain = settings()
    assert plain["settings"]["strategy"] == "single"
    assert settings("--world-size", "2")["settings"]["strategy"] == "sharded"
    assert settings("--bits", "none")["settings"]["bits"] is None
    assert settings("--min-size", "99999")["states"] > 3 * plain["states"]
    master = settings("--precision", "bf16-true", "--master", "bf16+8")
    assert master["state_parts"]["master remainders"] == master["parameters"] // 2
    paged = settings("--paged", "disk", "--resident", "64KiB")
    assert plain["state_parts"]["codes"] < paged["paged_out"]["disk"] < 1.05 * plain["state_parts"]["codes"]
    assert paged["settings"]["resident"] == "64KiB"
    assert list(settings("--paged", "host")["paged_out"]) == ["host memory"]
    two = ("--world-size", "2")
    assert settings(*two, "--all-gather", "int8")["communication"] != settings(*two)["communication"]
    ranks = ("--world-size", "4", "--replicas", "2", "--zero2", "--accumulate", "3", "--activation-checkpointing")
    assert settings(*ranks)["settings"] == {
        **{"world_size": 4, "strategy": "sharded", "precision": "32-true", "optimizer": "AdamW", "bits": 8},
        **{"reshard_after_forward": False, "replicas": 2, "accumulate": 3, "activation_checkpointing": True},
    }


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["planned_net"], "model must be package.module:factory, got 'planned_net'"),
        (["nowhere_net:Net"], "cannot import nowhere_net"),
        (
            ["planned_net:Nett"],
            r"has no callable 'Nett'; of its own it has \['Later', 'Net', 'bad', 'number', 'wide'\]",
        ),
        (["planned_net:size"], "has no callable 'size'"),
        (["planned_net:wide"], "callable without arguments .*write a function"),
        (["planned_net:number"], "must make a torch.nn.Module, got int"),
        (["planned_net:Net", "--memory", "80 Gig"], "memory must be a number of bytes, or one with a unit .*'80 Gig'"),
        (["planned_net:Net", "--batch", "8by4"], "batch must be shapes with dtypes.*'8by4'"),
        (["planned_net:Net", "--batch", "8x4:double4"], "batch must be shapes with dtypes.*'8x4:double4'"),
        (
            ["planned_net:Net", "--batch", "8,4:int64"],
            "batch='8,4:int64' has '8', one dimension without a dtype: commas",
        ),
        (["planned_net:Net", "--batch", "8x4"], r"batch=float32 \[8, 4\] could not be run without values"),
        (["planned_net:Net", "--margin", "much"], "margin='much': could not convert"),
        (["planned_net:Net", "--zero2"], "reshard_after_forward=False needs strategy='sharded', got 'single'"),
        (["planned_net:Net", "--optimizer", "Adammm"], "optimizer must be one of"),
        (["planned_net:Net", "--world-size", "0"], "world_size must be a whole number"),
    ],
)
def test_errors_name_the_argument(
    arguments: list[str], says: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("lowbit plan: ")
    assert re.search(says, err), err


def test_a_mistake_inside_the_factory_is_shown_whole(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "planned_net:bad")
    assert (status, out) == (2, "")
    assert re.search(r"planned_net.py\", line \d+, in bad", err), err
    assert "making it on the meta device raised ZeroDivisionError" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GiB", 80 * 2**30), ("80GB", 80 * 10**9), ("1.5 tib", 3 * 2**39), ("80e9", 80 * 10**9), ("512B", 512)],
)
def test_bytes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


def test_batches() -> None:
    tokens, features = parse_batch("8x1024:int64, 3:bfloat16")
    assert (tokens.shape, tokens.dtype, tokens.is_meta) == ((8, 1024), torch.int64, True)
    assert (features.shape, features.dtype) == ((3,), torch.bfloat16)
    alone, named = parse_batch("8x4"), parse_batch("input_ids=8x16:int64, mask=8x16:bool")
    assert (alone.shape, alone.dtype) == ((8, 4), torch.float32)
    assert {name: (x.shape, x.dtype) for name, x in named.items()} == {
        "input_ids": ((8, 16), torch.int64),
        "mask": ((8, 16), torch.bool),
    }
