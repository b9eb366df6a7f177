"""precision="int8-mixed" in an unmodified Trainer and Fabric: what runs, what is refused, what stays as it was."""

from __future__ import annotations

import copy
import inspect
import logging
import os
import pickle
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import lightning as L
import pytest
import torch
from lightning.fabric.connector import _Connector
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector
from support.int8_models import matmuls
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lowbit_lightning import convert, kernels, precision
from lowbit_lightning.layers import Int8Linear
from lowbit_lightning.layers.int8 import FEWEST_ROWS
from lowbit_lightning.precision import (
    FabricInt8MixedPrecision,
    Int8MixedPrecision,
    PrecisionNotApplied,
    int8,
    registration,
)

BATCHES = 4


@pytest.fixture(autouse=True)
def _registered() -> None:
    precision.register()


class Model(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
        self.dtypes: set[torch.dtype] = set()

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(x)
        self.dtypes.add(y.dtype)
        return y

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]).float(), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])

    test_step = validation_step

    def val_dataloader(self) -> DataLoader:
        return data()

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def data() -> DataLoader:
    x = torch.randn(BATCHES * 8, 32, generator=torch.Generator().manual_seed(3))
    return DataLoader(TensorDataset(x, x[:, :4].argmax(1)), 8)


def trainer(**settings: Any) -> L.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "limit_val_batches": 0,
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
    }
    return L.Trainer(**{**defaults, **settings})


# -- the ways to ask for it ------------------------------------------------------------------------------------------


def test_the_string_trains_in_int8() -> None:
    run, model = trainer(precision="int8-mixed"), Model()
    assert type(run.precision_plugin) is Int8MixedPrecision
    assert str(run.precision) == "int8-mixed"
    before = copy.deepcopy(model.state_dict())
    kernels.reset_calls()
    run.fit(model, data())
    assert matmuls() == BATCHES * (2 + 3)  # the first layer's input, the batch, needs no gradient
    assert list(model.state_dict()) == list(before)
    assert not torch.equal(model.state_dict()["net.0.weight"], before["net.0.weight"])
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.gpu
def test_the_string_trains_in_int8_on_a_gpu() -> None:
    model = Model()
    kernels.reset_calls()
    run = trainer(precision="int8-mixed", accelerator="gpu", devices=1, deterministic=False)
    run.fit(model, data())
    assert kernels.calls()["int8_matmul", "cuda"] == BATCHES * (2 + 3)
    assert model.dtypes == {torch.bfloat16 if int8.computes_in_bf16("cuda") else torch.float32}


def test_the_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_TRAINER_PRECISION", "int8-mixed")
    assert isinstance(trainer().precision_plugin, Int8MixedPrecision)


def test_a_plugin_with_settings() -> None:
    plugin = Int8MixedPrecision(exclude="net.0", grad_weight="high", autocast="off")
    model = Model()
    kernels.reset_calls()
    trainer(plugins=plugin).fit(model, data())
    assert plugin.report is not None
    assert plugin.report.swapped == ("net.2",)
    assert matmuls() == BATCHES * 2


def test_a_plugin_inside_a_strategy() -> None:
    strategy = L.pytorch.strategies.SingleDeviceStrategy("cpu", precision_plugin=Int8MixedPrecision())
    assert isinstance(trainer(strategy=strategy).precision_plugin, Int8MixedPrecision)


def test_every_stage_runs_in_int8_and_converts_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FEWEST_ROWS, "cpu", (1, 1, 1))
    run, model = trainer(precision="int8-mixed", limit_val_batches=BATCHES), Model()
    with caplog.at_level(logging.INFO):
        for stage in ("fit", "validate", "test", "predict"):
            kernels.reset_calls()
            getattr(run, stage)(model, data())
            assert matmuls() >= BATCHES * 2
    said = [record.message for record in caplog.records if "in 2 of 3 layers" in record.message]
    assert ["2.00 times as fast in int8" in report for report in said] == [False, True], "before and after a step"
    assert "not net.4: output layer" in said[0]
    assert [type(m) for m in model.net if isinstance(m, nn.Linear)] == [nn.Linear] * 3


@pytest.mark.parametrize("fails", [False, True])
def test_layers_are_plain_again_after_a_run_but_for_those_that_were_int8_before(fails: bool) -> None:
    class Broken(Model):
        def on_train_batch_end(self, *_: Any) -> None:
            assert [type(m) for m in self.net if isinstance(m, nn.Linear)] == [Int8Linear, Int8Linear, nn.Linear]
            if fails:
                raise InterruptedError

    model = Broken()
    convert.swap_linears(model, include="net.2")
    run = trainer(precision="int8-mixed")
    with pytest.raises(InterruptedError) if fails else nullcontext():
        run.fit(model, data())
    assert [type(m) for m in model.net if isinstance(m, nn.Linear)] == [nn.Linear, Int8Linear, nn.Linear]


