"""Room on the disk for the pages of an optimizer under DeepSpeed: how much of the states a machine is asked to hold."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import strategies
from torch import nn

from lowbit_lightning import optim
from lowbit_lightning.state.pages import file
from lowbit_lightning.strategies import DeepSpeedStrategy

LAUNCHERS = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")
NEEDED = 8 * (100 * 64 + 64 + 128) + 2 * 2 * 64 * 128
"""Bytes in all of ``Model``'s states under the strategy: 32 bits for vectors and the embedding, 8 for matrices."""

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the deepspeed extra is for Linux"),
    pytest.mark.usefixtures("deepspeed_imported"),
]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(100, 64)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have a launcher say so much of ``ranks``; DeepSpeed's communication is set up among them, or not."""

    def launched(ranks: int, communicates: bool, **launcher: str) -> None:
        for name in LAUNCHERS:
            monkeypatch.delenv(name, raising=False)
        for name, value in {"WORLD_SIZE": str(ranks), **launcher}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys.modules["deepspeed.comm"], "is_initialized", lambda: communicates)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: ranks)

    return launched


def is_asked_for(nbytes: int, folder: Path, make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """``make`` passes with so many bytes free, and is refused with one less."""
    monkeypatch.setattr(file.shutil, "disk_usage", lambda _: SimpleNamespace(free=nbytes))
    make()
    monkeypatch.setattr(file.shutil, "disk_usage", lambda _: SimpleNamespace(free=nbytes - 1))
    with pytest.raises(OSError, match=f"needs {nbytes:,} bytes in {folder}, where {nbytes - 1:,} are free"):
        make()


@pytest.mark.parametrize(
    ("communicates", "launcher", "share"),
    [
        (True, {"LOCAL_WORLD_SIZE": "4"}, 1),
        (True, {"LOCAL_WORLD_SIZE": "2"}, 1 / 2),
        (True, {"LOCAL_SIZE": "1"}, 1 / 4),
        (True, {}, 1 / 4),  # the least that it can be
        (False, {}, 1),  # DDP, say, beside something that has imported DeepSpeed
        (False, {"LOCAL_WORLD_SIZE": "2"}, 1),
    ],
)
def test_without_a_strategy_only_zero_has_states_cut(
    communicates: bool, launcher: dict[str, str], share: float, launched: Any, page_dir: Path, monkeypatch: Any
) -> None:
    launched(4, communicates, **launcher)
    p = nn.Parameter(torch.zeros(512, 512))
    part = torch.zeros(2**17, requires_grad=True)  # cut already
    for value, nbytes in ((p, int(share * 8 * 512 * 512)), (part, 8 * 2**17)):
        make = lambda value=value: optim.AdamW([value], bits=32, paged="disk", page_dir=str(page_dir))  # noqa: E731
        is_asked_for(nbytes, page_dir, make, monkeypatch)


@pytest.mark.parametrize(
    ("machines", "ranks_here", "launcher"),
    [(1, 2, {}), (1, 2, {"LOCAL_WORLD_SIZE": "2"}), (2, 2, {}), (2, 2, {"LOCAL_WORLD_SIZE": "2"}), (2, 1, {})],
)
@pytest.mark.parametrize("by", ["strategy", "optimizer", "strategy, of torch.optim"])
def test_the_strategy_asks_for_the_share_of_its_machine(
    by: str, machines: int, ranks_here: int, launcher: dict[str, str], launched: Any, page_dir: Path, monkeypatch: Any
) -> None:
    """Lightning's launcher does not say how many ranks it starts here, and the strategy knows all the same."""
    ranks = machines * ranks_here
    launched(ranks, True, **launcher)
    paging: dict[str, Any] = {"paged": "disk", "resident": 0, "page_dir": str(page_dir)}

    def make() -> None:
        strategy = DeepSpeedStrategy(
            3, parallel_devices=[torch.device("cpu")] * ranks_here, **({} if by == "optimizer" else paging)
        )
        strategy.cluster_environment = SimpleNamespace(world_size=lambda: ranks)  # type: ignore[assignment]
        strategy._lightning_module = model = Model()  # type: ignore[assignment]
        if by == "strategy":
            optimizer: Any = optim.AdamW(model.parameters())
        elif by == "optimizer":
            optimizer = optim.AdamW(model.parameters(), **paging)
        else:
            optimizer = torch.optim.AdamW(model.parameters())
        monkeypatch.setattr(strategies.DeepSpeedStrategy, "_init_optimizers", lambda self: (optimizer, None))
        strategy._init_optimizers()
        assert {group["paged"] for group in optimizer.param_groups} == {"disk"}

    is_asked_for(NEEDED // machines, page_dir, make, monkeypatch)
