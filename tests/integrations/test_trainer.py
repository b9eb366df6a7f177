"""Transformers' Trainer with low-bit weights and with this package's optimizers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.hub_models import tokens
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from lowbit_lightning import optim
from lowbit_lightning.integrations.transformers import LowBitConfig, optimizer

Folder = Callable[[str], Path]
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


def data(rows: int = 8) -> list[dict[str, Any]]:
    return [{"input_ids": row, "labels": row} for row in tokens(rows)]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    given = {"max_steps": 4, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "seed": 3}
    given |= {"per_device_train_batch_size": 2, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    return TrainingArguments(str(folder), use_cpu=True, dataloader_pin_memory=False, **{**given, **options})


def low_bit(folder: Folder, weights: str = "nf4") -> Any:
    return AutoModelForCausalLM.from_pretrained(folder("llama"), quantization_config=LowBitConfig(weights))


def adapted(folder: Folder, weights: str = "nf4") -> Any:
    torch.manual_seed(0)
    return get_peft_model(low_bit(folder, weights), LoraConfig(target_modules=["q_proj", "up_proj"], r=64))


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def distance(one: Any, other: Any) -> float:
    first, second = trained(one), trained(other)
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


def test_full_training_is_refused_and_adapters_train(folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="attach trainable adapters"):
        Trainer(low_bit(folder), arguments(tmp_path), train_dataset=data())
    model = adapted(folder)
    before = trained(model)
    result = Trainer(model, arguments(tmp_path), train_dataset=data()).train()
    assert result.training_loss > 0
    assert all(not torch.equal(before[name], value) for name, value in trained(model).items())


def test_our_optimizer_with_accumulation_and_clipping_steps_as_torch_does(folder: Folder, tmp_path: Path) -> None:
    """In 32 bits, beside torch's AdamW under the same arguments."""
    options = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1, "weight_decay": 0.1, "adam_beta2": 0.95}
    args = arguments(tmp_path, **options, optim="adamw_torch")
    ours, theirs = adapted(folder), adapted(folder)
    trainer = Trainer(ours, args, train_dataset=data(), optimizer_cls_and_kwargs=optimizer(args, "AdamW", bits=32))
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, optim.AdamW)  # accelerate wraps it
    Trainer(theirs, args, train_dataset=data()).train()
    assert distance(ours, theirs) < 1e-5


@pytest.mark.parametrize("weights", ["nf4", "int8"])
def test_eight_bit_states_resume_to_the_bit(weights: str, folder: Folder, tmp_path: Path) -> None:
    args = arguments(tmp_path, save_strategy="steps", save_steps=2, gradient_accumulation_steps=2)
    straight, resumed = adapted(folder, weights), adapted(folder, weights)
    chosen = optimizer(args, "AdamW", min_size=0)
    trainer = Trainer(straight, args, train_dataset=data(), optimizer_cls_and_kwargs=chosen)
    trainer.train()
    states = trainer.optimizer.optimizer.state.values()
    assert any("exp_avg_codes" in state for state in states)
    again = Trainer(resumed, args, train_dataset=data(), optimizer_cls_and_kwargs=chosen)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 4
    assert distance(straight, resumed) == 0


def test_what_the_helper_hands_over(tmp_path: Path) -> None:
    args = arguments(tmp_path, adam_beta1=0.8, adam_epsilon=1e-6)
    adam = {"lr": 1e-2, "betas": (0.8, 0.999), "eps": 1e-6}
    assert optimizer(args) == (optim.AdamW, adam)
    assert optimizer(args, optim.LAMB, eps=1e-5, paged="disk") == (optim.LAMB, {**adam, "eps": 1e-5, "paged": "disk"})
    assert optimizer(args, "Lion", bits=32) == (optim.Lion, {"lr": 1e-2, "bits": 32})
    with pytest.raises(ValueError, match=r"kind must be an optimizer of lowbit_lightning.optim, one of .*got 'adamw'"):
        optimizer(args, "adamw")
