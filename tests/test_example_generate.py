"""examples/generate.py: how it writes and what it counts; small runs of all three kinds of model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import generate
import generate_models
import pytest
import torch
from generate_models import Hub, Shape
from torch import Tensor, nn

from lowbit_lightning.experiments import GPT
from lowbit_lightning.layers.lowbit import LowBitLinear, LowBitWeight

TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 256,
    "tie_word_embeddings": True,
}
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec")


class Counter:
    """A reader of three tokens that finds the successor of the last one most likely."""

    def __init__(self) -> None:
        self.read: list[list[int]] = []

    def __call__(self, tokens: Tensor) -> Tensor:
        self.read += tokens.tolist()
        return 3.0 * nn.functional.one_hot((tokens + 1) % 3, 3).float()


def test_each_token_is_read_once_after_the_prompt() -> None:
    read = Counter()
    tokens, seconds = generate.write(read, torch.tensor([[2, 0]]), 4, temperature=0.0, seed=1)
    assert tokens == [1, 2, 0, 1]
    assert read.read == [[2, 0], [1], [2], [0], [1]]
    assert seconds > 0


def test_tokens_are_drawn_by_seed_and_temperature() -> None:
    def drawn(temperature: float, seed: int) -> list[int]:
        return generate.write(Counter(), torch.tensor([[0]]), 60, temperature, seed)[0]

    assert drawn(1.0, 1) == drawn(1.0, 1) != drawn(1.0, 2)
    steps = [(b - a) % 3 for a, b in zip([0, *drawn(1.0, 1)], drawn(1.0, 1), strict=False)]
    assert 0.7 < steps.count(1) / 60 < 1  # exp(3) / (exp(3) + 2) is 0.91
    assert drawn(0.05, 1) == drawn(0.0, 2)


def test_common_tokens() -> None:
    assert generate.common([1, 2, 3], [1, 2, 4]) == 2
    assert generate.common([1, 2], [1, 2]) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--forms nf4,nf5", "nf5"),
        ("--head int9", "int9"),
        ("--context 1", "--context >= 2"),
        ("--temperature -1", "--temperature >= 0"),
        ("--model a --shape llama-1b", "not allowed with"),
    ],
)
def test_bad_arguments_are_named(arguments: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        generate.parse(arguments.split())
    assert said in capsys.readouterr().err


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"line {n}\n" for n in range(400)))
    return path


def results_of(out: Path) -> dict[str, Any]:
    return {r["form"]: r for r in json.loads((out / "results.json").read_text())["results"]}


def test_a_gpt_is_trained_and_writes(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = generate_models.Settings
    monkeypatch.setattr(generate, "Settings", lambda **given: settings(**given, width=64, heads=2, progress=False))
    common = f"--text {text} --context 24 --windows 8 --tokens 30 --prompt line --out {tmp_path}"
    assert generate.main(f"--steps 2 --forms fp32,bf16,nf4 {common}".split()) == 0
    results = results_of(tmp_path)
    assert list(results) == ["fp32", "bf16", "nf4"]
    assert results["fp32"]["weights"] == 2 * results["bf16"]["weights"] > 5 * results["nf4"]["weights"]
    for r in results.values():
        assert len(r["tokens"]) == 30
        assert 150 < r["perplexity"] < 400  # of 256 bytes, none of which it knows yet
    assert results["nf4"]["perplexity"] == pytest.approx(results["fp32"]["perplexity"], rel=0.1)

    saved = torch.load(tmp_path / "gpt.ckpt", weights_only=True)
    model = GPT(**saved["hyper_parameters"])
    model.load_state_dict(saved["state_dict"])
    tokens = [*b"line", *results["fp32"]["tokens"][:10]]  # no longer than the context
    chances = (model.eval()(torch.tensor([tokens])) / 0.5).softmax(-1)[0, 3:-1]
    generator = torch.Generator().manual_seed(1)
    assert [int(torch.multinomial(row.detach(), 1, generator=generator)) for row in chances] == tokens[4:]

    assert generate.main(f"--model {tmp_path}/gpt.ckpt --forms fp32 {common}".split()) == 0
    assert results_of(tmp_path)["fp32"]["tokens"] == results["fp32"]["tokens"]
    assert "line" in (tmp_path / "generate.md").read_text()


@pytest.mark.parametrize("head", ["int8", "bf16"])
def test_a_shape(head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(Shape.KNOWN, "tiny", TINY)
    models = []
    load = Shape.load

    def kept(self: Shape, form: str, head: str | None) -> Any:
        models.append(load(self, form, head))
        return models[-1]

    monkeypatch.setattr(Shape, "load", kept)
    assert generate.main(f"--shape tiny --forms bf16,nf4 --head {head} --tokens 3 --out {tmp_path}".split()) == 0
    _, low = models
    assert {str(m.weights) for m in low.model.layers.modules() if isinstance(m, LowBitLinear)} == {"nf4"}
    assert isinstance(low.lm_head, LowBitWeight) == isinstance(low.model.embed_tokens, LowBitWeight) == (head == "int8")
    assert low.lm_head.weight is low.model.embed_tokens.weight
    results = results_of(tmp_path)
    assert results["bf16"]["perplexity"] is None
    assert results["bf16"]["weights"] > 1.8 * results["nf4"]["weights"]
    assert len(results["nf4"]["tokens"]) == 3


def test_a_model_of_transformers(text: Path, tmp_path: Path) -> None:
    """One with its tokenizer in a folder; what it writes is what Transformers' own ``generate`` writes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = {letter: n for n, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    folder = tmp_path / "model"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    torch.manual_seed(1)
    whole = LlamaForCausalLM(LlamaConfig(**TINY, initializer_range=0.2)).eval()
    whole.save_pretrained(folder)

    common = f"--model {folder} --text {text} --context 16 --windows 4 --tokens 8 --prompt line --temperature 0"
    assert generate.main(f"{common} --forms fp32,int8 --out {tmp_path}".split()) == 0
    results = results_of(tmp_path)
    prompt = Hub(str(folder), str(text), 16).encode("line")
    expected = whole.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert results["fp32"]["tokens"] == expected[0, prompt.shape[1] :].tolist()
    assert results["int8"]["perplexity"] == pytest.approx(results["fp32"]["perplexity"], rel=0.05)
    assert results["fp32"]["weights"] > 3 * results["int8"]["weights"]
