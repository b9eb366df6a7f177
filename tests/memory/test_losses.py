"""What a model's own loss takes: that of a LightningModule, of a model that takes labels, and of any other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
import pytest
import support.planned_memory as real
import torch
from support.planned_memory import on_meta, within
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lowbit_lightning import memory, optim

VOCABULARY, WIDTH, LENGTH, BATCH = 2003, 64, 64, 8


class Body(nn.Module):
    """A small language model: most of what its training holds is between the last layer and the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.layers = nn.Sequential(*[nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(3)])

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layers(self.embedding(tokens)))


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.body = Body()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.body(tokens)

    def loss(self, batch: Any) -> Tensor:
        tokens, targets = batch
        loss = cross_entropy(self(tokens).flatten(0, 1).float(), targets.flatten())
        self.log("loss", loss)
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        assert batch_idx == 0
        return {"loss": self.loss(batch)}

    def training_step_loss(self, batch: Any) -> Tensor:
        return self.training_step(batch, 0)["loss"]


class WithoutIndex(Module):
    def training_step(self, batch: Any) -> Any:  # type: ignore[override]
        return self.loss(batch)


@dataclass
class Output:
    loss: Tensor | None
    logits: Tensor


class Labelled(nn.Module):
    """The interface of a causal language model in Transformers."""

    def __init__(self, as_tuple: bool = False) -> None:
        super().__init__()
        self.body, self.as_tuple = Body(), as_tuple

    def forward(self, input_ids: Tensor, mask: Tensor | None = None, labels: Tensor | None = None) -> Any:
        logits, loss = self.body(input_ids), None
        if labels is not None:
            shifted = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
            loss = cross_entropy(logits.float().flatten(0, 1), shifted.flatten())
        return (
            (logits,) if self.as_tuple and loss is None else (loss, logits) if self.as_tuple else Output(loss, logits)
        )


class Decoder(Labelled):
    """One that makes its inputs from its labels, and has no logits without."""

    def forward(self, input_ids: Tensor, mask: Tensor | None = None, labels: Tensor | None = None) -> Any:
        if labels is None:
            raise ValueError("give labels")
        return super().forward(input_ids, mask, labels)


class Classifier(nn.Module):
    """One row of logits for a whole sequence."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body, self.out = Body(), nn.Linear(VOCABULARY, classes)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        logits = self.out(self.body(input_ids).mean(1))
        if labels is None:
            return {"logits": logits}
        loss = cross_entropy(logits, labels) if labels.dtype == torch.int64 else (logits.squeeze() - labels).square()
        return {"loss": loss.mean(), "logits": logits}


def tokens() -> Tensor:
    return torch.randint(0, VOCABULARY, (BATCH, LENGTH))


def labelled(model: nn.Module, batch: Any) -> Any:
    out = model(batch, labels=batch)
    return out[0] if isinstance(out, tuple) else out["loss"] if isinstance(out, dict) else out.loss


RUNS: dict[str, tuple[Callable[[], nn.Module], Any, Callable[[Any, Any], Any], str]] = {
    "a LightningModule": (Module, (tokens(), tokens()), Module.training_step_loss, "training_step"),
    "without a batch's number": (WithoutIndex, (tokens(), tokens()), Module.loss, "training_step"),
    "labels": (Labelled, tokens(), labelled, "labels"),
    "labels, a tuple": (lambda: Labelled(True), (tokens(),), lambda m, b: labelled(m, b[0]), "labels"),
    "labels, a dict": (Labelled, {"input_ids": tokens()}, lambda m, b: labelled(m, b["input_ids"]), "labels"),
    "a decoder": (Decoder, tokens(), labelled, "labels"),
    "labels in the batch": (
        *(Labelled, {"input_ids": tokens(), "labels": tokens()}, lambda m, b: m(**b).loss),
        "forward",
    ),
}


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
@pytest.mark.parametrize("name", RUNS)
def test_the_models_own_loss_is_planned(name: str) -> None:
    make, batch, loss, says = RUNS[name]

    def build() -> Callable[[], None]:
        model = make()
        optimizer = optim.AdamW(model.parameters())

        def step() -> None:
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()

        return step

    planned = memory.plan(on_meta(make), batch=batch)
    assert planned.settings["loss"] == says
    assert within(planned.total, real.peak_of(build), 0.05)
    summed = memory.plan(on_meta(make), batch=batch, step=lambda model, batch: model.body(batch_of(batch)).sum())
    assert summed.total < 0.8 * planned.total  # what was planned before: the loss of a language model is most of it


def batch_of(batch: Any) -> Tensor:
    return batch["input_ids"] if isinstance(batch, dict) else batch[0] if isinstance(batch, tuple) else batch


@pytest.mark.parametrize("classes", [1, 7])
def test_labels_have_the_shape_of_the_logits(classes: int) -> None:
    """A class for each sequence; a number, where there is one logit."""
    seen: list[Tensor] = []
    model = on_meta(lambda: Classifier(classes))
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.extend(kwargs[k] for k in kwargs if k == "labels"), with_kwargs=True
    )
    assert memory.plan(model, batch=tokens()).settings["loss"] == "labels"
    (labels,) = seen
    assert (tuple(labels.shape), labels.dtype) == ((BATCH,), torch.int64 if classes > 1 else torch.float32)


def test_a_model_without_a_loss_says_so() -> None:
    planned = memory.plan(on_meta(Body), batch=tokens())
    assert planned.settings["loss"] == "sum of outputs"
    assert "loss=sum of outputs" in planned.table().splitlines()[0]
    given = memory.plan(on_meta(Body), batch=tokens(), step=lambda model, batch: model(batch).logsumexp(-1).sum())
    assert given.settings["loss"] == "step"
    assert given.total > planned.total


class NeedsTrainer(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch) / self.trainer.num_training_batches


def test_a_step_that_needs_its_trainer_is_named() -> None:
    with pytest.raises(ValueError, match=r"batch=int64 \[8, 64\], int64 \[8, 64\] could not be run .*Trainer.*step\("):
        memory.plan(NeedsTrainer(), batch=(tokens(), tokens()))
    if torch.__version__ >= "2.8":  # 2.7 looks floats up too, on meta
        with pytest.raises(ValueError, match=r"batch=float32 \[8, 64\] could not be run without values: .*int64"):
            memory.plan(Labelled(), batch=torch.zeros(8, 64))
