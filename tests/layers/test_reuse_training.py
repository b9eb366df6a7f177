"""Reused int8 forms of weights in other ways to train: against the same training with ``cache_weights=False``."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import callbacks
from support.reuse import LAYERS, WIDTH, Model, assert_same, edit_in_place, empty_store, state, stepped, twins, window
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lowbit_lightning import kernels, optim
from lowbit_lightning.layers import weights

__all__ = ["empty_store"]  # used by pytest


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool) -> None:
    one, two = twins(reentrant=reentrant)
    optimizers = stepped(one), stepped(two)
    for _ in range(2):
        kernels.reset_calls()
        for model in (one, two):
            model(torch.ones(8, WIDTH)).square().mean().backward()
        assert kernels.calls()["int8_matmul", "cpu"] == 2 * 4 * LAYERS  # the forward runs twice
        assert_same(one, two)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_tied_weights() -> None:
    one, two = twins(tied=True)
    optimizers = stepped(one), stepped(two)
    for _ in range(2):
        assert window(one) == 2 * (LAYERS - 1)
        assert window(two) == 2 * 2 * LAYERS
        assert_same(one, two)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_released_gradients() -> None:
    """Weights change inside backward, one after the other."""
    one, two = twins()
    optimizers = []
    for model in (one, two):
        optimizer = optim.AdamW(model.parameters(), lr=0.01, min_size=0)
        optim.release_gradients(model, optimizer)
        optimizers.append(optimizer)
    for step in range(3):
        made = window(one, 1)
        assert made == 2 * LAYERS
        window(two, 1)
        for optimizer in optimizers:
            optimizer.step()
        assert_same(one, two)
        assert len(weights._store) == 0, f"step {step}"


def step_at_once(optimizer: torch.optim.Optimizer) -> Callable[[Tensor], None]:
    def hook(p: Tensor) -> None:
        optimizer.step()
        optimizer.zero_grad()

    return hook


def test_optimizers_in_backward() -> None:
    one, two = twins()
    for model in (one, two):
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(step_at_once(torch.optim.SGD([p], lr=0.1)))
    for _ in range(3):
        window(one, 3), window(two, 3)
        assert_same(one, two)


def test_closures_that_look_again_after_a_change() -> None:
    one, two = twins()
    for model in (one, two):
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)

        def closure(model: Model = model, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = model(torch.ones(8, WIDTH)).square().mean()
            loss.backward()
            return loss

        for _ in range(2):
            optimizer.step(closure)
    assert_same(one, two)


def test_sharpness_aware_steps() -> None:
    """Two passes in a step, at two places."""
    one, two = twins()
    optimizers = stepped(one), stepped(two)
    for model, optimizer in zip((one, two), optimizers, strict=True):
        window(model, 1)
        before = [p.detach().clone() for p in model.parameters()]
        with torch.no_grad():
            for p in model.parameters():
                p.add_(p.grad)  # type: ignore[arg-type]
        optimizer.zero_grad()
        window(model, 1)
        for p, value in zip(model.parameters(), before, strict=True):
            p.data = value
        optimizer.step()
        window(model, 1)
    assert_same(one, two)


def test_two_models_with_an_optimizer_each() -> None:
    pairs = twins(), twins()
    optimizers = [[stepped(model) for model in pair] for pair in pairs]
    for _ in range(2):
        for pair, own in zip(pairs, optimizers, strict=True):
            for models in pairs:
                assert window(models[0]) <= 2 * LAYERS
                window(models[1])
            assert_same(*pair)
            for optimizer in own:
                optimizer.step()
                optimizer.zero_grad()
    for pair in pairs:
        assert_same(*pair)


def test_threads() -> None:
    """Each empties the store under the other's hands."""
    pairs = [twins() for _ in range(2)]
    errors: list[BaseException] = []

    def train(one: Model, two: Model) -> None:
        try:
            optimizers = stepped(one), stepped(two)
            for _ in range(25):
                for model in (one, two):
                    for i in range(2):
                        x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(i))
                        model(x).square().mean().backward()
                assert_same(one, two)
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=train, args=pair) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own, when it is first imported
def test_compiled(backend: str) -> None:
    one, two = twins()
    runs: list[Any] = [torch.compile(model, backend=backend, fullgraph=True) for model in (one, two)]
    optimizers = stepped(one), stepped(two)
    for _ in range(3):
        assert window(runs[0]) == 2 * LAYERS
        assert window(runs[1]) == 2 * 2 * LAYERS
        assert_same(one, two)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


class Module(L.LightningModule):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.validated: list[float] = []

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.model(batch[0]).square().mean()

    def validation_step(self, batch: Any, index: int) -> None:
        self.validated.append(self.model(batch[0]).square().mean().item())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.skipif(not hasattr(callbacks, "WeightAveraging"), reason="Lightning has it from 2.6 on")
def test_lightnings_weight_averaging_in_the_middle_of_a_window() -> None:
    """Averaged weights are swapped in by ``.data`` for a validation between two accumulated batches."""
    results = []
    for model in twins():
        module = Module(model)
        data = TensorDataset(torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(0)))
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=1,
            accumulate_grad_batches=2,
            val_check_interval=3,
            num_sanity_val_steps=0,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            callbacks=[callbacks.WeightAveraging(avg_fn=lambda average, new, count: 0.5 * (average + new))],
        )
        trainer.fit(module, DataLoader(data, 2), DataLoader(data, 8))
        results.append((module.validated, state(model)))
    assert results[0][0] == results[1][0]
    for name, value in results[0][1].items():
        assert torch.equal(value, results[1][1][name]), name


# -- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_gpu_reuses_on_one_stream() -> None:
    one, two = (model.cuda() for model in twins())
    optimizers = stepped(one), stepped(two)
    for _ in range(2):
        assert window(one) == 2 * LAYERS
        assert window(two) == 2 * 2 * LAYERS
        assert_same(one, two)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # nothing tells that the other stream is done with making the forms
            assert window(one) == 2 * LAYERS
        torch.cuda.current_stream().wait_stream(side)
        window(two)
        assert_same(one, two)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.gpu
def test_a_captured_pass_quantises_weights_itself() -> None:
    """Its replays run no Python: a form made before the capture would serve for ever."""
    model, _ = twins()
    model.cuda()
    keep = stepped(model)
    x = torch.randn(8, WIDTH, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model(x).square().mean().backward()
            model.zero_grad()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(x).square().mean().backward()
    edit_in_place(model)
    for p in model.parameters():
        p.grad.zero_()  # type: ignore[union-attr]
    graph.replay()
    captured = [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
    model.zero_grad()
    model(x).square().mean().backward()
    for a, p in zip(captured, model.parameters(), strict=True):
        assert torch.equal(a, p.grad)  # type: ignore[arg-type]
    del keep