def test_checkpoints_go_both_ways(tmp_path: Path) -> None:
    run, model = trainer(precision="int8-mixed"), Model()
    run.fit(model, data())
    run.save_checkpoint(tmp_path / "int8.ckpt")
    plain = Model()
    trainer(max_epochs=2).fit(plain, data(), ckpt_path=tmp_path / "int8.ckpt")
    trainer(precision="int8-mixed", max_epochs=2).fit(Model(), data(), ckpt_path=tmp_path / "int8.ckpt")
    loaded = torch.load(tmp_path / "int8.ckpt", weights_only=True)["state_dict"]
    for name, value in model.state_dict().items():
        assert torch.equal(loaded[name], value)


def test_it_learns_like_float32() -> None:
    losses = {}
    for name in ("32-true", "int8-mixed"):
        torch.manual_seed(0)
        model = Model()
        trainer(precision=name, max_epochs=5).fit(model, data())
        with torch.no_grad():
            losses[name] = sum(float(model.training_step(batch, 0)) for batch in data()) / BATCHES
    assert losses["32-true"] < 1.2  # log(4) = 1.39 before training
    assert losses["int8-mixed"] == pytest.approx(losses["32-true"], rel=0.05)


# -- what the other ops run in ---------------------------------------------------------------------------------------


def test_slow_autocast_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "computes_in_bf16", lambda device: False)
    plugin = Int8MixedPrecision(autocast="bf16")
    with pytest.warns(UserWarning, match="hardware emulates bf16"):
        assert isinstance(plugin.forward_context(), torch.autocast)
    plugin.forward_context()


def test_plugins_can_be_copied() -> None:
    plugin = Int8MixedPrecision(include="net.*", grad_input="high")
    plugin.convert_module(Model())
    again = pickle.loads(pickle.dumps(plugin))
    assert again.convert_module(Model()) is not None
    assert again.report == plugin.report


# -- Fabric ----------------------------------------------------------------------------------------------------------


def fabric_step(fabric: L.Fabric) -> tuple[Any, Tensor]:
    model, optimizer = fabric.setup(*with_optimizer(Model().net))
    y = model(torch.randn(8, 32))
    fabric.backward(y.square().mean())
    optimizer.step()
    return model, y


