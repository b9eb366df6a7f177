"""The ways to train that ``bert.py`` compares, and how one is planned and run: plain Lightning throughout."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning as L
import peft
import running
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.utils import logging as transformers_logging

import lowbit_lightning
from lowbit_lightning import memory

Batch = tuple[Tensor, Tensor, Tensor]
"""Tokens, mask and classes: int64 [batch, length] twice, and [batch]."""

KINDS = ("parameters", "gradients", "states", "activations")  # of a plan's bytes
ADAPTED = ["query", "key", "value", "dense"]


@dataclass(frozen=True)
class Way:
    """``prepare`` changes a pretrained model, ``optimizer`` is made of the parameters that train; ``precision`` is
    Lightning's. ``bits``: of optimizer states, None for torch's own optimizer."""

    precision: Any
    optimizer: Callable[..., torch.optim.Optimizer]
    bits: int | None = 8
    prepare: Callable[[nn.Module], nn.Module] = lambda model: model


def low_bits(module: nn.Module, weights: str = "nf4", overrides: Mapping[str, str] | None = None) -> nn.Module:
    """In place: every linear layer but the classifier, and every embedding. ``overrides``: pattern -> other weights.

    nf4's default fit gives bitsandbytes' codes to the bit; least squares gives a smaller error.
    """
    return lowbit_lightning.quantize(
        module,
        weights,
        fit="lsq" if weights == "nf4" else None,
        exclude="*classifier*",
        output_layer=None,
        embeddings=True,
        overrides=overrides,
    )


def with_adapters(model: nn.Module, rank: int = 16) -> nn.Module:
    """LoRA (Hu et al., 2021) on every linear layer; the classifier trains as it is, nothing else does."""
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=ADAPTED, modules_to_save=["classifier"])
    return peft.get_peft_model(model, config)


def ways(lr: float, lora_lr: float, rank: int = 16) -> dict[str, Way]:
    full, adapters = partial(lowbit_lightning.optim.AdamW, lr=lr), partial(lowbit_lightning.optim.AdamW, lr=lora_lr)
    return {
        "fp32": Way("32-true", partial(torch.optim.AdamW, lr=lr), bits=None),
        "int8-mixed": Way("int8-mixed", full),
        "fp32 + LoRA": Way("32-true", adapters, prepare=lambda model: with_adapters(model, rank)),
        "nf4 + LoRA": Way("32-true", adapters, prepare=lambda model: with_adapters(low_bits(model), rank)),
    }


class Classifier(L.LightningModule):
    """Any model of Transformers that returns logits. ``optimizer``: makes one of the parameters that train."""

    def __init__(self, model: nn.Module, optimizer: Callable[..., torch.optim.Optimizer], steps: int) -> None:
        super().__init__()
        self.model, self.optimizer, self.steps = model, optimizer, steps
        self.losses: list[Tensor] = []

    def training_step(self, batch: Batch, index: int) -> Tensor:
        loss = loss_of(self.model, batch)
        self.log("train_loss", loss, prog_bar=True)
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer([p for p in self.parameters() if p.requires_grad])
        warmup = max(1, self.steps // 10)

        def factor(step: int) -> float:  # linear warm-up, then linearly down to zero
            return min((step + 1) / warmup, 1 - step / self.steps)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    ids, mask, classes = batch
    return nn.functional.cross_entropy(model(input_ids=ids, attention_mask=mask).logits.float(), classes)


def train(model: nn.Module, way: Way, batches: Sequence[Batch], accelerator: str = "auto") -> list[float]:
    """A step for each batch, in place; returns the losses."""
    trainer = L.Trainer(
        precision=way.precision,
        max_steps=len(batches),
        accelerator=accelerator,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stdout.isatty(),
    )
    module = Classifier(model.train(), way.optimizer, len(batches))  # Transformers loads models in evaluation mode
    trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return [loss.item() for loss in module.losses]


def planned(model: nn.Module, way: Way, batch: Batch) -> memory.Plan:
    """Of a prepared model, on the meta device too: bytes of a training run, before anything of it is allocated."""
    return memory.plan(model, precision=way.precision, optimizer="AdamW", bits=way.bits, batch=batch, step=loss_of)


def quiet() -> None:
    """Leaves out what Lightning and Transformers say of every run."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    running.quiet()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # Transformers 5.24
