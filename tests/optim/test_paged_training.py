"""Paged states while gradients are released, and under Lightning: the numbers of unpaged ones to the bit."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.optimizer import _optimizer_to_device
from support.paged_engine import lying_in_wait
from support.paged_optimizers import CHUNK, build, parameters, states, steps
from support.quiet import quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lowbit_lightning import optim
from lowbit_lightning.state.pages import Entries

# -- gradient release ------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Its layers are used in another order than they are made in."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(128, 128) for _ in range(6))
        self.sometimes = nn.Parameter(torch.zeros(128))

    def forward(self, x: Tensor, number: int = 1) -> Tensor:
        for i in (3, 0, 5, 1, 2, 4):
            x = torch.tanh(self.layers[i](x))
        return x + self.sometimes if number % 2 else x


@pytest.mark.parametrize("haste", [0.0, 0.3])
def test_gradient_release(haste: float) -> None:
    def train(net: Net, optimizer: optim.LowBitOptimizer) -> None:
        for number in range(5):
            x = torch.randn(8, 128, generator=torch.Generator().manual_seed(number))
            net(x, number).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    plain, paged = Net(), Net()
    theirs = optim.AdamW(plain.parameters(), lr=1e-2)
    train(plain, theirs)
    with lying_in_wait(1, haste, 20_000) as stream:
        matrices, vectors = ([p for p in paged.parameters() if (p.ndim > 1) == wide] for wide in (True, False))
        ours = optim.AdamW([{"params": matrices}, {"params": vectors}], lr=1e-2, paged=True)
        handle = optim.release_gradients(paged, ours)
        train(paged, ours)
        assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), paged.parameters(), strict=True))
        assert len(stream.engines) == 2, "the slab is put in the order of the first pass, once"
        assert [engine.closed for engine in stream.engines] == [True, False]
        places = [ours.state[paged.get_parameter(f"layers.{i}.weight")].number for i in (4, 2, 1, 5, 0, 3)]
        assert places == sorted(places)
        handle.remove()
        train(paged, ours)
        train(plain, theirs)
        assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), paged.parameters(), strict=True))


def test_a_released_step_moves_each_chunk_once() -> None:
    with lying_in_wait(0, 0.0, 20_000):
        net = Net()
        optimizer = optim.AdamW(net.parameters(), paged=True)
        optim.release_gradients(net, optimizer)
        moved = []
        for _ in range(4):
            net(torch.randn(8, 128)).sum().backward()
            optimizer.step()
            statistics = optimizer.page_statistics()
            assert statistics is not None
            moved.append((statistics.bytes_in, statistics.bytes_out))
        total = sum(v.nbytes for s in states(optimizer).values() for n, v in s.items() if n.endswith(("_codes", "exp")))
        assert moved[3][1] - moved[2][1] <= 1.2 * total


# -- Lightning -------------------------------------------------------------------------------------------------------


def test_lightning_moves_nothing() -> None:
    with lying_in_wait(chunk=CHUNK):
        params = parameters()
        optimizer = build("AdamW", params, paged=True)
        steps(params, optimizer)
        before = {p: optimizer.state[p] for p in params if p.numel()}
        _optimizer_to_device(optimizer, torch.device("meta"))  # nothing comes back from there
        assert all(optimizer.state[p] is entries for p, entries in before.items())
        for p in before:
            assert all(value.device.type == "cpu" for value in optimizer.state[p].values())


class Module(L.LightningModule):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.net, self.options = Net(), options

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return optim.AdamW(self.parameters(), lr=1e-2, **self.options)


def fit(module: Module, folder: Any, epochs: int, resume: bool = False) -> L.Trainer:
    data = torch.randn(24, 128, generator=torch.Generator().manual_seed(3))
    trainer = quiet_trainer(
        max_epochs=epochs, default_root_dir=folder, accumulate_grad_batches=2, gradient_clip_val=0.5
    )
    loader: DataLoader[Any] = DataLoader(list(data), batch_size=4)  # type: ignore[arg-type]
    trainer.fit(module, loader, ckpt_path=folder / "last.ckpt" if resume else None)
    trainer.save_checkpoint(folder / "last.ckpt")
    return trainer


def test_a_run_under_lightning_is_saved_and_resumed(tmp_path: Any) -> None:
    plain = Module()
    fit(plain, tmp_path, 4)
    with lying_in_wait(5, 0.2, 20_000):
        fit(Module(paged=True), tmp_path, 2)
        paged = Module(paged=True, resident=30_000)
        trainer = fit(paged, tmp_path, 4, resume=True)
        assert isinstance(trainer.optimizers[0].state[paged.net.get_parameter("layers.0.weight")], Entries)
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), paged.parameters(), strict=True))