def with_optimizer(module: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    return module, torch.optim.SGD(module.parameters(), lr=0.1)


def test_fabric() -> None:
    kernels.reset_calls()
    _, y = fabric_step(L.Fabric(precision="int8-mixed", accelerator="cpu", devices=1))  # type: ignore[arg-type]
    assert matmuls() == 5
    assert y.dtype == torch.float32


def test_fabric_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LT_PRECISION", "int8-mixed")
    kernels.reset_calls()
    fabric_step(L.Fabric(accelerator="cpu", devices=1))
    assert matmuls() == 5
    assert os.environ["LT_PRECISION"] == "int8-mixed"  # ranks started later must find it
    monkeypatch.setenv("LT_PRECISION", "32-true")
    fabric = L.Fabric(accelerator="cpu", devices=1, precision="int8-mixed")  # type: ignore[arg-type]
    assert not isinstance(fabric._precision, FabricInt8MixedPrecision)  # Fabric's variables overrule the code


def test_fabric_and_trainer_refuse_each_others_plugin() -> None:
    with pytest.raises(
        TypeError, match=r"Int8MixedPrecision\(\.\.\.\)\] doesn't fit here; use FabricInt8MixedPrecision"
    ):
        L.Fabric(accelerator="cpu", plugins=Int8MixedPrecision())
    with pytest.raises(TypeError, match=r"doesn't fit here; use Int8MixedPrecision"):
        trainer(plugins=FabricInt8MixedPrecision())


# -- errors ----------------------------------------------------------------------------------------------------------


def test_unknown_precisions_get_lightnings_own_error() -> None:
    with pytest.raises(ValueError, match=r"Precision 'int8-mixe' is invalid\. Allowed precision values"):
        trainer(precision="int8-mixe")


def test_other_precisions_and_plugins_are_untouched() -> None:
    assert trainer(precision="bf16-mixed").precision == "bf16-mixed"
    assert trainer().precision == "32-true"
    assert isinstance(trainer(precision=64).precision_plugin, L.pytorch.plugins.DoublePrecision)


class Recurrent(Model):
    """A model of which int8 serves nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.net = nn.GRU(32, 64), nn.Sequential(nn.Linear(64, 4))  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.rnn(x)[0])


def test_a_model_with_nothing_to_swap_is_a_warning_for_the_string_and_an_error_for_a_plugin() -> None:
    run, said = (
        trainer(precision="int8-mixed", limit_val_batches=1),
        r"(?s)runs nothing of this model in int8.*rnn: recurrent",
    )
    with pytest.warns(UserWarning, match=said) as caught:
        run.fit(Recurrent(), data())
        run.validate(Recurrent(), data())
    assert sum("runs nothing" in str(w.message) for w in caught) == 1
    with pytest.raises(convert.NothingToSwap, match=r"(?s)rnn: recurrent weights.*precision='bf16-mixed'"):
        trainer(plugins=Int8MixedPrecision()).fit(Recurrent(), data())


def test_string_and_plugin_together() -> None:
    with pytest.raises(ValueError, match=r"both precision='int8-mixed' and plugins=.*; choose one"):
        trainer(precision="int8-mixed", plugins=[Int8MixedPrecision()])


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="autocast must be 'auto', 'bf16' or 'off', got 'fp16'"):
        Int8MixedPrecision(autocast="fp16")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="grad_input must be 'int8', 'hadamard' or 'high'"):
        Int8MixedPrecision(grad_input="int4")  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="runs nothing in int8"):
        Int8MixedPrecision(forward="high", grad_input="high", grad_weight="high")
    with pytest.raises(ValueError, match=r"include='encoder\.\*' matches no layer; there are: net\.\* \(3\)"):
        trainer(plugins=Int8MixedPrecision(include="encoder.*")).fit(Model(), data())


def test_strategies_with_a_precision_of_their_own_are_refused() -> None:
    from lightning.pytorch.strategies import DeepSpeedStrategy

    strategy = object.__new__(DeepSpeedStrategy)  # DeepSpeed itself needs not be there
    with pytest.raises(PrecisionNotApplied, match="doesn't work with DeepSpeedStrategy, which brings its own"):
        registration._check_result(strategy, Int8MixedPrecision(), Int8MixedPrecision, wanted=True)


def test_a_lightning_that_ignores_the_plugin_is_an_error() -> None:
    class Connector:
        def __init__(self, precision: Any = None, plugins: Any = None, strategy: Any = None) -> None:
            self.strategy, self.precision_plugin = strategy, L.pytorch.plugins.Precision()

    registration._wrap(Connector, Int8MixedPrecision, "precision_plugin")
    Connector(precision="32-true")
    with pytest.raises(PrecisionNotApplied, match=r"chose Precision; pass plugins=\[Int8MixedPrecision\(\)\]"):
        Connector(precision="int8-mixed")


def test_a_lightning_of_another_shape_is_left_alone() -> None:
    class Connector:
        def __init__(self, plugins: Any = None, strategy: Any = None) -> None:
            pass

    original = Connector.__init__
    with pytest.warns(UserWarning, match=r"can't be registered .* no longer takes \['precision'\]"):
        registration._wrap(Connector, Int8MixedPrecision, "precision_plugin")
    assert Connector.__init__ is original


def test_registering_again_changes_nothing() -> None:
    before = _AcceleratorConnector.__init__, _Connector.__init__, inspect.signature(L.Trainer)
    precision.register()
    assert (_AcceleratorConnector.__init__, _Connector.__init__, inspect.signature(L.Trainer)) == before


def test_stands_down_where_lightning_knows_the_string(monkeypatch: pytest.MonkeyPatch) -> None:
    original = _AcceleratorConnector.__init__.__wrapped__  # type: ignore[attr-defined]
    monkeypatch.setattr(_AcceleratorConnector, "__init__", original)
    monkeypatch.setattr(
        "lightning.fabric.plugins.precision.precision._PRECISION_INPUT_STR", Literal["32-true", "int8-mixed"]
    )
    precision.register()
    assert _AcceleratorConnector.__init__ is original


def test_pytorch_lightning_refuses_with_a_hint() -> None:
    import pytorch_lightning as pl

    settings: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    pl.Trainer(**settings)
    with pytest.raises(ValueError, match=r"Precision 'int8-mixed' is invalid\. Allowed precision values"):
        pl.Trainer(**settings, precision="int8-mixed")
    with pytest.raises(Exception, match=r"<Int8MixedPrecision for lightning\.Trainer \(not pytorch_lightning"):
        pl.Trainer(**settings, plugins=[Int8MixedPrecision()])
