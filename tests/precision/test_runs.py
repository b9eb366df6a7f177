"""What a whole run does around the step: casts that are kept, state memory that is freed, hooks that can't be read."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from support.quiet import quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lowbit_lightning import Int8MixedPrecision, optim


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.head = nn.Linear(64, 64), nn.Linear(64, 8)

    def training_step(self, x: Tensor, index: int) -> Tensor | None:
        return self.head(self.net(x)).square().mean()

    def configure_optimizers(self) -> Any:
        return optim.SGD(self.parameters(), lr=1e-2, momentum=0.9, min_size=64)


def fit(module: L.LightningModule, **options: Any) -> L.Trainer:
    trainer = quiet_trainer(**options)
    trainer.fit(module, DataLoader(torch.ones(8, 64), batch_size=4))  # type: ignore[arg-type]
    return trainer


def test_a_step_of_manual_optimization_sees_its_own_update() -> None:
    class Manual(Module):
        changes: list[float]

        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization, self.changes = False, []

        def training_step(self, x: Tensor, index: int) -> None:
            optimizer: Any = self.optimizers()
            before = self.head(x).float()  # in bf16; `net` is in int8
            optimizer.zero_grad()
            self.manual_backward(before.sum())
            optimizer.step()
            self.changes.append(float((self.head(x).float() - before).detach().abs().max()))

    module = Manual()
    fit(module, plugins=[Int8MixedPrecision(autocast="bf16")])
    assert all(change > 1e-3 for change in module.changes), module.changes


def test_states_that_were_moved_leave_no_memory_behind() -> None:
    references: list[weakref.ref[Tensor]] = []

    class Moved(L.Callback):
        def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
            state = trainer.optimizers[0].state
            for p, entries in state.items():  # as Lightning moves them to the CPU at the end, from a GPU
                references.extend(weakref.ref(value) for value in entries.values())
                state[p] = {name: value.clone() for name, value in entries.items()}

    trainer = fit(Module(), callbacks=[Moved()])
    gc.collect()
    assert len(references) > 4
    assert not any(reference() is not None for reference in references)
    assert trainer.optimizers  # which is alive, and so would be what it holds


def test_a_hook_without_code_counts_as_one_that_looks() -> None:
    class Hook:
        calls = 0

        def __call__(self, *_: Any) -> None:
            self.calls += 1

    hook = Hook()
    fit(Module(), callbacks=[LambdaCallback(on_before_optimizer_step=hook)], gradient_clip_val=0.1)
    assert hook.calls == 2


@pytest.mark.parametrize("part", [lambda module: module, lambda module: module.net], ids=["module", "submodule"])
def test_released_gradients_cannot_be_clipped(part: Callable[[Module], nn.Module]) -> None:
    class Released(Module):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            optim.release_gradients(part(self), optimizer)
            return optimizer

    with pytest.raises((ValueError, RuntimeError), match=r"gradient_clip_val=0\.1 .*release"):
        fit(Released(), gradient_clip_val=0.1)


def test_removed_release_can_be_clipped_again() -> None:
    optimizer = optim.SGD([nn.Parameter(torch.randn(64, 64))], lr=0.1)
    released = optim.release_gradients(nn.Linear(2, 2), optimizer)
    assert optimizer.releases_gradients
    released.remove()
    assert not optimizer.releases_gradients
