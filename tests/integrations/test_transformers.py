"""``LowBitConfig`` in real Transformers: load, save, generate, dequantize, and the errors."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.hub_models import llama, tokens
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import lowbit_lightning
from lowbit_lightning import convert
from lowbit_lightning.convert.lowbit import low_bit_layers
from lowbit_lightning.integrations import transformers as integration
from lowbit_lightning.integrations.transformers import LowBitConfig, quantize_pretrained
from lowbit_lightning.integrations.transformers.quantizer import Quantize
from lowbit_lightning.kernels import calls, reset_calls
from lowbit_lightning.layers.experts import LowBitTensor

Folder = Callable[[str], Path]
WHOLE: dict[str, Any] = {"embeddings": True, "output_layer": None}


def load(folder: Path, weights: str | None = "nf4", kind: Any = AutoModelForCausalLM, **options: Any) -> Any:
    if weights is None:
        return kind.from_pretrained(folder, **options)
    return kind.from_pretrained(folder, quantization_config=LowBitConfig(weights, **options))


def in_place(folder: Path, weights: str = "nf4", **options: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    return lowbit_lightning.quantize(model, weights, **options)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens()).logits


def settings(model: Any) -> dict[str, str]:
    return {name: f"{low.weights}, {low.weights.compute_dtype}" for name, low in low_bit_layers(model)}


def saved_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def assert_same_state(one: nn.Module, other: nn.Module) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


def test_public_names() -> None:
    assert integration.__all__ == [
        *("LowBitConfig", "LowBitQuantizer", "load_bitsandbytes", "optimizer", "quantize_pretrained"),
    ]


# -- loading and saving ----------------------------------------------------------------------------------------------

CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "nf4", {}),
    ("llama", "int2", {"overrides": {"*.down_proj": "int8", "*.0.*": {"weights": "int4", "fit": "absmax"}}}),
    ("llama", "int8", {"threshold": 6.0, "compute_dtype": torch.float32, "exclude": "*.0.*"}),
    ("tied", "nf4-dq", WHOLE),
    ("gpt2", "int3", {}),
    ("mixtral", "nf4", {}),
]


@pytest.mark.parametrize(("name", "weights", "options"), CASES)
def test_loads_as_quantize_does_and_comes_back_to_the_bit(
    name: str, weights: str, options: dict[str, Any], folder: Folder, tmp_path: Path
) -> None:
    model = load(folder(name), weights, **options)
    assert_same_state(model, in_place(folder(name), weights, **options))
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    again = load(tmp_path, None)
    assert_same_state(again, model)
    assert [str(low.weights) for _, low in low_bit_layers(again)] == [
        str(low.weights) for _, low in low_bit_layers(model)
    ]
    assert torch.equal(logits(again), logits(model))
    assert not any(
        p.requires_grad for _, low in low_bit_layers(again) for p in low.parameters(recurse=False) if p.ndim > 1
    )


def test_experts_are_in_four_bits_and_generation_is_that_of_the_model_quantised_in_place(folder: Folder) -> None:
    model, other = load(folder("mixtral")), in_place(folder("mixtral"))
    experts = [layer for _, layer in low_bit_layers(model) if isinstance(layer, LowBitTensor)]
    assert len(experts) == 4
    assert {layer.format.bits for layer in experts} == {4}
    plain = sum(p.numel() for n, p in model.named_parameters() if p.is_floating_point() and p.ndim > 1)
    assert plain == 2 * 128 * 64 + 2 * 4 * 64, "embedding, head and routers are all that is left in high precision"
    reset_calls()
    logits(model)
    assert not [op for op, _ in calls() if "dequantize" in op], "an expert is read in packed form"
    given = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(tokens(), **given), other.generate(tokens(), **given))


def test_a_base_model_loads_from_a_whole_one_and_the_reverse(folder: Folder, tmp_path: Path) -> None:
    model = load(folder("llama"))
    model.save_pretrained(tmp_path / "whole")
    base = AutoModel.from_pretrained(tmp_path / "whole")
    assert_same_state(base, model.model)
    base.save_pretrained(tmp_path / "base")
    assert_same_state(AutoModelForCausalLM.from_pretrained(tmp_path / "base").model, base)


def test_a_new_head_stays_in_high_precision(folder: Folder, tmp_path: Path) -> None:
    model = load(folder("llama"), kind=AutoModelForSequenceClassification, output_layer=None)
    assert type(model.score) is nn.Linear
    assert model.score.weight.requires_grad
    model.save_pretrained(tmp_path)
    assert_same_state(load(tmp_path, None, AutoModelForSequenceClassification), model)


def test_dtype_is_that_of_everything_else(folder: Folder) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        folder("llama"), quantization_config=LowBitConfig("nf4"), dtype=torch.float32
    )
    assert model.dtype == torch.float32
    assert logits(model).dtype == torch.float32
    other = AutoModelForCausalLM.from_pretrained(folder("llama"), dtype=torch.float32)
    assert_same_state(model, lowbit_lightning.quantize(other, "nf4"))


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_device_maps(device_map: Any, folder: Folder) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        folder("llama"), quantization_config=LowBitConfig("nf4"), device_map=device_map
    )
    assert torch.equal(logits(model), logits(in_place(folder("llama"))))


def test_moves_and_casts(folder: Folder) -> None:
    """``model.to`` works for devices and dtypes; bitsandbytes' refuses both at times."""
    model = load(folder("llama"))
    codes = {name: (low.weight.clone(), low.weight_scales.clone()) for name, low in low_bit_layers(model)}
    model.to("cpu").to(torch.float32)
    assert logits(model).dtype == torch.float32
    for name, low in low_bit_layers(model):
        assert torch.equal(low.weight, codes[name][0])
        assert torch.equal(low.weight_scales, codes[name][1])


