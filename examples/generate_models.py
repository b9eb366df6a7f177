"""What ``generate.py`` writes with: a GPT on bytes, a language model of Transformers, or one with random weights.

A source loads its model in any form, "fp32", "bf16" or a format of ``lowbit_lightning.quantize``, and gives a reader of
it: a function from tokens ``[batch, length]`` to logits ``[batch, length, vocabulary]`` that goes on from the tokens
that it was given before, because it keeps their keys and values (a KV cache).

Low-bit forms compute in bfloat16. Their output layer, where each token of the vocabulary has a row, has a form of its
own, ``head``. An embedding that shares its weight with the output layer has that form too; others stay in bfloat16.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol

import lightning as L
import torch
from gpt import GPT, Text
from gpt_settings import Settings
from torch import Tensor, nn

import lowbit_lightning
from lowbit_lightning import experiments

Reader = Callable[[Tensor], Tensor]
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROMPT = 'def read(path):\n    """'


class Source(Protocol):
    name: str

    def load(self, form: str, head: str | None) -> Any:
        """The model, in memory of the CPU, for evaluation. ``head``: None leaves the output layer in bfloat16."""

    def reader(self, model: Any) -> Reader:
        """One that has read nothing yet."""

    def encode(self, text: str) -> Tensor:
        """Tokens ``[1, length]``."""

    def decode(self, tokens: list[int]) -> str:
        """Their text."""

    def held_out(self, windows: int) -> Iterator[Tensor]:
        """Up to so many windows of text that the model has not learnt from, in batches ``[batch, length]``."""


def choice(head: str | None, output: str, embedding: str, tied: bool) -> dict[str, Any]:
    """Arguments of ``quantize`` and of ``LowBitConfig``. ``output``, ``embedding``: names of the two layers; ``tied``:
    whether they share a weight."""
    if head is None:
        return {"output_layer": output}
    named = [output, embedding] if tied else [output]
    return {
        "output_layer": None,
        "overrides": dict.fromkeys(named, head),
        "embeddings": tied,
        "filter": lambda name, layer: name in named or not isinstance(layer, nn.Embedding),
    }


