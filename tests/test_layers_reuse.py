"""Int8 forms of weights that are used again: fewer quantisations, and never a stale one.

The oracle is the same model with ``cache_weights=False``: whatever happens to the weights, both must give the same
gradients to the bit.
"""

from __future__ import annotations

import copy
import gc
import io
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import callbacks
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lowbit_lightning import kernels, optim
from lowbit_lightning.layers import Int8Linear, invalidate, weights

WIDTH, LAYERS = 64, 3


class Model(nn.Module):
    """``Int8Linear`` layers behind an embedding of the input, so that every layer's input needs a gradient."""

    def __init__(self, reuse: bool, tied: bool = False, reentrant: bool | None = None) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(WIDTH))
        layers = [Int8Linear(WIDTH, WIDTH, cache_weights=reuse) for _ in range(LAYERS)]
        if tied:
            layers[-1].weight = layers[0].weight
        self.layers, self.reentrant = nn.ModuleList(layers), reentrant

    def forward(self, x: Tensor) -> Any:
        x = x * self.embedding
        for layer in self.layers:
            x = x + layer(x).tanh() if self.reentrant is None else self.checkpointed(layer, x)
        return x

    def checkpointed(self, layer: nn.Module, x: Tensor) -> Any:
        return checkpoint(lambda x: x + layer(x).tanh(), x, use_reentrant=self.reentrant)


def quantised_weights() -> int:
    """How many int8 forms of weights were made in a training pass: all forms, less two of x and two of dy."""
    forms = {"quantize_rowwise": 1, "quantize_colwise": 1, "quantize_both": 2}
    calls = {op: count for (op, _), count in kernels.calls().items()}
    assert calls.pop("int8_matmul") == 3 * LAYERS
    return sum(forms.get(op, 0) * count for op, count in calls.items()) - 4 * LAYERS


def window(model: nn.Module, micro_batches: int = 2, between: Callable[[], None] = lambda: None) -> int:
    """Forward and backward of some micro-batches; returns how many forms of weights were made."""
    made = 0
    for i in range(micro_batches):
        kernels.reset_calls()
        x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(i))
        model(x).square().mean().backward()
        made += quantised_weights()
        if i == 0:
            between()
    return made


def state(model: nn.Module) -> dict[str, Tensor]:
    gradients = {f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**dict(model.named_parameters()), **gradients}


def assert_same(one: nn.Module, two: nn.Module) -> None:
    a, b = state(one), state(two)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), f"{name} differs: a stale form was used"


def twins(**settings: Any) -> tuple[Model, Model]:
    torch.manual_seed(1)
    one = Model(True, **settings)
    two = Model(False, **settings)
    two.load_state_dict(one.state_dict())
    return one, two


@pytest.fixture(autouse=True)
def _empty() -> Iterator[None]:
    """No optimizer of an earlier test is known, and nothing is left in the store."""
    gc.collect()
    invalidate()
    yield
    invalidate()


Optimizers: dict[str, Callable[[Any], Any]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),  # leaves version counters alone
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "8-bit AdamW": lambda p: optim.AdamW(p, lr=0.01, min_size=0),
    "converted": lambda p: converted(p),
    "compiled": lambda p: compiled(p),
    "wrapped by a scheduler": lambda p: scheduled(p),
    "a step of its own": lambda p: Foreign(p, {}),
}


