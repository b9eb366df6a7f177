"""Transformers' Trainer under ZeRO-3 of DeepSpeed: low-bit weights are cut while they are loaded, adapters train as in
one process, and what can't be done with cut weights is refused."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import hub_models
from support.on_ranks import ALONE, on_ranks
from support.sharded_model import raised

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the deepspeed extra is for Linux")

ZERO3: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 0}


def before_ranks() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    # It would be compiled.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # type: ignore[attr-defined]


def arguments(folder: Path, **zero: Any) -> Any:
    """Of a Trainer; from here on Transformers knows that the ranks use ZeRO-3, if they do."""
    from transformers import TrainingArguments

    config = {
        "zero_optimization": {**ZERO3, **zero},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_allow_untested_optimizer": True,
    }
    options: dict[str, Any] = {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "logging_steps": 1}
    options |= {"max_steps": 4, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if ranks == 1:  # else accelerate waits for others
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)
    return TrainingArguments(
        str(folder / "out"),
        use_cpu=True,
        dataloader_pin_memory=False,
        per_device_train_batch_size=4 // ranks,
        deepspeed=config if ranks > 1 else None,
        **options,
    )


def saved(folder: Path, name: str) -> Path:
    if not dist.is_initialized() or dist.get_rank() == 0:
        hub_models.save(name, folder)
    if dist.is_initialized():
        dist.barrier()
    return folder / name


def load(path: Path, weights: str | None = "nf4", **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    from lowbit_lightning.integrations.transformers import LowBitConfig

    config = {} if weights is None else {"quantization_config": LowBitConfig(weights, **options)}
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **config)


def losses(model: Any, folder: Path, args: Any) -> list[float]:
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer

    from lowbit_lightning.integrations.transformers import optimizer

    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=8))
    data: Any = [{"input_ids": row, "labels": row} for row in hub_models.tokens(8)]
    trainer = Trainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=optimizer(args, bits=32))
    trainer.train()
    trainer.save_model(str(folder / "adapter"))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@on_ranks(slow=(ALONE, 2))
def test_weights_are_cut_while_they_are_loaded_and_adapters_train(folder: Path) -> str | None:
    from safetensors.torch import load_file

    from lowbit_lightning.convert.lowbit import low_bit_layers

    found, cases = {}, dict[str, Any](llama={}, mixtral={}, tied={"embeddings": True, "output_layer": None})
    for name, options in cases.items():
        args, model = arguments(folder), load(saved(folder, name), **options)
        if dist.is_initialized():
            for layer, low in low_bit_layers(model):
                parts: Any = low.weight, low.weight_scales
                for p in parts:
                    if p.numel() or p.ds_tensor.numel() > -(-p.ds_numel // 2):
                        return f"{name}: {layer} is whole on a rank: {p.shape}, {p.ds_tensor.shape}"
            problem = raised(model.dequantize, ValueError, "cut by ZeRO-3")
            if problem:
                return problem
        found[name] = losses(model, folder / name, args)
        adapter = load_file(folder / name / "adapter" / "adapter_model.safetensors")
        if not all(x.numel() for x in adapter.values()):
            return f"{name}: {[key for key, x in adapter.items() if not x.numel()]} were saved without values"
    if not dist.is_initialized():
        (folder / "losses.json").write_text(json.dumps(found))
        return None
    expected = json.loads((folder / "losses.json").read_text())
    for name in found:
        apart = max(abs(a - b) for a, b in zip(found[name], expected[name], strict=True))
        if apart > 1e-4:
            return f"{name}: losses are off by {apart}: {found[name]}, not {expected[name]}"
    return None


@on_ranks(slow=(2,))
def test_what_is_refused(folder: Path) -> str | None:
    from lowbit_lightning.integrations.transformers import LowBitConfig, quantize_pretrained

    args = arguments(folder)  # Transformers knows of ZeRO-3 as long as they live
    plain = load(saved(folder, "llama"), None)
    refused: list[tuple[Callable[[], Any], str]] = [
        (partial(quantize_pretrained, plain, LowBitConfig("nf4")), "ZeRO-3 of DeepSpeed has cut its weight"),
    ]
    problems = {words: raised(call, ValueError, words) for call, words in refused}
    del args
    return next((f"{words}: {problem}" for words, problem in problems.items() if problem), None)