class Bytes:
    """The GPT of ``train_gpt.py``, from a checkpoint of Lightning. It was trained on windows of ``context`` bytes."""

    def __init__(self, checkpoint: str, text: str, context: int) -> None:
        self.name, self.context = f"GPT on bytes, {checkpoint}", context
        try:
            self.saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
            self.text = experiments.Text(text, context=context)
        except (FileNotFoundError, ValueError) as error:
            raise SystemExit(str(error)) from None

    def load(self, form: str, head: str | None) -> Any:
        model = experiments.GPT(**self.saved["hyper_parameters"])
        model.load_state_dict(self.saved["state_dict"])
        if form not in FLOATS:
            lowbit_lightning.quantize(model, form, **choice(head, "head", "tokens", tied=False))
        return model.to(FLOATS.get(form, torch.bfloat16)).eval().requires_grad_(False)

    def reader(self, model: Any) -> Reader:
        past = model.empty_past(self.context - 1)
        return lambda tokens: model(tokens, past)

    def encode(self, text: str) -> Tensor:
        return torch.tensor([list(text.encode())])

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")

    def held_out(self, windows: int) -> Iterator[Tensor]:
        self.text.validation_batches = -(-windows // self.text.batch)
        yield from self.text.val_dataloader()


def train(settings: Settings) -> str:
    """Trains the GPT in int8 with an 8-bit optimizer, as ``train_gpt.py`` does; returns its checkpoint."""
    L.seed_everything(settings.seed, verbose=False)
    trainer = L.Trainer(
        precision="int8-mixed",  # type: ignore[arg-type]  # known once lowbit_lightning is imported
        max_steps=settings.steps,
        limit_val_batches=0,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=settings.progress,
    )
    trainer.fit(GPT(settings, lowbit_lightning.optim.AdamW), Text(settings))
    path = Path(settings.out) / "gpt.ckpt"
    trainer.save_checkpoint(path, weights_only=True)
    return str(path)


class Hub:
    """A language model of Transformers and its tokenizer, by name or folder; loaded straight into low bits."""

    def __init__(self, name: str, text: str, context: int) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        self.name, self.context = name, context
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        with torch.device("meta"):
            self.parts = parts(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name)))
        try:
            whole = experiments.read_text(text)
        except FileNotFoundError as error:
            raise SystemExit(str(error)) from None
        self.text = whole[len(whole) // 10 * 9 :].decode(errors="replace")

    def load(self, form: str, head: str | None) -> Any:
        from transformers import AutoModelForCausalLM

        from lowbit_lightning.integrations.transformers import LowBitConfig

        config = None if form in FLOATS else LowBitConfig(form, **choice(head, **self.parts))
        dtype = FLOATS.get(form, torch.bfloat16)
        model = AutoModelForCausalLM.from_pretrained(self.name, dtype=dtype, quantization_config=config)
        return model.eval().requires_grad_(False)

    def reader(self, model: Any) -> Reader:
        return with_cache(model)

    def encode(self, text: str) -> Tensor:
        tokens: Tensor = self.tokenizer(text, return_tensors="pt")["input_ids"]
        return tokens

    def decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def held_out(self, windows: int) -> Iterator[Tensor]:
        tokens = self.encode(self.text[: 8 * windows * self.context])
        if tokens.shape[1] < self.context:
            raise SystemExit(f"--context {self.context}: the held-out text has {tokens.shape[1]} tokens")
        yield from tokens[:, : tokens.shape[1] // self.context * self.context].view(-1, 1, self.context)[:windows]


def with_cache(model: Any) -> Reader:
    from transformers import DynamicCache

    past = DynamicCache(config=model.config)
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"  # as 5.40 calls it
    return lambda tokens: model(input_ids=tokens, use_cache=True, **{name: past}).logits.float()


def parts(model: Any) -> dict[str, Any]:
    """The output layer's name, the embedding's, and whether they share a weight: of a model of Transformers."""
    names = {id(module): name for name, module in model.named_modules()}
    return {
        "output": names[id(model.get_output_embeddings())],
        "embedding": names[id(model.get_input_embeddings())],
        "tied": model.config.get_text_config().tie_word_embeddings,
    }


class Shape:
    """A model of a real one's shape with random weights, made here in bfloat16. It shows speed and memory; its texts
    mean nothing."""

    KNOWN: ClassVar[dict[str, dict[str, Any]]] = {
        "llama-1b": {  # Llama 3.2 1B: 1.24 billion weights, of them 0.26 in the output layer, which is the embedding
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128_256,
            "tie_word_embeddings": True,
        },
        "tinyllama-1.1b": {  # 1.1 billion weights, of them 0.07 in the output layer and as many in the embedding
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 22,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "vocab_size": 32_000,
        },
    }

    def __init__(self, shape: str) -> None:
        from transformers import LlamaConfig

        self.name, self.config = f"random weights, {shape}", LlamaConfig(**self.KNOWN[shape])

    def load(self, form: str, head: str | None) -> Any:
        from transformers import LlamaForCausalLM
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        dtype = FLOATS.get(form, torch.bfloat16)
        with torch.device("meta"):
            model = LlamaForCausalLM(self.config)
        noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(1)).mul_(0.02).to(dtype)
        model.to(dtype).to_empty(device="cpu")
        for p in model.requires_grad_(False).parameters():
            if p.ndim == 1:
                p.fill_(1)
                continue
            flat = p.view(-1)
            for start in range(0, len(flat), len(noise)):
                flat[start : start + len(noise)] = noise[: len(flat) - start]
        model.model.rotary_emb = LlamaRotaryEmbedding(self.config)  # computed, so nothing on the meta device
        model.tie_weights()
        if form not in FLOATS:
            lowbit_lightning.quantize(model, form, fit="absmax", **choice(head, **parts(model)))
        return model.eval()

    def reader(self, model: Any) -> Reader:
        return with_cache(model)

    def encode(self, text: str) -> Tensor:
        return torch.tensor([[byte % self.config.vocab_size for byte in text.encode()]])

    def decode(self, tokens: list[int]) -> str:
        return " ".join(map(str, tokens))

    def held_out(self, windows: int) -> Iterator[Tensor]:
        yield from ()
