"""Int8 forms of weights that are used again: fewer quantisations, and never a stale one.

The oracle is the same model with ``cache_weights=False``: whatever happens to the weights, both must give the same
gradients to the bit. tests/layers/test_reuse_training.py has what wraps layers and trains them in other ways.
"""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.reuse import (
    LAYERS,
    WIDTH,
    Model,
    assert_same,
    edit_in_place,
    empty_store,
    stepped,
    twins,
    window,
    write_behind_every_counter,
)
from torch import Tensor, nn

from lowbit_lightning import kernels, optim
from lowbit_lightning.layers import Int8Linear, invalidate, weights

__all__ = ["empty_store"]  # used by pytest

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


def test_an_optimizer_whose_step_is_replayed_from_a_graph_owns_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Int8Linear(64, 64)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)

    def micro_batches() -> int:
        kernels.reset_calls()
        for _ in range(2):
            layer(torch.ones(8, 64, requires_grad=True)).sum().backward()
        return sum(count for (op, _), count in kernels.calls().items() if op.startswith("quantize"))

    micro_batches()
    optimizer.step()  # warms up
    reused = micro_batches()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        optimizer.step()
    assert micro_batches() > reused
    optimizer.step()
    assert micro_batches() > reused
