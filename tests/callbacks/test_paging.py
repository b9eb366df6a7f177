"""Paged states under the Trainer: the strategy's arguments, and what LowBitMonitor says of them.

That paged states of many ranks are the states of unpaged ones is among the checks of
``tests/strategies/test_sharded.py``.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import StrategyRegistry
from support.quiet import quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lowbit_lightning import optim
from lowbit_lightning.callbacks import LowBitMonitor
from lowbit_lightning.strategies import ShardedStrategy

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="page files are Linux's")

STEPS, WIDTH, LAYERS = 3, 256, 4
STATES = LAYERS * WIDTH * WIDTH * 2  # bytes: two states of a byte each


class Model(L.LightningModule):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)])
        self.options = options

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.layers(batch[0]).square().mean()

    def train_dataloader(self) -> Any:
        x = torch.randn(STEPS * 4, WIDTH, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(x), 4)

    def configure_optimizers(self) -> Any:
        return optim.AdamW(self.parameters(), lr=1e-2, **self.options)


def fit(model: Model, folder: Path, **settings: Any) -> L.Trainer:
    trainer = quiet_trainer(default_root_dir=folder, **settings)
    trainer.fit(model)
    return trainer


@pytest.mark.filterwarnings("ignore:LowBitMonitor finds no int8 layer")
def test_the_monitor_logs_what_paging_did(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain, paged = Model(), Model(paged="disk", resident=STATES // 2, page_dir=str(tmp_path))
    fit(plain, tmp_path)
    monitor = LowBitMonitor(every_n_steps=1, minimum_snr=None, picture=False)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        trainer = fit(paged, tmp_path, callbacks=[monitor])
    for x, y in zip(plain.parameters(), paged.parameters(), strict=True):
        assert torch.equal(x, y)
    share = float(trainer.callback_metrics["pages/resident_share"])
    assert 0.4 < share <= 0.5  # whole chunks
    for name in ("bytes_in", "bytes_out"):  # more than is streamed: a sample reads all states
        assert STATES * (1 - share) * 0.99 <= float(monitor.metrics[f"pages/{name}"]) <= 2 * STATES
    assert 0 <= float(monitor.metrics["pages/overlap"]) <= 1
    (line,) = [r.getMessage() for r in caplog.records if "paged optimizer states" in r.getMessage()]
    told = rf"512\.00 KiB, {100 * share:.0f} % of them resident; .* in and .* out in {STEPS} steps"
    assert re.search(told, line), line


@pytest.fixture
def leaves_nothing() -> Iterator[None]:
    """Neither a process group nor its port, which processes that are started later would take for theirs."""
    before = dict(os.environ)
    yield
    torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.usefixtures("leaves_nothing")
def test_the_name_pages_to_host_memory(tmp_path: Path) -> None:
    """Which a CPU has nothing behind."""
    strategy = StrategyRegistry.get("lowbit_sharded_paged")
    assert isinstance(strategy, ShardedStrategy)
    with pytest.warns(UserWarning, match=r'paged=True has no effect on cpu: .*; paged="disk" keeps them in a file'):
        trainer = fit(Model(), tmp_path, strategy=strategy)
    assert trainer.optimizers[0].page_statistics() is None  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"paged": "host"}, "paged must be False, True .* got 'host'"),
        ({"paged": True, "resident": "10%"}, "resident must be a number of bytes.*, got '10%'"),
        ({"paged": "disk", "page_dir": 3}, "page_dir must be .*, got 3"),
    ],
)
def test_the_strategy_checks_its_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShardedStrategy(**options)