def test_disk_offload_of_a_saved_model_and_the_error_while_quantising(folder: Folder, tmp_path: Path) -> None:
    device_map = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    device_map["lm_head"] = "cpu"
    with pytest.raises(ValueError, match=r"device_map puts \['model.layers'\] on disk.*save_pretrained"):
        AutoModelForCausalLM.from_pretrained(
            folder("llama"), quantization_config=LowBitConfig("nf4"), device_map=device_map, offload_folder=tmp_path
        )
    model = load(folder("llama"))
    model.save_pretrained(tmp_path / "saved")
    away = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert torch.equal(logits(away), logits(model))
    with pytest.raises(ValueError, match="offloaded to disk or to the CPU"):
        away.dequantize()


def test_offload_to_the_cpu(folder: Folder) -> None:
    """By accelerate: a layer's codes are on the device only while it computes."""
    from accelerate import cpu_offload

    model, whole = load(folder("tied"), **WHOLE), load(folder("tied"), **WHOLE)
    cpu_offload(model, execution_device="cpu")
    assert all(p.is_meta for p in model.parameters())
    assert torch.equal(logits(model), logits(whole))


def test_experts_are_offloaded_too(folder: Folder, tmp_path: Path) -> None:
    model = load(folder("mixtral"))
    model.save_pretrained(tmp_path)
    away = load(tmp_path, None, device_map={"model": "disk", "lm_head": "cpu"}, offload_folder=tmp_path / "offload")
    assert next(low for _, low in low_bit_layers(away) if isinstance(low, LowBitTensor)).weight.is_meta
    assert torch.equal(logits(away), logits(model))


# -- dequantize, and models in memory --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tied", "mixtral", "gpt2"])
def test_dequantize_gives_an_ordinary_model(name: str, folder: Folder, tmp_path: Path) -> None:
    model = load(folder(name), **WHOLE)
    expected = logits(model)
    model.dequantize()
    assert not list(low_bit_layers(model))
    assert (logits(model) - expected).abs().max() <= 0.02 * expected.abs().max()
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = load(tmp_path, None)
    assert torch.equal(logits(again), logits(model))
    assert all(p.requires_grad for p in model.parameters())
    if name == "tied":
        assert model.lm_head.weight is model.model.embed_tokens.weight
    if name == "mixtral":
        names = (
            json.loads((tmp_path / "model.safetensors.index.json").read_text())
            if (tmp_path / "model.safetensors.index.json").exists()
            else {"weight_map": convert.files.tensors(tmp_path)}
        )
        assert any("experts.0.w1.weight" in name for name in names["weight_map"]), "the hub's names again"


def test_a_model_in_memory(folder: Folder, tmp_path: Path) -> None:
    model = quantize_pretrained(AutoModelForCausalLM.from_pretrained(folder("mixtral")), LowBitConfig("int4"))
    assert_same_state(model, in_place(folder("mixtral"), "int4"))
    model.save_pretrained(tmp_path)
    assert_same_state(load(tmp_path, None), model)
    with pytest.raises(ValueError, match="quantised already"):
        quantize_pretrained(model, LowBitConfig("nf4"))
    assert not getattr(model.dequantize(), "is_quantized", False)


def test_dequantize_puts_hooks_of_accelerate_back(folder: Folder) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Counts(ModelHook):
        calls = 0

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            Counts.calls += 1
            return args, kwargs

    model = load(folder("llama"))
    add_hook_to_module(model.model.layers[0].mlp.up_proj, Counts())
    logits(model.dequantize())
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert Counts.calls == 1


# -- four traps that are silent --------------------------------------------------------------------------------------


