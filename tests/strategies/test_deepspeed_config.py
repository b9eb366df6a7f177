"""What ``DeepSpeedStrategy`` and ``check_deepspeed`` say to arguments and configurations."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import StrategyRegistry
from omegaconf import OmegaConf
from torch import nn

from lowbit_lightning import optim
from lowbit_lightning.strategies import DeepSpeedStrategy, check_deepspeed
from lowbit_lightning.strategies.deepspeed import checkpoints
from lowbit_lightning.strategies.deepspeed.config import complete, read
from lowbit_lightning.strategies.deepspeed.groups import SplitGroups

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the deepspeed extra is for Linux"),
    pytest.mark.usefixtures("deepspeed_imported"),
]


NAMES = [f"lowbit_deepspeed_stage_{s}" for s in ("1", "2", "3", "2_offload", "3_offload", "2_paged")]
CONFIG = {"zero_optimization": {"stage": 3, "sub_group_size": 1000}, "gradient_clipping": 0.5}


def test_every_source_of_a_config_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c.json").write_text(json.dumps(CONFIG))
    OmegaConf.save(OmegaConf.create(CONFIG), tmp_path / "c.yaml")
    expected = {**CONFIG, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    node = OmegaConf.create({"clip": 0.5, "engine": {**CONFIG, "gradient_clipping": "${clip}"}}).engine
    for config in (CONFIG, str(tmp_path / "c.json"), tmp_path / "c.yaml", node):
        assert DeepSpeedStrategy(config=config).config == expected
    monkeypatch.setenv("PL_DEEPSPEED_CONFIG_PATH", str(tmp_path / "c.json"))
    assert DeepSpeedStrategy(3).config == expected
    assert list(CONFIG) == ["zero_optimization", "gradient_clipping"], "the caller's dict is the caller's"


@pytest.mark.parametrize("name", NAMES)
def test_names_choose_stage_and_offload(name: str) -> None:
    assert name in StrategyRegistry
    config = L.Trainer(accelerator="cpu", strategy=name, logger=False).strategy.config  # type: ignore[attr-defined]
    zero = config["zero_optimization"]
    assert zero["stage"] == int(name.split("_")[3])
    assert ("offload_optimizer" in zero) == ("offload" in name)
    assert ("offload_param" in zero) == (name == "lowbit_deepspeed_stage_3_offload")
    assert config["zero_force_ds_cpu_optimizer"] is False


def test_paging_and_offload_are_one_too_many() -> None:
    with pytest.raises(ValueError, match="paged=True and offload_optimizer both keep states on the host: choose"):
        DeepSpeedStrategy(2, offload_optimizer=True, paged=True)
    with pytest.raises(ValueError, match="paged must be False, True"):
        DeepSpeedStrategy(2, paged="nvme")  # type: ignore[arg-type]


def test_a_config_overrules_nothing_silently(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"stage=2 contradicts the config, whose zero_optimization.stage is 3"):
        DeepSpeedStrategy(2, config=CONFIG)
    with pytest.raises(ValueError, match=r"put \['overlap_comm'\] into it"):
        DeepSpeedStrategy(config=CONFIG, overlap_comm=False)
    with pytest.raises(TypeError, match=r"unknown options \['offload'\]; known: .*offload_optimizer"):
        DeepSpeedStrategy(2, offload=True)
    with pytest.raises(ValueError, match="optimizer_bits must be 8, 32 or None, got 4"):
        DeepSpeedStrategy(2, optimizer_bits=4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="stage must be 1, 2 or 3, got 0; without ZeRO use strategy='ddp'"):
        complete({}, 0)
    with pytest.raises(FileNotFoundError, match=r"missing\.json"):
        read(tmp_path / "missing.json")
    with pytest.raises(ValueError, match="must be a file that ends in one of"):
        read("config.toml")
    with pytest.raises(TypeError, match="config must be a dict, an OmegaConf DictConfig or the path of a file, got 3"):
        read(3)


@pytest.mark.parametrize(
    ("zero", "said", "instead"),
    [
        ({"elastic_checkpoint": True}, "elastic_checkpoint", "ds_to_universal"),
        ({"offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}, "nvme", "device='cpu'"),
        ({"offload_optimizer": {"device": "cpu", "ratio": 0.5}}, "ratio=0.5", "ratio=1"),
        ({"zenflow": {"topk_ratio": 0.1}}, "zenflow", "device='cpu'"),
        ({"offload_optimizer": {"device": "cpu", "super_offload": True}}, "super_offload", "device='cpu'"),
    ],
)
def test_refused_settings_name_the_alternative(zero: dict[str, Any], said: str, instead: str) -> None:
    for refuse in (lambda c: DeepSpeedStrategy(config=c), check_deepspeed):
        with pytest.raises(ValueError, match=said) as raised:
            refuse({"zero_optimization": {"stage": 2, **zero}})
        assert instead in str(raised.value)


def test_deepspeeds_own_optimizers_are_refused_unless_meant() -> None:
    config = {**CONFIG, "optimizer": {"type": "AdamW"}}
    with pytest.raises(ValueError, match=r"the config's optimizer section .* return one from configure_optimizers"):
        DeepSpeedStrategy(config=config)
    kept: Any = DeepSpeedStrategy(config=config, optimizer_bits=None).config
    assert kept["optimizer"] == {"type": "AdamW"}


@pytest.mark.parametrize("kind", [optim.LAMB, optim.LARS])
def test_trust_ratios_are_refused(kind: Any) -> None:
    """By the strategy's question, and by the step itself where nobody asked."""
    optimizer = kind([nn.Parameter(torch.zeros(5000))], lr=0.1)
    with pytest.raises(ValueError, match=rf"{kind.__name__} needs the norm of each layer.*lowbit_sharded"):
        check_deepspeed({}, optimizer)
    partition = torch.zeros(5000, requires_grad=True)
    optimizer.param_groups[0]["params"] = [partition]
    partition.grad = torch.ones(5000)
    with pytest.raises(ValueError, match="needs the norm of each layer, and DeepSpeed's flat partitions"):
        optimizer.step()
    assert not partition.any()


def test_skipping_is_refused() -> None:
    with pytest.raises(ValueError, match=r"skip_nonfinite=True has SGD decide .* DeepSpeed skips such steps itself"):
        check_deepspeed({}, optim.SGD([nn.Parameter(torch.zeros(4))], lr=0.1, skip_nonfinite=True))


def test_released_gradients_are_refused() -> None:
    model = nn.Linear(4, 4)
    optimizer = optim.AdamW(model.parameters())
    optim.release_gradients(model, optimizer)
    with pytest.raises(ValueError, match="release_gradients steps AdamW inside backward"):
        check_deepspeed({}, optimizer)


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
