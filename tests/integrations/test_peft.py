"""LoRA and DoRA of real PEFT on low-bit layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from support.hub_models import tokens
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lowbit_lightning import convert, optim
from lowbit_lightning.convert.lowbit import low_bit_layers
from lowbit_lightning.integrations import peft as integration
from lowbit_lightning.integrations.peft import LoraEmbedding, LoraExperts, LoraLinear, merge_and_unload
from lowbit_lightning.integrations.transformers import LowBitConfig
from lowbit_lightning.layers import LowBitLinear
from lowbit_lightning.layers.experts import LowBitTensor

Folder = Callable[[str], Path]
TARGETS = ["q_proj", "down_proj"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied:UserWarning"),
]


def load(folder: Path, weights: str = "nf4", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    config = LowBitConfig(weights, **options)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)


def adapted(model: Any, targets: list[str] | None = None, seed: int = 0, **options: Any) -> Any:
    """With an adapter that has been trained, as far as that is needed: no part of it is zero."""
    torch.manual_seed(seed)
    wrapped = get_peft_model(model, LoraConfig(target_modules=targets or TARGETS, r=4, **options))
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if p.requires_grad and "magnitude" not in name:
                p.normal_(std=0.1)
    return wrapped.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(tokens()).logits


def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def test_public_names() -> None:
    assert integration.__all__ == ["LoraEmbedding", "LoraExperts", "LoraLinear", "merge_and_unload"]


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("weights", ["nf4", "int8", "int3", "int2"])
def test_trains_and_merges_to_what_the_adapter_computes(weights: str, dora: bool, folder: Folder) -> None:
    model = load(folder("llama"), weights)
    packed = {name: low.weight.clone() for name, low in low_bit_layers(model)}
    torch.manual_seed(0)
    wrapped = get_peft_model(model, LoraConfig(target_modules=TARGETS, r=4, use_dora=dora))
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(4):
        loss = wrapped(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    for name, low in low_bit_layers(model):
        assert torch.equal(low.weight, packed[name.replace("base_model.model.", "").replace(".base_layer", "")])
    wrapped.eval()
    expected = logits(wrapped)
    merged = wrapped.merge_and_unload()
    assert distance(logits(merged), expected) < 1e-5
    assert type(merged.model.layers[0].self_attn.q_proj) is nn.Linear


def test_a_merge_is_the_decoded_weight_plus_the_adapter_rounded_once(folder: Folder) -> None:
    wrapped = adapted(load(folder("llama"), dtype=torch.bfloat16))
    layer = wrapped.base_model.model.model.layers[1].mlp.down_proj
    delta = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    exact = layer.base_layer.dequantize(torch.float32).double() + layer.scaling["default"] * delta
    merged = wrapped.merge_and_unload().model.layers[1].mlp.down_proj.weight
    assert merged.dtype == torch.bfloat16
    wrong = merged != exact.to(torch.bfloat16)
    assert wrong.float().mean() < 1e-3, "but for ties that float32 sees and float64 does not"
    assert ((merged.double() - exact).abs() <= exact.abs() * 2**-8 * 1.001).all()


def test_merged_adapters_come_off_again_to_the_bit(folder: Folder) -> None:
    wrapped = adapted(load(folder("llama")), [*TARGETS, "up_proj"])
    before, state = logits(wrapped), {name: x.clone() for name, x in wrapped.state_dict().items()}
    wrapped.merge_adapter()
    assert distance(logits(wrapped), before) < 1e-5
    assert not torch.equal(logits(wrapped), before)
    wrapped.unmerge_adapter()
    assert torch.equal(logits(wrapped), before)
    assert all(torch.equal(x, state[name]) for name, x in wrapped.state_dict().items())
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), logits(load(folder("llama"))))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_two_adapters_switch_and_merge_together(dora: bool, folder: Folder, tmp_path: Path) -> None:
    wrapped = adapted(load(folder("llama")), use_dora=dora)
    one = logits(wrapped)
    wrapped.add_adapter("second", LoraConfig(target_modules=["q_proj"], r=2, use_dora=dora))
    wrapped.set_adapter("second")
    with torch.no_grad():
        wrapped.base_model.model.model.layers[0].self_attn.q_proj.lora_B["second"].weight.normal_()
    two = logits(wrapped)
    assert distance(one, two) > 1e-3
    wrapped.set_adapter("default")
    assert torch.equal(logits(wrapped), one)
    wrapped.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="Already following adapters were merged"):  # PEFT's own
        wrapped.merge_adapter(["second"])
    apart = logits(wrapped)  # one after another ends where both at once do
    wrapped.unmerge_adapter()
    wrapped.merge_adapter(["default", "second"])
    assert torch.equal(logits(wrapped), apart)
    wrapped.unmerge_adapter()
    assert torch.equal(logits(wrapped), one)
    wrapped.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(folder("llama")), tmp_path)
    again.load_adapter(tmp_path / "second", "second")
    assert torch.equal(logits(again), one)
    again.set_adapter("second")
    assert torch.equal(logits(again), two)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_embeddings_and_conv1d(dora: bool, folder: Folder, tmp_path: Path) -> None:
    model = load(folder("gpt2"), "int4", embeddings=True, output_layer=None)
    wrapped = adapted(model, ["wte", "c_attn", "c_proj"], use_dora=dora, fan_in_fan_out=True)
    block = wrapped.base_model.model.transformer.h[0]
    assert isinstance(block.attn.c_attn, LoraLinear)
    assert isinstance(wrapped.base_model.model.transformer.wte, LoraEmbedding)
    expected = logits(wrapped)
    wrapped.merge_adapter()
    assert distance(logits(wrapped), expected) < 1e-5
    wrapped.unmerge_adapter()
    assert torch.equal(logits(wrapped), expected)
    wrapped.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(folder("gpt2"), "int4", embeddings=True, output_layer=None), tmp_path)
    assert torch.equal(logits(again), expected)
    merged = again.merge_and_unload()
    assert type(merged.transformer.h[0].attn.c_attn).__name__ == "Conv1D"
    assert distance(logits(merged), expected) < 1e-5


def test_experts(folder: Folder, tmp_path: Path) -> None:
    """Low-bit experts train with a pair of factors each, beside the decoded weights in torch."""
    targets = ["gate_up_proj", "down_proj", "q_proj"]
    wrapped = adapted(load(folder("mixtral")), targets)
    experts = wrapped.base_model.model.model.layers[0].mlp.experts
    assert isinstance(experts.gate_up_proj, LoraExperts)
    expected = logits(wrapped)
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), logits(load(folder("mixtral"))))
    for how, apart in (("grouped_mm", 1e-4), ("eager", 0.0)):  # all experts decoded; one by one, packed
        wrapped.base_model.model.set_experts_implementation(how)
        assert distance(logits(wrapped), expected) <= apart
    wrapped.train()
    wrapped(input_ids=tokens(), labels=tokens()).loss.backward()
    grad = experts.down_proj.lora_B["default"].weight.grad
    assert grad.view(64, 4, 4).abs().sum((0, 2)).min() > 0, "each expert has learned"
    wrapped.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(folder("mixtral")), tmp_path)
    assert torch.equal(logits(again), expected)
    with pytest.raises(ValueError, match=r"integrations\.peft\.merge_and_unload"):
        again.merge_adapter()
    merged = merge_and_unload(again, dtype=torch.float32)
    assert distance(logits(merged), expected) < 1e-4
    merged.save_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", experts_implementation="eager")
    assert distance(logits(plain), expected) < 1e-4
    with pytest.warns(UserWarning, match=r"6 merged weights were rounded"):
        low = merge_and_unload(wrapped, weights="same")
    assert isinstance(low.model.layers[0].mlp.experts.gate_up_proj, LowBitTensor)
    with pytest.raises(ValueError, match="use_dora=True is not possible on experts"):
        adapted(load(folder("mixtral")), targets, use_dora=True)


def test_an_adapter_of_the_plain_model_fits(folder: Folder, tmp_path: Path) -> None:
    """Trained on the model in high precision, loaded on the low-bit one, and the reverse."""
    plain = AutoModelForCausalLM.from_pretrained(folder("llama"), dtype=torch.float32)
    adapted(plain).save_pretrained(tmp_path)
    wrapped = PeftModel.from_pretrained(load(folder("llama"), "int8"), tmp_path)
    assert isinstance(wrapped.base_model.model.model.layers[0].self_attn.q_proj, LoraLinear)
    assert distance(logits(wrapped), logits(plain)) < 0.05
    wrapped.save_pretrained(tmp_path / "back")
    fresh = AutoModelForCausalLM.from_pretrained(folder("llama"), dtype=torch.float32)
    assert torch.equal(logits(PeftModel.from_pretrained(fresh, tmp_path / "back")), logits(plain))


def test_dtypes_may_differ(folder: Folder) -> None:
    """A bfloat16 model with float32 adapters: products are in bfloat16, with and without autocast."""
    model = load(folder("llama"), dtype=torch.bfloat16)
    seen: set[torch.dtype] = set()
    model.model.layers[0].mlp.down_proj.register_forward_hook(
        lambda layer, args, output: seen.update((args[0].dtype, output.dtype))
    )
    wrapped = adapted(model, use_dora=True).train()
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            wrapped(input_ids=tokens(), labels=tokens()).loss.backward()
    assert seen == {torch.bfloat16}
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    assert {p.grad.dtype for p in trained if p.grad is not None} == {torch.float32}


# -- merge_and_unload ------------------------------------------------------------------------------------------------


def test_a_merged_model_is_saved_as_what_it_is(folder: Folder, tmp_path: Path) -> None:
    merged = adapted(load(folder("llama"))).merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(merged))
    assert type(again.model.layers[0].self_attn.q_proj) is nn.Linear
    assert isinstance(again.model.layers[0].self_attn.k_proj, LowBitLinear)


def test_to_a_dtype_the_whole_model_goes(folder: Folder, tmp_path: Path) -> None:
    wrapped = adapted(load(folder("llama"), dtype=torch.bfloat16))
    expected = logits(wrapped)
    wrapped.merge_adapter()  # to bfloat16; they are merged anew to float32
    merged = merge_and_unload(wrapped, dtype=torch.float32)
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    assert distance(logits(merged), expected.float()) < 0.02
    merged.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(merged))


def test_back_to_low_bits_says_the_error(folder: Folder) -> None:
    wrapped = adapted(load(folder("llama"), overrides={"*.down_proj": "int8"}))
    exact = logits(wrapped)
    with pytest.warns(UserWarning, match=r"4 merged weights were rounded.*signal to noise 2\d\.\d dB"):
        merged = merge_and_unload(wrapped, weights="same")
    assert {str(low.format) for name, low in low_bit_layers(merged) if "down_proj" in name} == {"int8"}
    snr = convert.weight_report(merged).layers["model.layers.0.self_attn.q_proj"][3]
    assert snr is not None
    assert snr > 20
    assert 1e-4 < distance(logits(merged), exact) < 0.3


def test_errors_of_merge_and_unload(folder: Folder) -> None:
    wrapped = adapted(load(folder("llama")))
    with pytest.raises(ValueError, match="give dtype or weights, not both"):
        merge_and_unload(wrapped, dtype=torch.float32, weights="nf4")
    with pytest.raises(TypeError, match=r"dtype must be None, torch\.float32"):
        merge_and_unload(wrapped, dtype=torch.float64)
    with pytest.raises(ValueError, match="format of weights must be one of"):
        merge_and_unload(wrapped, weights="nf5")
    layer = wrapped.base_model.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.lora_B["default"].weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="NaNs detected"):
        wrapped.merge_adapter(safe_merge=True)
    assert isinstance(layer.base_layer, LowBitLinear)
    assert not layer.merged


# -- beside other parts of PEFT --------------------------------------------------------------------------------------


def test_prepares_for_training_without_casting(folder: Folder) -> None:
    model = load(folder("llama"), dtype=torch.bfloat16)
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    assert not any(p.requires_grad for p in model.parameters())
    assert model.is_gradient_checkpointing
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.bfloat16}
    wrapped = get_peft_model(model, LoraConfig(target_modules=TARGETS, r=4))
    wrapped.train()
    wrapped(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
    grads = [p.grad for p in wrapped.parameters() if p.requires_grad]
    assert all(grad is not None for grad in grads)
    assert any(grad.abs().sum() > 0 for grad in grads if grad is not None)


def test_all_linear_takes_low_bit_layers(folder: Folder) -> None:
    wrapped = get_peft_model(load(folder("llama")), LoraConfig(target_modules="all-linear", r=2))
    found = [name for name, module in wrapped.named_modules() if isinstance(module, LoraLinear)]
    assert len(found) == 14


def test_plain_layers_and_configs_are_left_to_peft(folder: Folder, tmp_path: Path) -> None:
    config = LoraConfig(target_modules=TARGETS, r=2)
    plain = get_peft_model(AutoModelForCausalLM.from_pretrained(folder("llama")), config)
    assert type(plain.base_model.model.model.layers[0].self_attn.q_proj) is peft.tuners.lora.Linear
    assert config._custom_modules is None
    plain.save_pretrained(tmp_path)
    assert "lowbit" not in (tmp_path / "adapter_config.json").read_text().lower()