def test_trap_1_nothing_is_cast_to_uint8_on_its_way(folder: Folder) -> None:
    """Transformers casts what it loads to the dtype of the parameter, unless the op has ``hf_quantizer``."""
    quantizer = load(folder("llama")).hf_quantizer
    assert quantizer.get_quantize_ops().hf_quantizer is quantizer
    assert isinstance(quantizer.get_quantize_ops(), Quantize)
    model = load(folder("llama"), "int8")
    for _, low in low_bit_layers(model):
        assert low.snr_db is not None
        assert low.snr_db > 35, "weights are below 1, so that a cast to uint8 would have made them zero"


def test_trap_2_no_key_sends_the_config_to_bitsandbytes(folder: Folder, tmp_path: Path) -> None:
    load(folder("llama"), "int8").save_pretrained(tmp_path)
    assert not [key for key in saved_config(tmp_path) if key.removeprefix("_").startswith("load_in")]
    assert isinstance(load(tmp_path, None).config.quantization_config, LowBitConfig)


def test_trap_3_counting_parameters_does_not_ask_bitsandbytes(folder: Folder) -> None:
    model = load(folder("llama"))
    assert not hasattr(model, "is_loaded_in_4bit")
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())


def test_trap_4_a_config_that_is_saved_again_stays_the_same(folder: Folder, tmp_path: Path) -> None:
    options: dict[str, Any] = {"exclude": ["*.1.*"]}
    options |= {"overrides": {"*.down_proj": {"weights": "int8", "compute_dtype": torch.float32}}}
    load(folder("llama"), "nf4", **options).save_pretrained(tmp_path / "0")
    for i in range(2):
        load(tmp_path / str(i), None).save_pretrained(tmp_path / str(i + 1))
    assert saved_config(tmp_path / "2") == saved_config(tmp_path / "0")
    config = LowBitConfig("nf4", **options)
    assert LowBitConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": "nf5"}, "format of weights must be one of"),
        ({"weights": "nf4", "threshold": 6.0}, "threshold must be 0, or positive for int8"),
        ({"weights": "nf4", "compute_dtype": "bfloat17"}, "a dtype must be None, float32"),
        ({"weights": "nf4", "overrides": {"*": "x"}}, r"overrides\['\*'\]='x' must be None or settings"),
    ],
)
def test_bad_settings_are_named_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LowBitConfig(**arguments)


def test_a_pattern_that_matches_nothing_lists_the_layers(folder: Folder) -> None:
    with pytest.raises(ValueError, match=r"exclude='\*.nothing' matches no layer; there are: model.layers"):
        load(folder("llama"), exclude="*.nothing")


def test_a_config_of_a_newer_version_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"\['rotation'\], which this version of lowbit_lightning does not know"):
        LowBitConfig.from_dict({"quant_method": "lowbit_lightning", "weights": "nf4", "rotation": True})


def test_a_file_in_another_format_than_its_config_is_refused(folder: Folder, tmp_path: Path) -> None:
    load(folder("llama"), "nf4").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    layers = config["quantization_config"]["layers"]
    config["quantization_config"]["layers"] = dict.fromkeys(layers, "fp4")  # of the same shapes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"q_proj was saved as nf4, but its settings say fp4"):
        load(tmp_path, None)


def test_a_file_that_lacks_codes_is_refused(folder: Folder, tmp_path: Path) -> None:
    load(folder("llama"), "nf4").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"the checkpoint lacks model.layers.1.mlp.up_proj.weight"):
        load(tmp_path, None)


def test_tied_weights_in_two_formats_are_refused(folder: Folder) -> None:
    with pytest.raises(ValueError, match="are one weight, but are int8 and nf4"):
        load(folder("tied"), **WHOLE, overrides={"lm_head": "int8"})


def test_an_embedding_whose_head_stays_stays_too(folder: Folder) -> None:
    model = load(folder("tied"), embeddings=True)
    assert type(model.model.embed_tokens) is nn.Embedding
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_filter_decides_and_is_not_saved(folder: Folder, tmp_path: Path) -> None:
    model = load(folder("llama"), filter=lambda name, layer: "mlp" in name)
    assert all("mlp" in name for name, _ in low_bit_layers(model))
    model.save_pretrained(tmp_path)
    assert_same_state(load(tmp_path, None), model)


@pytest.mark.skipif(torch.__version__.startswith("2.7"), reason="torch 2.7's compiler cannot trace it")
@pytest.mark.slow
def test_compiles_as_one_graph(folder: Folder) -> None:
    model = load(folder("llama"))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(logits(compiled), logits(model))


def test_a_copy_is_whole(folder: Folder) -> None:
    model = load(folder("llama"))
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert_same_state(again, model)
    assert torch.equal(logits(again), logits(model))
    again.dequantize()


def test_a_gradient_reaches_the_input(folder: Folder) -> None:
    model = llama()
    quantize_pretrained(model, LowBitConfig("nf4"))
    embedded = model.model.embed_tokens(tokens()).detach().requires_grad_()
    model(inputs_embeds=embedded).logits.square().sum().backward()
    assert embedded.grad is not None
    assert embedded.grad.abs().sum() > 0
