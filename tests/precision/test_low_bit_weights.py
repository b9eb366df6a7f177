"""``plugins=[LowBitWeights("nf4")]`` in the Trainer and Fabric; tests/programs/lowbit_ranks.py: on several ranks."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.strategies import FSDPStrategy
from lightning.pytorch.plugins import HalfPrecision, MixedPrecision, Precision
from support.fake_ranks import being_rank
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from lowbit_lightning import Int8MixedPrecision, LowBitWeights, convert, kernels, optim, quantize
from lowbit_lightning.layers import LowBitLinear
from lowbit_lightning.precision import PrecisionNotApplied, registration

STEPS = 4


class Adapted(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.down, self.up = nn.Linear(inputs, 32, bias=False), nn.Linear(32, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Adapted(64, 128), nn.ReLU(), Adapted(128, 64), nn.ReLU(), nn.Linear(64, 4))


class Model(L.LightningModule):
    def __init__(self, late: bool = False) -> None:
        super().__init__()
        self.net = None if late else net()
        self.losses: list[float] = []

    def configure_model(self) -> None:
        if self.net is None:
            self.net = net()

    def forward(self, x: Tensor) -> Tensor:
        assert self.net is not None
        return self.net(x)

    def training_step(self, x: Tensor, index: int) -> Tensor:
        loss = self(x).float().square().mean()
        self.losses.append(float(loss.detach()))
        return loss

    def predict_step(self, x: Tensor, index: int) -> Tensor:
        return self(x)

    def configure_optimizers(self) -> Any:
        return optim.AdamW(self.parameters(), lr=1e-2, min_size=256)


def data() -> DataLoader:
    x = torch.randn(8 * STEPS, 64, generator=torch.Generator().manual_seed(1))
    return DataLoader(x, batch_size=8)  # type: ignore[arg-type]


def trainer(*plugins: Any, epochs: int = 1, **options: Any) -> L.Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(
        accelerator="cpu", max_epochs=epochs, plugins=list(plugins), enable_checkpointing=False, **quiet, **options
    )


def low(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, LowBitLinear)]


@pytest.fixture(scope="module")
def uninterrupted() -> list[float]:
    """Losses of two epochs of a model that was quantised by hand."""
    model = Model()
    quantize(model, "nf4", include="*.base")
    trainer(epochs=2).fit(model, data())
    return model.losses


# -- the Trainer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [False, True], ids=["built in __init__", "built in configure_model"])
def test_adapters_train_on_quantised_weights(late: bool, uninterrupted: list[float]) -> None:
    weights, model = LowBitWeights("nf4"), Model(late)
    run = trainer(weights, epochs=2)
    run.fit(model, data())
    assert low(model) == ["net.0.base", "net.2.base"]  # what trains is an adapter, or the head
    assert model.losses == uninterrupted
    assert {name for name, p in model.named_parameters() if p.requires_grad} >= {"net.0.up.weight", "net.4.weight"}
    assert any(name.endswith("_codes") for entries in run.optimizers[0].state.values() for name in entries)
    assert "2 weights in low bits" in str(weights.report)
    run.predict(model, data())  # finds them quantised


def test_a_run_resumes(tmp_path: Path, uninterrupted: list[float]) -> None:
    half = trainer(LowBitWeights("nf4"))
    half.fit(Model(), data())
    half.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
    assert saved["net.0.base.weight"].dtype == torch.uint8
    for late in (False, True):
        model = Model(late)
        trainer(LowBitWeights("nf4"), epochs=2).fit(model, data(), ckpt_path=tmp_path / "half.ckpt")
        assert model.losses == uninterrupted[STEPS:]
    with pytest.raises(RuntimeError, match="was saved as nf4 but this layer is int8"):
        trainer(LowBitWeights("int8"), epochs=2).fit(Model(), data(), ckpt_path=tmp_path / "half.ckpt")


def test_a_checkpoint_in_high_precision_is_quantised(tmp_path: Path) -> None:
    plain = Model()
    run = trainer()
    run.fit(plain, data())
    run.save_checkpoint(tmp_path / "plain.ckpt")
    model = Model()
    found = trainer(LowBitWeights("int8")).predict(model, data(), ckpt_path=tmp_path / "plain.ckpt")
    assert found is not None
    quantize(plain, "int8", include="*.base")
    with torch.no_grad():
        expected = [plain(x) for x in data()]
    assert low(model) == ["net.0.base", "net.2.base"]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))  # type: ignore[arg-type]


def test_without_frozen_layers_all_are_quantised() -> None:
    model = Model().requires_grad_(True)
    trainer(LowBitWeights("int8")).predict(model, data())
    assert len(low(model)) == 6  # the output layer stays
    model = Model().requires_grad_(True)
    trainer(LowBitWeights("int8", exclude="*.up", output_layer=None)).fit(model, data())
    assert len(low(model)) == 5


@pytest.mark.parametrize(
    ("precision", "kind"),
    [
        ("32-true", Precision),
        ("bf16-mixed", MixedPrecision),
        ("bf16-true", HalfPrecision),
        ("int8-mixed", Int8MixedPrecision),
        (None, Int8MixedPrecision),
    ],
)
def test_it_stands_beside_any_precision(precision: Any, kind: type) -> None:
    own = [] if precision else [Int8MixedPrecision(autocast="off")]
    model = Model()
    run = trainer(LowBitWeights("nf4"), *own, precision=precision)
    assert isinstance(run.precision_plugin, kind)
    kernels.reset_calls()
    run.fit(model, data())
    int8 = sum(count for (op, _), count in kernels.calls().items() if op == "int8_matmul")
    assert (int8 > 0) == (kind is Int8MixedPrecision)
    assert len(low(model)) == 2
    assert all(torch.isfinite(torch.tensor(model.losses)))


def test_settings_reach_the_layers() -> None:
    model = Model()
    weights = LowBitWeights("int4", overrides={"net.2.*": "int8"}, compute_dtype=torch.bfloat16, fit="absmax")
    trainer(weights).predict(model, data())
    assert {name: str(layer.weights) for name, layer in model.named_modules() if isinstance(layer, LowBitLinear)} == {
        "net.0.base": "int4 (absmax)",
        "net.2.base": "int8",
    }


def test_a_trainer_is_pickled_with_it() -> None:
    run = trainer(LowBitWeights("nf4"))
    twin = pickle.loads(pickle.dumps(run.strategy))
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 4))
    twin.precision_plugin.convert_module(model)
    assert low(model) == ["0"]


# -- Fabric ----------------------------------------------------------------------------------------------------------


def steps(fabric: L.Fabric, model: Any, optimizer: Any) -> list[float]:
    losses = []
    for x in data():
        loss = model(x).float().square().mean()
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def test_fabric_trains_saves_and_resumes(tmp_path: Path, uninterrupted: list[float]) -> None:
    fabric = L.Fabric(accelerator="cpu", plugins=[LowBitWeights("nf4")])
    with fabric.init_module():
        inner = net()
    model = fabric.setup(inner)
    optimizer = fabric.setup_optimizers(optim.AdamW(model.parameters(), lr=1e-2, min_size=256))
    assert steps(fabric, model, optimizer) == uninterrupted[:STEPS]
    fabric.save(tmp_path / "half.ckpt", {"model": model, "optimizer": optimizer})

    fabric = L.Fabric(accelerator="cpu", plugins=LowBitWeights("nf4"))
    model = fabric.setup(net())
    optimizer = fabric.setup_optimizers(optim.AdamW(model.parameters(), lr=1e-2, min_size=256))
    fabric.load(tmp_path / "half.ckpt", {"model": model, "optimizer": optimizer})
    assert steps(fabric, model, optimizer) == uninterrupted[STEPS:]


def test_fabric_with_a_precision() -> None:
    fabric = L.Fabric(accelerator="cpu", precision="bf16-mixed", plugins=[LowBitWeights("int8")])
    model = fabric.setup(net())
    assert model(torch.randn(2, 64)).dtype == torch.float32
    assert len(low(model)) == 2


def test_a_model_without_memory_is_quantised_by_what_it_loads() -> None:
    fabric = L.Fabric(accelerator="cpu", plugins=[LowBitWeights("nf4")])
    with fabric.init_module(), torch.device("meta"):
        empty = net()
    fabric._precision.convert_module(empty)
    assert all(p.is_meta for p in empty.parameters())
    empty.to_empty(device="cpu").load_state_dict(net().state_dict(), strict=False)
    x, expected = torch.randn(3, 64), quantize(net(), "nf4", include="*.base")
    assert torch.equal(fabric.setup(empty)(x), expected(x))


# -- refused ---------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(PrecisionNotApplied, match=r"LowBitWeights doesn't work with FSDPStrategy.*lowbit_sharded"):
        registration._check_result(FSDPStrategy(), None, Precision, False, LowBitWeights())
    with pytest.raises(ValueError, match="plugins has 2 LowBitWeights"):
        trainer(LowBitWeights("nf4"), LowBitWeights("int8"))
    model = Model().requires_grad_(True)
    with pytest.raises(ValueError, match=r"nothing is left to train in Model.*Freeze the model"):
        trainer(LowBitWeights("nf4", output_layer=None)).fit(_without_biases(model), data())
    with pytest.raises(convert.lowbit.NothingToQuantize, match="nothing to quantize in Model"):
        trainer(LowBitWeights("nf4", filter=lambda name, layer: False)).fit(Model(), data())
    with pytest.raises(ValueError, match="include='lost' matches no layer"):
        trainer(LowBitWeights("nf4", include="lost")).fit(Model(), data())


def _without_biases(model: Model) -> Model:
    for name, p in model.named_parameters():
        p.requires_grad_(not name.endswith("bias"))
    return model


@pytest.mark.skipif(torch.__version__.startswith("2.7"), reason="torch 2.7's fully_shard refuses integer parameters")
def test_a_model_that_is_sharded_already() -> None:
    with being_rank(0, (2,)) as mesh:
        sharded, ready = net(), quantize(net(), "nf4", include="*.base")
        for model in (sharded, ready):
            fully_shard(model, mesh=mesh)
        with pytest.raises(ValueError, match=r"sharded already.*before fully_shard"):
            LowBitWeights("nf4").convert_module(sharded)
        LowBitWeights("nf4").convert_module(ready)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LowBitWeights("int5"), "got 'int5'"),
        (lambda: LowBitWeights("nf4", threshold=6.0), "threshold must be 0"),
        (lambda: LowBitWeights("nf4", overrides={"*": "int5"}), r"overrides\['\*'\]='int5' must be None or settings"),
    ],
)
def test_settings_that_are_refused(make: Callable[[], LowBitWeights], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
