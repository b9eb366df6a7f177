"""DeepSpeedStrategy on one GPU: the losses of torch's AdamW under ZeRO, int8-mixed's autocast inside the engine, and
states on the host."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lowbit_lightning.strategies import DeepSpeedStrategy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="the deepspeed extra is not installed here"),
    pytest.mark.filterwarnings("ignore"),  # DeepSpeed's own, which change with torch
]


class Model(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(256, 512), nn.LayerNorm(512), nn.ReLU(), nn.Linear(512, 256))
        self.losses: list[float] = []
        self.autocast: set[bool] = set()

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        self.autocast.add(torch.is_autocast_enabled("cuda"))
        loss = (self.layers(batch[0]).float() - batch[0]).square().mean()
        self.losses.append(loss.item())
        return loss

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.randn(96, 256, generator=torch.Generator().manual_seed(1))), 16)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def fit(strategy: Any, precision: Any = "32-true") -> tuple[Model, Any]:
    model = Model()
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(
        accelerator="cuda", devices=1, strategy=strategy, precision=precision, max_epochs=1, gradient_clip_val=1.0,
        **options,
    )  # fmt: skip
    trainer.fit(model)
    return model, trainer


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_losses_are_those_of_torchs_adamw(stage: int) -> None:
    expected = fit(DeepSpeedStrategy(stage, optimizer_bits=None))[0].losses
    assert fit(DeepSpeedStrategy(stage, optimizer_bits=32))[0].losses == pytest.approx(expected, rel=1e-5)
    model, trainer = fit(DeepSpeedStrategy(stage))
    assert model.losses == pytest.approx(expected, rel=1e-2)
    assert any("exp_avg_codes" in entries for entries in trainer.optimizers[0].state.values())
    assert fit(DeepSpeedStrategy(stage), "int8-mixed")[0].losses == pytest.approx(expected, rel=5e-2)


def test_int8_mixed_computes_in_bf16_inside_the_engine() -> None:
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this GPU does not compute in bfloat16")
    assert fit(DeepSpeedStrategy(2), "int8-mixed")[0].autocast == {True}


def test_states_may_lie_on_the_host() -> None:
    expected = fit(DeepSpeedStrategy(2))[0].losses
    model, trainer = fit(DeepSpeedStrategy(2, offload_optimizer=True))
    assert model.losses == pytest.approx(expected, rel=1e-4)
    assert {x.device.type for entries in trainer.optimizers[0].state.values() for x in entries.values()} == {"cpu"}
    model, trainer = fit(DeepSpeedStrategy(2, paged=True))
    assert model.losses == expected
    assert trainer.optimizers[0].optimizer.page_statistics().bytes_in > 0
