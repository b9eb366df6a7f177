"""PEFT's adapters on low-bit weights under FSDP2: two ranks end where one process ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from support.hub_models import llama, tokens
from support.on_ranks import ALONE, on_ranks
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lowbit_lightning import optim


def build(dora: bool) -> Any:
    from peft import LoraConfig, get_peft_model

    from lowbit_lightning.integrations.transformers import LowBitConfig, quantize_pretrained

    torch.manual_seed(0)
    model = quantize_pretrained(llama(), LowBitConfig("nf4"))
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"], r=4, use_dora=dora))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05)
    return model.train()


def losses(dora: bool) -> list[float]:
    model = build(dora)
    mine = tokens(4)
    if dist.is_initialized():
        mine = mine.chunk(dist.get_world_size())[dist.get_rank()]
        for layer in model.base_model.model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        assert all(isinstance(p, DTensor) for p in model.parameters())
    optimizer = optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, bits=32)
    found = []
    for _ in range(3):
        loss = model(input_ids=mine, labels=mine).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        found.append(mean.item())
    return found


@on_ranks(slow=(ALONE, 2))
def test_lora_and_dora_train_as_in_one_process(folder: Path) -> str | None:
    found = {dora: losses(dora) for dora in (False, True)}
    if not dist.is_initialized():
        torch.save(found, folder / "losses.pt")
        return None
    expected = torch.load(folder / "losses.pt")
    apart = max(abs(a - b) for dora in found for a, b in zip(found[dora], expected[dora], strict=True))
    return None if apart < 1e-5 else f"losses {found} differ from {expected}"
