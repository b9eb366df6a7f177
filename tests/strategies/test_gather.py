"""Parameters gathered as int8: the bytes, the error, and that training is not hurt."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from support.on_ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from lowbit_lightning import optim
from lowbit_lightning.strategies import ShardedStrategy
from lowbit_lightning.strategies.blocks import shard
from lowbit_lightning.strategies.gather import Int8Rows, gather_in_int8

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the ranks are forked")


@given(st.integers(1, 40), st.integers(16, 70), st.integers(1, 5), st.sampled_from([torch.float32, torch.bfloat16]))
def test_what_is_packed_comes_back(rows: int, length: int, ranks: int, dtype: torch.dtype) -> None:
    x = torch.randn(rows, length, generator=torch.Generator().manual_seed(rows * length))
    form = Int8Rows(rows, length)
    pieces = list(x.chunk(ranks)) + [x[:0]] * ranks  # a rank may hold no row
    packed = [form.pack(piece, ranks) for piece in pieces[:ranks]]
    assert len({len(p) for p in packed}) == 1
    out = torch.full((ranks * -(-rows // ranks), length), float("nan"), dtype=dtype)
    form.unpack(torch.cat(packed), ranks, out)
    scales = np.abs(x.double().numpy()).max(1, keepdims=True) / 127
    expected = torch.from_numpy(np.rint(x.double().numpy() / scales) * scales)
    # A quotient may round the other way in float32: then the two are a step apart.
    error = (out[:rows].double() - expected).abs() / torch.from_numpy(scales)
    rounding = 2.0**-8 * 127 if dtype is torch.bfloat16 else 1e-4
    assert (error < rounding).float().mean() > 0.99
    assert float(error.max()) < 1 + rounding


def test_rounding_twice_changes_nothing() -> None:
    x, form = torch.randn(12, 300), Int8Rows(12, 300)
    once, twice = torch.empty(12, 300), torch.empty(12, 300)
    form.unpack(form.pack(x, 1), 1, once)
    form.unpack(form.pack(once, 1), 1, twice)
    torch.testing.assert_close(once, twice, rtol=2.0**-22, atol=0)


def test_unknown_form_is_refused() -> None:
    with pytest.raises(ValueError, match="all_gather must be 'high' or 'int8', got 'int4'"):
        ShardedStrategy(all_gather="int4")  # type: ignore[arg-type]


# -- on two ranks ------------------------------------------------------------------------------------------------------

RANKS, STEPS = 2, 40


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(65, 256)  # 65 rows on two ranks: 33 and 32
        self.up, self.down = nn.Linear(256, 513), nn.Linear(513, 256, bias=False)
        self.norm, self.single = nn.LayerNorm(256), nn.Parameter(torch.ones(1, 256))  # one rank holds none of single

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = self.norm(x + self.down(torch.relu(self.up(x)))) * self.single
        return x @ self.embedding.weight.T


class Gathered(TorchDispatchMode):
    """The largest result of a gather among ranks, in bytes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "allgather" in func.name():
            self.largest = max(self.largest, args[0].numel() * args[0].element_size())
        return func(*args, **(kwargs or {}))


def train(gather: str) -> tuple[list[float], int, float]:
    """Losses, the bytes of the largest gather, and the largest error of a gathered weight in units of what rounding
    allows."""
    torch.manual_seed(0)
    model, moved = Net(), []
    nn.init.normal_(model.embedding.weight, std=0.05)
    fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)), reshard_after_forward=True)
    if gather == "int8":
        gather_in_int8(model)
    optimizer = optim.AdamW(model.parameters(), lr=3e-3)

    def watch(module: nn.Linear, _: Any) -> None:  # forward hooks see what was gathered
        moved.append(module.weight.detach().clone())

    model.up.register_forward_pre_hook(watch)
    generator = torch.Generator().manual_seed(1)
    losses, worst, gathered = [], 0.0, Gathered()
    for _ in range(STEPS):
        whole = model.up.weight.full_tensor()  # type: ignore[attr-defined]
        tokens = torch.randint(0, 65, (RANKS, 8, 17), generator=generator).cumsum(-1) % 65
        mine = tokens[dist.get_rank()]
        with gathered:
            loss = nn.functional.cross_entropy(model(mine[:, :-1]).flatten(0, 1), mine[:, 1:].flatten())
            loss.backward()
        allowed = whole.abs().amax(1, keepdim=True) / 254
        worst = max(worst, float(((moved[-1] - whole).abs() / allowed).max()))
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss.detach())
        losses.append(float(loss.detach()) / RANKS)
    return losses, gathered.largest, worst


def test_an_older_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where FSDP2 would send unequal lengths, refuse integers or sum instead of averaging."""
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.7.1"))
    with pytest.raises(RuntimeError, match=r'all_gather="int8" needs torch 2.8 or newer, this is 2.7.1: FSDP2'):
        gather_in_int8(nn.Linear(16, 16))
    model = nn.Linear(16, 16)
    model.codes = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(RuntimeError, match=r"sharding the low-bit weight codes needs torch 2\.8 or newer"):
        shard(model, [], None, True)  # type: ignore[arg-type]


@on_ranks(RANKS)
def test_training_is_not_hurt(folder: Path) -> None:
    if torch.__version__ < "2.8":
        return  # refused
    (high, high_bytes, exact), (int8, int8_bytes, error) = (train(gather) for gather in ("high", "int8"))
    assert exact == 0
    assert 0.9 < error <= 1.001
    assert int8_bytes < 0.27 * high_bytes
    assert int8[0] != high[0]
    assert high[-1] < 0.9 * high[0]
    assert sum(int8[-10:]) == pytest.approx(sum(high[-10:]), rel=0.01)
