"""``group_parameters``: parameters get their own options by name, and a pattern that does nothing is an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lowbit_lightning import optim


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(70, 64)
        self.body = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64))
        self.head = nn.Linear(64, 70, bias=False)
        self.head.weight = self.embed.weight  # tied: its name is embed.weight
        self.frozen = nn.Linear(64, 64)
        self.frozen.requires_grad_(False)


def test_parameters_are_grouped_by_the_first_pattern_that_matches() -> None:
    net = Net()
    groups = optim.group_parameters(net, {"*.1.*": {"lr": 0.5}, "embed*": {"bits": 32}, "*.bias": {"weight_decay": 0}})
    names = {p: name for name, p in net.named_parameters()}
    assert [[names[p] for p in group["params"]] for group in groups] == [
        ["body.0.weight", "body.2.weight"],
        ["body.1.weight", "body.1.bias"],
        ["embed.weight"],
        ["body.0.bias", "body.2.bias"],
    ]
    keys = [{k: v for k, v in group.items() if k != "params"} for group in groups]
    assert keys == [{}, {"lr": 0.5}, {"bits": 32}, {"weight_decay": 0}]

    optimizer = optim.AdamW(groups, lr=1e-3, min_size=64)
    for p in net.parameters():
        p.grad = torch.randn(p.shape)
    optimizer.step()
    assert "exp_avg" in optimizer.state[net.embed.weight]
    assert "exp_avg_codes" in optimizer.state[net.get_parameter("body.0.weight")]
    assert net.frozen.weight not in optimizer.state
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 0.5, 1e-3, 1e-3]


def test_a_pattern_for_all_leaves_no_default_group() -> None:
    groups = optim.group_parameters(nn.Linear(4, 4), {"*": {"bits": 32}})
    assert [(len(group["params"]), group["bits"]) for group in groups] == [(2, 32)]
    assert [set(group) for group in optim.group_parameters(nn.Linear(4, 4), {})] == [{"params"}]


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ({"embedding.*": {"bits": 32}}, r"'embedding\.\*': none matches; there are .*'embed\.weight'"),
        ({"frozen.*": {"bits": 32}}, r"'frozen\.\*': none matches"),
        ({"EMBED.*": {}}, "none matches"),
        ({"*": {}, "embed*": {"bits": 32}}, r"'embed\*': an earlier pattern takes \['embed\.weight'\]"),
    ],
)
def test_patterns_that_would_do_nothing_are_refused(overrides: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        optim.group_parameters(Net(), overrides)


def test_a_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no trainable parameter"):
        optim.group_parameters(nn.Linear(4, 4).requires_grad_(False), {})
