"""The byte-level GPT: what it remembers while it writes does not change what it writes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lowbit_lightning.convert import swap_linears
from lowbit_lightning.experiments import BERT, GPT
from lowbit_lightning.experiments.transformer import Past


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(1)
    model = GPT(width=32, layers=2, heads=2).eval().requires_grad_(False)
    for p in model.parameters():
        p.add_(0.1 * torch.randn_like(p))  # the first weights are so small that attention hardly matters
    return model


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(256, (3, 20), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind", [GPT, BERT])
def test_the_output_layer_is_known_at_the_default_width(kind: Any) -> None:
    """Of the packaged configs; it is as wide as it has outputs, and any warning is an error."""
    assert "not head: output layer" in str(swap_linears(kind(width=256, layers=1)))


@pytest.mark.parametrize("lengths", [[20], [1] * 20, [7, 1, 1, 5, 6]], ids=str)
def test_logits_in_pieces_are_those_of_the_whole(model: GPT, tokens: Tensor, lengths: list[int]) -> None:
    past = model.empty_past(window=20)
    pieces = [model(piece, past) for piece in tokens.split(lengths, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens), rtol=1e-5, atol=1e-5)


def test_a_text_may_be_longer_than_the_window(model: GPT, tokens: Tensor) -> None:
    """In the first block a position sees the last ``window`` tokens and itself, wherever they stand in the text."""
    first = GPT(width=32, layers=1, heads=2).eval().requires_grad_(False)
    first.load_state_dict({name: x for name, x in model.state_dict().items() if not name.startswith("blocks.1.")})
    past = first.empty_past(window=4)
    for position, token in enumerate(tokens.split(1, dim=1)):
        seen = tokens[:, max(0, position - 4) : position + 1]
        torch.testing.assert_close(first(token, past)[:, -1], first(seen)[:, -1], rtol=1e-5, atol=1e-5)
        assert past[0].keys is not None
        assert past[0].keys.shape[-2] == min(position + 1, 4)


def test_an_empty_window_is_refused() -> None:
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        Past(0)
