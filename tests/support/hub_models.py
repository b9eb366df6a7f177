"""Small models of Transformers with random weights, in folders as the hub has them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def llama(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes})).eval()


def mixtral(**changes: Any) -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**{**SIZES, "num_local_experts": 4, **changes})).eval()


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 64}
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **rates, bos_token_id=1, eos_token_id=2)).eval()


MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "tied": partial(llama, tie_word_embeddings=True),
    "mixtral": mixtral,
    "gpt2": gpt2,
}


def save(name: str, folder: Path) -> Path:
    """Build the model with a fixed seed and save it, in bfloat16 and in shards."""
    torch.manual_seed(1)
    with torch.no_grad():
        model = MODELS[name]()
        for p in model.parameters():  # the initial values are too small for outputs to differ
            p.mul_(4) if p.ndim > 1 else None
    model.to(torch.bfloat16).save_pretrained(folder / name, max_shard_size="150KB")
    return folder / name


def tokens(rows: int = 2, length: int = 8) -> torch.Tensor:
    return torch.arange(rows * length).reshape(rows, length) * 7 % 120 + 3
