"""``lowbit plan --config``: it counts what ``memory.plan`` counts for the same model, batch and options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.configs import write

from lowbit_lightning import cli, memory, optim
from lowbit_lightning.experiments import GPT


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    return tmp_path


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert cli.main(["plan", "--config", "small.yaml", "--json", *arguments]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def expected(**options: Any) -> dict[str, Any]:
    with torch.device("meta"):
        model = GPT(32, 1, 2)
        batch = torch.empty(2, 17, dtype=torch.int64)
    optimizer = optim.AdamW(model.parameters(), min_size=0)
    found = memory.plan(model, memory.Run(**{"optimizer": optimizer, "batch": batch, **options})).to_dict()
    return found


BYTES = ("parameters", "gradients", "states", "gathered", "reduction", "activations")


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((), {"precision": "int8-mixed"}),
        (("trainer.precision=bf16-mixed",), {"precision": "bf16-mixed"}),
        (
            ("trainer.strategy=lowbit_sharded", "trainer.devices=4"),
            {"precision": "int8-mixed", "world_size": 4, "strategy": "sharded"},
        ),
        (("trainer.devices=2", "--world-size", "8"), {"precision": "int8-mixed", "world_size": 8, "strategy": "ddp"}),
        (("trainer.accumulate_grad_batches=4",), {"precision": "int8-mixed", "accumulate": 4}),
    ],
)
def test_a_config_is_planned(
    arguments: tuple[str, ...], options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    found, wanted = told(capsys, *arguments), expected(**options)
    assert {name: found[name] for name in BYTES} == {name: wanted[name] for name in BYTES}
    assert found["activations"] > 0
    assert found["settings"]["loss"] == "training_step"


def test_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--config", "small.yaml", "trainer.strategy=fsdp"]) == 2
    assert cli.main(["plan", "--config", "small.yaml", "model.widht=3"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "lowbit plan: trainer.strategy: a plan counts auto, ddp and lowbit_sharded, got 'fsdp'",
        "lowbit plan: model.init_args.widht (command line): GPT has no argument 'widht'; did you mean width?",
    ]
