"""What ``DeepSpeedStrategy`` and ``check_deepspeed`` say to arguments and configurations."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lowbit_lightning import optim
from lowbit_lightning.strategies import DeepSpeedStrategy, check_deepspeed
from lowbit_lightning.strategies.deepspeed import checkpoints
from lowbit_lightning.strategies.deepspeed.groups import SplitGroups

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the deepspeed extra is for Linux")


@pytest.mark.parametrize("found", [True, "stage 2"])
def test_a_section_that_is_none_is_named(found: Any) -> None:
    for refuse in (lambda c: DeepSpeedStrategy(config=c), check_deepspeed):
        with pytest.raises(TypeError, match="config's zero_optimization must be a dict, got"):
            refuse({"zero_optimization": found})


def test_an_empty_section_is_none() -> None:
    config: Any = DeepSpeedStrategy(config={"zero_optimization": None}).config
    assert config["zero_optimization"] == {"stage": 2}
    DeepSpeedStrategy(config={"zero_optimization": {"offload_optimizer": None}}, paged=True)


def test_a_config_holds_what_json_can() -> None:
    with pytest.raises(TypeError, match=r"a dtype as a string, such as 'bfloat16'.*dtype"):
        DeepSpeedStrategy(config={"communication_data_type": torch.bfloat16})


def test_the_variable_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    monkeypatch.setenv("PL_DEEPSPEED_CONFIG_PATH", str(tmp_path / "c.json"))
    with pytest.raises(ValueError, match=r"the file of PL_DEEPSPEED_CONFIG_PATH holds .* \['offload_optimizer'\] into"):
        L.Trainer(strategy="lowbit_deepspeed_stage_2_offload", accelerator="cpu", logger=False)


@pytest.mark.parametrize("name", ["zero_optimization", "zero_allow_untested_optimizer"])
def test_arguments_without_a_meaning_are_unknown(name: str) -> None:
    with pytest.raises(TypeError, match=rf"unknown options \['{name}'\]"):
        DeepSpeedStrategy(**{name: False})  # type: ignore[arg-type]


def test_what_to_install_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install lowbit-lightning\[deepspeed\]"):
        DeepSpeedStrategy(2)
    with pytest.raises(ModuleNotFoundError, match=r"pip install lowbit-lightning\[deepspeed\]"):
        L.Trainer(strategy="lowbit_deepspeed_stage_2", accelerator="cpu", logger=False)


def test_layers_are_layers_at_stage_0() -> None:
    optimizer = optim.LAMB([nn.Parameter(torch.zeros(5000))], lr=0.1)
    check_deepspeed({"zero_optimization": {"stage": 0}}, optimizer)
    with pytest.raises(ValueError, match="LAMB needs the norm of each layer"):
        check_deepspeed({"zero_optimization": {"stage": 1}}, optimizer)
    importlib.import_module("deepspeed")  # without it nothing is a partition
    parameters = [nn.Parameter(torch.randn(shape)) for shape in ((100, 64), (100,))]
    copies = [p.detach().clone().requires_grad_() for p in parameters]  # stage 0's in bf16 are no nn.Parameters
    for params in (parameters, copies):
        for p in params:
            p.grad = torch.ones_like(p)
        optim.LAMB(params, lr=0.1).step()
    assert all(map(torch.equal, parameters, copies))


def test_names_are_split_with_their_parameters() -> None:
    model = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64))
    model[1].bias.requires_grad_(False)
    optimizer = optim.AdamW(model.named_parameters())
    names = SplitGroups(optimizer, model).names
    assert [group["param_names"] for group in optimizer.param_groups] == names == [["0.weight", "1.weight"], ["0.bias"]]


@pytest.mark.parametrize(("make", "missed"), [(optim.AdEMAMix, "exp_avg_slow"), (optim.Lion, "exp_avg")])
def test_what_the_converter_misses_is_refused(make: Any, missed: str) -> None:
    config = {"checkpoint": {"load_universal": True}, "zero_optimization": {"stage": 2}}
    parameters = [nn.Parameter(torch.zeros(5000))]
    with pytest.raises(ValueError, match=f"does not know its states .*{missed}.* take load_universal out"):
        check_deepspeed(config, make(parameters, lr=0.1))
    check_deepspeed({}, make(parameters, lr=0.1))
    check_deepspeed(config, optim.AdamW(parameters, lr=0.1))


def test_groups_of_a_checkpoint_of_another_strategy() -> None:
    """They are those of ``configure_optimizers``."""
    checkpoints.check_groups(Path("x.ckpt"), {}, [["a", "b"]], split=False)
    with pytest.raises(ValueError, match=r"x\.ckpt was saved with another strategy, in other groups"):
        checkpoints.check_groups(Path("x.ckpt"), {}, [["a"], ["b"]], split=True)