def converted(parameters: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    optim.convert_(optimizer, min_size=0)
    return optimizer


def compiled(parameters: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    optimizer.step = torch.compile(optimizer.step, backend="eager")  # type: ignore[method-assign]
    return optimizer


def scheduled(parameters: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    return optimizer


class Foreign(torch.optim.Optimizer):
    """As many third-party optimizers are written."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad.data, alpha=-0.1)


@pytest.mark.parametrize("name", Optimizers)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own, when it is first imported
def test_weights_are_quantised_once_in_a_step(name: str) -> None:
    one, two = twins()
    optimizers = [Optimizers[name](m.parameters()) for m in (one, two)]
    for step in range(4):
        made, all_of_them = window(one), window(two)
        assert all_of_them == 2 * 2 * LAYERS
        # An optimizer owns weights once it has stepped.
        assert made == (all_of_them if step == 0 else 2 * LAYERS)
        assert_same(one, two)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert len(weights._store) == 0
        assert_same(one, two)


def stepped(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer that owns the model's weights."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(8, WIDTH)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def edit_in_place(model: Model) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)


def edit_by_detach(model: Model) -> None:
    for p in model.parameters():
        p.detach().add_(0.1)


def replace_data(model: Model) -> None:
    for p in model.parameters():
        p.data = p.data * 1.5


def replace_data_twice(model: Model) -> None:
    """The second time the allocator may well hand out the first address again."""
    for _ in range(2):
        for p in model.parameters():
            p.data = p.data * 1.25


def load(model: Model) -> None:
    model.load_state_dict({name: value * 1.5 for name, value in model.state_dict().items()})


def assign(model: Model) -> None:
    model.load_state_dict({name: value * 1.5 for name, value in model.state_dict().items()}, assign=True)


def cast_and_back(model: Model) -> None:
    model.to(torch.bfloat16).to(torch.float32)


def apply_in_place(model: Model) -> None:
    model._apply(lambda tensor: tensor.mul_(1.5))


def load_by_a_hook(model: Model) -> None:
    """A layer's own way to load, which writes through ``.data``."""

    def load(layer: Any, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
        for name, p in layer.named_parameters():
            p.data.copy_(state_dict.pop(prefix + name))

    for layer in model.layers:
        layer.register_load_state_dict_pre_hook(load)
    model.load_state_dict({name: value * 1.5 for name, value in model.state_dict().items()}, strict=False)


def from_a_vector(model: Model) -> None:
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(vector * 1.5, model.parameters())


def initialise(model: Model) -> None:
    for layer in model.layers:
        nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]


def write_behind_every_counter(model: Model) -> None:
    for p in model.parameters():
        p.data.mul_(1.5)


def write_and_say_so(model: Model) -> None:
    write_behind_every_counter(model)
    invalidate()


def write_and_switch_modes(model: Model) -> None:
    """As callbacks do that evaluate with averaged weights."""
    model.eval()
    write_behind_every_counter(model)
    with torch.no_grad():
        model(torch.randn(2, WIDTH))
    for module in model.modules():
        module.training = True  # how Lightning restores modes: not by train()


EDITS = [
    edit_in_place,
    edit_by_detach,
    replace_data,
    replace_data_twice,
    load,
    assign,
    cast_and_back,
    apply_in_place,
    load_by_a_hook,
    from_a_vector,
    initialise,
    write_and_say_so,
    write_and_switch_modes,
]


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_weight_is_quantised_again(edit: Callable[[Model], None]) -> None:
    one, two = twins()
    optimizers = stepped(one), stepped(two)
    assert window(one, between=lambda: edit(one)) > 2 * LAYERS
    window(two, between=lambda: edit(two))
    assert_same(one, two)
    for optimizer in optimizers:
        optimizer.step()
    assert_same(one, two)


def test_a_stale_form_would_be_seen() -> None:
    """What the documentation excludes, and proof that the comparison above can fail."""
    one, two = twins()
    keep = stepped(one), stepped(two)
    window(one, between=lambda: write_behind_every_counter(one))
    window(two, between=lambda: write_behind_every_counter(two))
    with pytest.raises(AssertionError, match="a stale form was used"):
        assert_same(one, two)
    del keep


def test_a_loop_without_optimizer_never_reuses() -> None:
    one, two = twins()
    for _ in range(3):
        assert window(one) == window(two) == 2 * 2 * LAYERS
        for model in (one, two):
            for p in model.parameters():
                p.data.sub_(0.1 * p.grad)  # type: ignore[operator]
                p.grad = None
    assert_same(one, two)


def test_a_weight_that_left_its_optimizer_is_no_longer_reused() -> None:
    model = Model(True)
    optimizer = stepped(model)
    assert window(model) == 2 * LAYERS
    del optimizer
    gc.collect()
    assert window(model) == 2 * 2 * LAYERS


def test_evaluation_neither_reads_nor_fills_the_store() -> None:
    model = Model(True)
    keep = stepped(model)
    x = torch.randn(4, WIDTH)
    window(model)
    assert len(weights._store) == LAYERS
    write_behind_every_counter(model)
    with torch.no_grad():
        expected = copy.deepcopy(model)(x)
        assert torch.equal(model(x), expected)
    model.eval()
    assert len(weights._store) == 0
    model(x).sum().backward()  # gradients in evaluation: of an attribution, say
    assert len(weights._store) == 0
    del keep


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


def test_a_form_made_while_the_weight_changed_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(True)
    optimizer = stepped(model)
    original = kernels.quantize_both

    def interrupted(x: Tensor, seed: int | None = None) -> Any:
        result = original(x, seed)
        if isinstance(x, nn.Parameter):
            optimizer.step()  # as another thread might
        return result

    monkeypatch.setattr(kernels, "quantize_both", interrupted)
    model(torch.ones(8, WIDTH))
    assert len(weights._store) == 0


def test_memory_is_freed_by_the_step_and_with_the_model() -> None:
    model = Model(True)
    optimizer = stepped(model)
    window(model)
    forms = [form for entry in weights._store.values() for form in (entry.rows, entry.columns)]
    assert sum(form[0].nbytes for form in forms) == 2 * LAYERS * WIDTH**2
    alive = [weakref.ref(form[0]) for form in forms]
    del forms
    optimizer.step()
    assert not any(ref() is not None for ref in alive)

    window(model)
    assert len(weights._store) == LAYERS
    del model, optimizer
    gc.collect()
    assert len(weights._store) == 0


def test_copies_carry_no_forms() -> None:
    model = Model(True)
    keep = stepped(model)
    window(model)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    assert buffer.tell() < 1.5 * sum(p.nbytes for p in model.parameters())
    buffer.seek(0)
    torch.load(buffer, weights_only=True)
    copied = copy.deepcopy(model)
    edit_in_place(copied)
    assert window(copied) == 2 * 2 * LAYERS  # no optimizer owns the copy
    del keep


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
