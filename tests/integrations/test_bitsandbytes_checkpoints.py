"""Checkpoints that the real bitsandbytes wrote, loaded without it, and what a fresh process needs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support.hub_models import tokens
from support.run_program import run
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig

from lowbit_lightning.convert.lowbit import low_bit_layers
from lowbit_lightning.integrations.transformers import LowBitConfig, load_bitsandbytes
from lowbit_lightning.layers.experts import LowBitTensor

Folder = Callable[[str], Path]
FOUR: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}
CONFIGS: dict[str, dict[str, Any]] = {
    "nf4-dq": {**FOUR, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4-bf16-storage": {**FOUR, "bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": torch.bfloat16},
    "int8": {"load_in_8bit": True},
}
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="bitsandbytes' wheels"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt.*:UserWarning"),
]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(tokens()).logits.float()


def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def decoded(model: Any) -> dict[str, Tensor]:
    """The weights as bitsandbytes decodes them."""
    import bitsandbytes as bnb

    found = {}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            found[name] = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            found[name] = bnb.functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
    return found


@pytest.fixture(scope="module")
def theirs(folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Path, Tensor]]:
    """A folder that bitsandbytes and Transformers wrote, and what a plain model with the decoded weights computes."""
    made: dict[tuple[str, str], tuple[Path, Tensor]] = {}

    def get(name: str, kind: str) -> tuple[Path, Tensor]:
        if (name, kind) not in made:
            target = tmp_path_factory.mktemp(f"{name}-{kind}")
            model = AutoModelForCausalLM.from_pretrained(
                folder(name), quantization_config=BitsAndBytesConfig(**CONFIGS[kind]), dtype=torch.float32
            )
            model.save_pretrained(target, max_shard_size="100KB")
            plain = AutoModelForCausalLM.from_pretrained(folder(name), dtype=torch.float32)
            for layer, weight in decoded(model).items():
                held: Any = plain.get_submodule(layer)
                held.weight = nn.Parameter((weight if type(held) is nn.Linear else weight.T).float())
            made[name, kind] = target, logits(plain)
        return made[name, kind]

    return get


@pytest.mark.parametrize("kind", CONFIGS)
def test_llama_loads_as_it_was_saved(kind: str, theirs: Any, tmp_path: Path) -> None:
    folder, expected = theirs("llama", kind)
    model = load_bitsandbytes(AutoModelForCausalLM, str(folder), dtype=torch.float32)
    layers = dict(low_bit_layers(model))
    assert len(layers) == 14
    assert distance(logits(model), expected) < 1e-5
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.float32}
    config = model.config.quantization_config
    assert isinstance(config, LowBitConfig)
    assert config.weights == {"nf4-dq": "nf4", "fp4-bf16-storage": "fp4", "int8": "int8"}[kind]
    model.save_pretrained(tmp_path)  # in this package's form
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_codes_are_those_of_the_file(theirs: Any) -> None:
    folder, _ = theirs("llama", "nf4-dq")
    saved = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    model = load_bitsandbytes(AutoModelForCausalLM, str(folder))
    for name, layer in low_bit_layers(model):
        assert torch.equal(layer.weight.flatten(), saved[f"{name}.weight"].flatten())


def test_int8_computes_as_bitsandbytes_on_request(theirs: Any) -> None:
    folder, expected = theirs("llama", "int8")
    model = load_bitsandbytes(AutoModelForCausalLM, str(folder), dtype=torch.float32, threshold=6.0)
    assert {layer.weights.threshold for _, layer in low_bit_layers(model)} == {6.0}
    assert 1e-4 < distance(logits(model), expected) < 0.1


@pytest.mark.parametrize("kind", ["nf4-dq", "int8"])
def test_conv1d_and_a_base_model(kind: str, theirs: Any) -> None:
    folder, expected = theirs("gpt2", kind)
    whole = load_bitsandbytes(AutoModelForCausalLM, str(folder), dtype=torch.float32)
    assert distance(logits(whole), expected) < 1e-5
    base = load_bitsandbytes(AutoModel, str(folder), dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(base(tokens()).last_hidden_state, whole.transformer(tokens()).last_hidden_state)


def test_experts_that_bitsandbytes_left_alone_stay_so(theirs: Any) -> None:
    folder, expected = theirs("mixtral", "nf4-dq")
    model = load_bitsandbytes(AutoModelForCausalLM, str(folder), dtype=torch.float32)
    assert not [layer for _, layer in low_bit_layers(model) if isinstance(layer, LowBitTensor)]
    assert distance(logits(model), expected) < 1e-5


def test_experts_that_were_quantised_one_by_one_are_refused_by_name(theirs: Any, tmp_path: Path) -> None:
    """As Transformers 4 did, where they were layers."""
    folder, _ = theirs("mixtral", "nf4-dq")
    state = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    expert = next(name for name in state if name.endswith("experts.1.w2.weight"))
    state[f"{expert}.quant_state.bitsandbytes__nf4"] = torch.zeros(3, dtype=torch.uint8)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match=r"experts\.1\.w2\.weight is in bitsandbytes' form.*one by one"):
        load_bitsandbytes(AutoModelForCausalLM, str(tmp_path))


def test_other_checkpoints_are_refused_by_name(folder: Folder, theirs: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a checkpoint of bitsandbytes: its config has no quantization_config"):
        load_bitsandbytes(AutoModelForCausalLM, str(folder("llama")))
    saved, _ = theirs("llama", "nf4-dq")
    with pytest.raises(ValueError, match="quantization_config must be left out"):
        load_bitsandbytes(AutoModelForCausalLM, str(saved), quantization_config=LowBitConfig("nf4"))


def test_damaged_weights_are_refused(theirs: Any, tmp_path: Path) -> None:
    saved, _ = theirs("llama", "nf4-dq")
    state = {k: v for file in saved.glob("*.safetensors") for k, v in load_file(file).items()}
    (tmp_path / "config.json").write_text((saved / "config.json").read_text())
    state["model.layers.0.mlp.up_proj.weight"] = state["model.layers.0.mlp.up_proj.weight"][:-1].clone()
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeError):  # Transformers wraps the errors of all tensors
        load_bitsandbytes(AutoModelForCausalLM, str(tmp_path))


def test_a_fresh_process_without_bitsandbytes(folder: Folder, theirs: Any, tmp_path: Path) -> None:
    """Loads both checkpoints of bitsandbytes, and a low-bit model with its adapter, with no special arguments."""
    model = AutoModelForCausalLM.from_pretrained(folder("llama"), quantization_config=LowBitConfig("int2"))
    model.save_pretrained(tmp_path / "model")
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj", "up_proj"], use_dora=True)).eval()
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_B" in name:
                p.normal_()
    wrapped.save_pretrained(tmp_path / "adapter")
    expected = {"adapter": logits(wrapped)}
    arguments: dict[str, Any] = {"model": str(tmp_path / "model"), "adapter": str(tmp_path / "adapter")}
    for kind in ("nf4-dq", "int8"):
        arguments[kind], expected[kind] = str(theirs("llama", kind)[0]), theirs("llama", kind)[1]
    (tmp_path / "arguments.json").write_text(json.dumps(arguments))
    run("transformers_fresh.py", tmp_path)
    found = torch.load(tmp_path / "found.pt")
    assert torch.equal(found["adapter"], expected["adapter"])
    assert distance(found["merged"], expected["adapter"]) < 1e-3 * 20  # rounded to bfloat16
    for kind in ("nf4-dq", "int8"):
        assert distance(found[kind], expected[kind]) < 1e-3
