"""Memory of temporaries that is used again: never by two tensors at once, and never more of it than the limit."""

import pytest
import torch
from torch import nn

from lowbit_lightning import convert, kernels
from lowbit_lightning.kernels import reuse

MANY = reuse.SMALLEST  # int8 elements


@pytest.fixture(autouse=True)
def nothing_kept():
    reuse._kept.clear()
    yield
    reuse._kept.clear()


def test_memory_of_just_this_size_is_used_again():
    first = reuse.empty(4, MANY, dtype=torch.int8)
    address = first.data_ptr()
    reuse.give_back(first)
    del first
    assert reuse.empty(MANY, 8, dtype=torch.int8).data_ptr() != address
    again = reuse.empty(MANY, dtype=torch.float32)
    assert again.data_ptr() == address
    assert again.shape == (MANY,)
    assert reuse.empty(MANY, dtype=torch.float32).data_ptr() != address  # `again` has it


@pytest.mark.parametrize(
    "x",
    [torch.empty(MANY - 1, dtype=torch.int8), torch.empty(MANY, 4)[:, 0], torch.empty(2 * MANY)[MANY:]],
    ids=["small", "strided", "a part of a storage"],
)
def test_what_is_small_or_part_of_something_is_not_kept(x):
    reuse.give_back(x, None)
    assert not reuse._kept


def test_the_oldest_go_when_there_is_too_much():
    given = [torch.empty(reuse.MOST // 4, dtype=torch.uint8) for _ in range(6)]
    reuse.give_back(*given)
    assert [x.data_ptr() for x in reuse._kept] == [x.data_ptr() for x in given[2:]]


def test_what_nobody_gives_back_stays():
    x = torch.randn(2, MANY).to(torch.bfloat16)
    (kept, _), (again, _) = kernels.quantize_rowwise(x), kernels.quantize_rowwise(-x)
    assert kept.data_ptr() != again.data_ptr()
    torch.testing.assert_close(kept, -again, rtol=0, atol=0)


SETTINGS = [{}, {"save_inputs": "high"}, {"forward": "high"}, {"grad_input": "high"}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_gradients_with_reuse_equal_those_without(settings, monkeypatch):
    """Layers of the same size, one after the other, in two steps; the second backward runs twice over its graph."""

    def gradients() -> list[torch.Tensor | None]:
        torch.manual_seed(0)
        image = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1, stride=2))
        rows = nn.Sequential(*(nn.Linear(256, 256) for _ in range(3)))
        models = nn.ModuleList([image.to(memory_format=torch.channels_last), rows])  # type: ignore[call-overload]
        convert.swap_linears(models, output_layer=None, **settings)
        found: list[torch.Tensor | None] = []
        for step in range(2):
            for model, x in (image, torch.randn(16, 16, 64, 64)), (rows, torch.randn(4096, 256)):
                loss = model(x.requires_grad_()).square().mean()
                loss.backward(retain_graph=step == 1)
                if step == 1:
                    loss.backward()
                found += [x.grad, *(None if p.grad is None else p.grad.clone() for p in model.parameters())]
        return found

    with_reuse = gradients()
    assert reuse._kept
    monkeypatch.setattr(reuse, "SMALLEST", 1 << 60)
    torch.testing.assert_close(with_reuse, gradients(), rtol=0, atol=0)
