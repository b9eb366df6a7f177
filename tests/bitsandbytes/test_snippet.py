"""``import lowbit_lightning.bitsandbytes as bnb``: the names that others use, and the first snippet of its users."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import lowbit_lightning.bitsandbytes as bnb

# What Transformers, PEFT, accelerate, diffusers and Unsloth read.
SERVED = """
    MatmulLtState matmul matmul_4bit supported_torch_devices features
    nn.Embedding nn.Embedding4bit nn.Embedding8bit nn.EmbeddingFP4 nn.EmbeddingNF4 nn.Int8Params nn.Linear4bit
    nn.Linear8bitLt nn.LinearFP4 nn.LinearNF4 nn.Params4bit nn.Params4bit.from_prequantized nn.StableEmbedding
    functional.QuantState functional.create_dynamic_map functional.dequantize_4bit functional.dequantize_blockwise
    functional.get_ptr functional.int8_vectorwise_dequant functional.int8_vectorwise_quant functional.quantize_4bit
    functional.quantize_blockwise functional.quantize_fp4 functional.quantize_nf4
    optim.GlobalOptimManager.get_instance
"""
OPTIMIZERS = """
    Adagrad Adagrad8bit Adagrad32bit Adam Adam8bit Adam32bit PagedAdam PagedAdam8bit PagedAdam32bit AdamW AdamW8bit
    AdamW32bit PagedAdamW PagedAdamW8bit PagedAdamW32bit AdEMAMix AdEMAMix8bit AdEMAMix32bit PagedAdEMAMix
    PagedAdEMAMix8bit PagedAdEMAMix32bit LAMB LAMB8bit LAMB32bit LARS LARS8bit LARS32bit Lion Lion8bit Lion32bit
    PagedLion PagedLion8bit PagedLion32bit RMSprop RMSprop8bit RMSprop32bit SGD SGD8bit SGD32bit
"""
REFUSED = [
    *("cextension", "lib", "research", "functional.lib", "functional.get_paged", "functional.optimizer_update_32bit"),
    *("functional.igemm", "nn.OutlierAwareLinear", "nn.parametrize", "optim.Optimizer2State", "optim.PytorchLARS"),
]


def found(name: str) -> object:
    value: object = bnb
    for part in name.split("."):
        value = getattr(value, part)
    return value


def test_names_are_served() -> None:
    assert all(found(name) is not None for name in SERVED.split())
    assert sorted(bnb.optim.__all__) == sorted(["GlobalOptimManager", *OPTIMIZERS.split()])
    assert all(found(f"optim.{name}").__name__ == name for name in OPTIMIZERS.split())  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", REFUSED)
def test_other_names_say_what_to_do_instead(name: str) -> None:
    with pytest.raises(AttributeError, match=rf"{re.escape(name)} of bitsandbytes is not served: \w+"):
        found(name)
    with pytest.raises(AttributeError, match="has no attribute 'lost'"):
        found(f"{name.rpartition('.')[0]}.lost".lstrip("."))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = bnb.nn.StableEmbedding(100, 64)
        self.fc1, self.fc2 = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.fc2(torch.relu(self.fc1(self.embedding(tokens))))


def test_the_first_snippet() -> None:
    torch.manual_seed(0)
    model = Net()
    manager = bnb.optim.GlobalOptimManager.get_instance()
    manager.register_parameters(model.parameters())
    adam = bnb.optim.Adam8bit(model.parameters(), lr=0.001, betas=(0.9, 0.995))
    manager.override_config(model.fc1.weight, "optim_bits", 32)
    manager.register_module_override(model.fc2, "bias", {"optim_bits": 32})
    tokens, losses = torch.randint(100, (8, 16)), []
    for _ in range(20):
        loss = model(tokens).square().mean()
        loss.backward()
        adam.step()
        adam.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    names = {name: "exp_avg_codes" in adam.state[p] for name, p in model.named_parameters() if p.ndim == 2}
    assert names == {"embedding.weight": False, "fc1.weight": False, "fc2.weight": True}

    plain = nn.Linear(64, 64)
    linear = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False, threshold=6.0)
    linear.load_state_dict(plain.state_dict())
    linear = linear.to("cpu").eval()
    x = torch.randn(32, 64)
    x[:, 5] = 60.0  # would take the resolution of all other columns
    assert linear.weight.dtype == torch.int8
    assert torch.allclose(linear(x), plain(x), atol=0.05 + 60 * 2e-3)
