"""LowBitMonitor in a Trainer: what it measures and finds, and that it changes nothing."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from support.int8_models import matmuls
from support.monitored import BATCHES, FEATURES, Model, Validated, data, fit, ours, quiet
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowbit_lightning import kernels
from lowbit_lightning.callbacks import LowBitMonitor
from lowbit_lightning.callbacks.quantization import PRODUCTS
from lowbit_lightning.layers import Experts, Int8Linear, Products, speed

# -- what is measured ------------------------------------------------------------------------------------------------


def noise_to_signal(x: np.ndarray, features: int) -> float:
    """Of an operand in float64; ``features``: the axis that counts features."""
    scale = np.abs(x).max(1, keepdims=True) / 127
    error = x - np.rint(x / scale) * scale
    ratio = np.sort((error**2).sum(1 - features) / (x**2).sum(1 - features))
    return ratio[len(ratio) // 2]  # of an even number the worse: torch's median of the dB is the lower


def oracle(left: np.ndarray, right: np.ndarray, features: int) -> float:
    """dB of ``left @ right.T``."""
    return -10 * np.log10(noise_to_signal(left, features) + noise_to_signal(right, features))


@pytest.mark.filterwarnings("ignore:autocast='bf16' on cpu, whose hardware emulates")
@pytest.mark.parametrize("autocast", ["off", "bf16"])
def test_measures_what_float64_measures(tmp_path: Path, autocast: str) -> None:
    """All three products of both layers in a step, from operands that hooks of our own caught."""
    dtype = torch.bfloat16 if autocast == "bf16" else torch.float32
    caught: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    class Catch(Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            assert isinstance(pl_module, Model)
            for name in ("up", "down"):
                getattr(pl_module, name).register_forward_hook(self.hook(name), with_kwargs=True)

        def hook(self, name: str) -> Any:
            def keep(layer: nn.Linear, args: Any, kwargs: Any, output: Tensor) -> None:
                x, weight = (args[0] if args else kwargs["input"]).detach().to(dtype), layer.weight.detach().clone()
                output.register_hook(lambda grad: caught.update({name: (x, weight, grad)}))

            return keep

    monitor = quiet(per_layer=True)
    fit(Model(spike=30), tmp_path, monitor, Catch(), max_steps=1, precision={"autocast": autocast})
    for name in ("up", "down"):
        x, w, dy = (t.double().numpy() for t in caught[name])
        expected = {"forward": oracle(x, w, 1), "grad_weight": oracle(dy.T, x.T, 0)}
        if name == "down":  # the first layer's input needs no gradient
            expected["grad_input"] = oracle(dy, w.T, 1)
        for product in ("forward", "grad_input", "grad_weight"):
            key = f"int8/{product}/snr/{name}"
            assert (key in monitor.metrics) == (product in expected)
            if product in expected:
                assert monitor.metrics[key].item() == pytest.approx(expected[product], abs=1e-3), key
    assert "int8/forward/snr/head" not in monitor.metrics
    low, high = sorted(monitor.metrics[f"int8/forward/snr/{name}"].item() for name in ("up", "down"))
    assert monitor.metrics["int8/forward/snr_min"].item() == low < 25 < 35 < high


class Routed(Model):
    """Experts in place of both layers; one of them gets no rows."""

    def __init__(self) -> None:
        super().__init__()
        del self.up, self.down
        self.experts: Any = Experts(4, FEATURES, 48)

    def forward(self, x: Tensor) -> Tensor:
        index = torch.tensor([[0, 3], [3, 1]]).repeat(len(x) // 2, 1)
        return self.head(self.experts(x.requires_grad_(), index, torch.full((len(x), 2), 0.5)))


def test_experts_are_measured_with_their_own_rows(tmp_path: Path) -> None:
    """The mean of the decibels of each operand, over both projections of the experts that have rows."""
    model, monitor = Routed(), quiet(per_layer=True)
    operands: list[list[tuple[np.ndarray, np.ndarray]]] = [[], [], []]  # of a product, with the axis of features

    def keep(layer: Any, x: Tensor, weights: Tensor, y: Tensor, offs: Tensor) -> None:
        x, weights = x.detach().clone(), weights.detach().clone()

        def with_gradient(grad: Tensor) -> None:
            for w, first, last in zip(weights, [0, *offs.tolist()], offs.tolist(), strict=False):
                if last > first:
                    part, dy, matrix = (t.double().numpy() for t in (x[first:last], grad[first:last], w))
                    for found, pair in zip(operands, ((part, matrix), (dy, matrix.T), (dy.T, part.T)), strict=True):
                        found.append(pair)

        y.register_hook(with_gradient)

    class Keep(Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            model.experts.register_projection_hook(keep)

    fit(model, tmp_path, monitor, Keep(), max_steps=1)
    for product, pairs, features in zip(PRODUCTS, operands, (1, 1, 0), strict=True):
        assert len(pairs) == 6
        sides = ([-10 * np.log10(noise_to_signal(x, features)) for x in side] for side in zip(*pairs, strict=True))
        expected = -10 * np.log10(sum(10 ** (-np.mean(side) / 10) for side in sides))
        assert monitor.metrics[f"int8/{product}/snr/experts"].item() == pytest.approx(expected, abs=5e-3), product


class Convolved(Model):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Sequential(  # type: ignore[assignment]
            nn.Unflatten(1, (16, 4)), nn.Conv1d(16, 32, 3, padding=1), nn.Flatten()
        )


@pytest.mark.parametrize("fallback", [False, True])
def test_a_layer_that_becomes_plain_in_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fallback: bool
) -> None:
    """By ``swap="faster"``: its one sample counts, and the run goes on."""
    monkeypatch.setattr(speed, "times", lambda shape, _: speed.Times(2.0 if hasattr(shape, "kernel") else 0.5, 1.0))
    model, monitor = Convolved(), quiet(per_layer=True, minimum_snr=90.0, patience=1, fallback=fallback)
    seen: list[set[str]] = []

    class Note(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            seen.append({name.rpartition("/")[2] for name in monitor.metrics if name.startswith("int8/forward/snr/")})

    with pytest.warns(UserWarning, match=r"minimum_snr=90 dB in 1 samples in a row: down"):
        fit(model, tmp_path, monitor, Note())
    assert seen[0] == {"up.1", "down"}
    assert all(layers <= {"down"} for layers in seen[1:])
    assert "up.1" not in {**monitor.rotated, **monitor.fallen_back}


def test_a_mean_over_accumulated_batches(tmp_path: Path) -> None:
    def means(accumulate: int) -> list[float]:
        """The forward ratio of up in each sample of a model that stands still."""
        model = Model()
        seen: list[float] = []
        model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.0)  # type: ignore[method-assign]

        class Note(Callback):
            def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
                if trainer.global_step > len(seen):
                    seen.append(monitor.metrics["int8/forward/snr/up"].item())

        monitor = quiet(per_layer=True)
        fit(model, tmp_path, monitor, Note(), accumulate_grad_batches=accumulate, max_steps=BATCHES // accumulate)
        return seen

    single, triple = means(1), means(3)
    assert len(single) == 6
    assert max(single) - min(single) > 0.2
    assert triple == pytest.approx(
        [np.mean(single[:3]), np.mean(single[3:])], abs=0.02
    )  # decibels add up, but not quite


def test_gradients_rounded_at_random_have_twice_the_noise(tmp_path: Path) -> None:
    nearest, random = quiet(), quiet()
    for monitor, rounding in ((nearest, "nearest"), (random, "stochastic")):
        fit(Model(), tmp_path, monitor, precision={"gradient_rounding": rounding, "grad_weight": "high"}, max_steps=1)
    # dy loses 3 dB, the weight nothing: together a little less
    difference = [monitor.metrics["int8/grad_input/snr_min"].item() for monitor in (nearest, random)]
    assert 1.5 < difference[0] - difference[1] < 3.1
    assert nearest.metrics["int8/forward/snr_min"] == random.metrics["int8/forward/snr_min"]


def test_eight_bit_states(tmp_path: Path) -> None:
    monitor = quiet()
    trainer = fit(Model(), tmp_path, monitor)
    states = trainer.optimizers[0].state.values()
    for name, zero, smallest, largest in (
        ("exp_avg", [127], [126, 128], [0, 255]),
        ("exp_avg_sq", [0], [1], [255]),
    ):
        codes = np.concatenate([s[f"{name}_codes"].numpy().ravel() for s in states if f"{name}_codes" in s])
        assert codes.size == 2 * FEATURES * 128
        for kind, values in (("zero", zero), ("smallest", smallest), ("largest", largest)):
            share = np.isin(codes, values).mean()
            assert monitor.metrics[f"int8/optimizer/{name}/{kind}"].item() == pytest.approx(share, rel=1e-6)
    assert monitor.metrics["int8/optimizer/exp_avg/largest"] >= 1 / 256


# -- it changes nothing ----------------------------------------------------------------------------------------------


def reentrant(layer: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(layer, x.requires_grad_(), use_reentrant=True)


def recomputed(layer: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(layer, x, use_reentrant=False)


@pytest.mark.parametrize("run", [None, reentrant, recomputed])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"precision": {"autocast": "bf16"}},
        {"precision": {"gradient_rounding": "stochastic"}},
        {"accumulate_grad_batches": 2, "max_steps": 3},
    ],
)
def test_losses_are_equal_to_the_bit(tmp_path: Path, settings: dict[str, Any], run: Any) -> None:
    plain, watched, monitor = Model(run=run), Model(run=run), quiet(2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="autocast='bf16' on cpu, whose hardware emulates")
        fit(plain, tmp_path, **settings)
        fit(watched, tmp_path, monitor, **settings)
    assert plain.losses == watched.losses
    assert len(set(plain.losses)) == BATCHES
    pairs = zip(plain.parameters(), watched.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)
    assert {f"int8/{p}/snr_min" for p in ("forward", "grad_input", "grad_weight")} <= set(monitor.metrics)


def test_other_steps_pay_nothing(tmp_path: Path) -> None:
    """No hooks, and not one kernel more, but in steps 0 and 3; validation inside a sampled step isn't measured."""
    quantisers: list[int] = []
    hooks: list[int] = []

    class Count(Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            kernels.reset_calls()
            layers = [m for m in pl_module.modules() if isinstance(m, Int8Linear)]
            hooks.append(sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in layers))

        def on_train_batch_end(self, *_: Any) -> None:
            quantisers.append(sum(n for (op, _), n in kernels.calls().items() if op.startswith("quantize_")))

    fit(Model(), tmp_path, quiet(3), Count())
    assert hooks == [4, 0, 0, 4, 0, 0]
    without, quantisers[:] = quantisers[:], []
    fit(Model(), tmp_path, Count())
    # forward: 4 operands; grad_weight: 4; grad_input of the second layer: 2
    assert np.subtract(without, quantisers).tolist() == [10, 0, 0, 10, 0, 0]


def test_validation_inside_a_sample_is_not_measured(tmp_path: Path) -> None:
    def run(model: Model, **settings: Any) -> dict[str, float]:
        monitor = quiet(2, per_layer=True)
        fit(model, tmp_path, monitor, accumulate_grad_batches=2, max_steps=1, **settings)
        return {name: value.item() for name, value in monitor.metrics.items()}

    assert run(Validated(), val_check_interval=1) == run(Model())


# -- the guard -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("stays_in_int8")
def test_a_planted_outlier_is_named(tmp_path: Path) -> None:
    model, monitor = Model(spike=100), LowBitMonitor(1, picture=False)
    advice = r"Int8MixedPrecision\(overrides={'down': {'forward': 'hadamard'}}\)"
    with pytest.warns(
        UserWarning, match=rf"in 2 samples in a row: down \(forward, 1[0-9]\.\d dB\)\. .*{advice}"
    ) as seen:
        fit(model, tmp_path, monitor)
    assert ours(seen) == 1  # once, though it suffers to the end
    assert model.down.products == Products()
    assert "(down)" in str(monitor)
    assert "up" not in str(monitor).split("forward")[1].splitlines()[0]


def test_nothing_is_reported_of_ordinary_data(tmp_path: Path) -> None:
    monitor = LowBitMonitor(1, picture=False)
    fit(Model(), tmp_path, monitor)  # warnings are errors
    assert monitor.fallen_back == {}
    assert all(v > 30 for k, v in monitor.metrics.items() if k.endswith("snr_min"))


@pytest.mark.usefixtures("stays_in_int8")
def test_it_falls_back_from_the_next_step_on_and_stays(tmp_path: Path) -> None:
    found: list[int] = []

    class Count(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            kernels.reset_calls()

        def on_train_batch_end(self, *_: Any) -> None:
            found.append(matmuls())

    path, expected = tmp_path / "four.ckpt", Products(forward="high", rotation="hadamard")
    model, monitor = Validated(spike=100), LowBitMonitor(1, minimum_snr=35, fallback=True, picture=False)
    settings: dict[str, Any] = {"precision": {"rotation": "hadamard"}}  # which is not enough
    with pytest.warns(UserWarning, match="down .*They run in high precision from the next step on"):
        trainer = fit(model, tmp_path, monitor, Count(), max_steps=4, **settings)
    assert found == [5, 5, 4, 4]
    assert model.down.products == expected
    assert model.up.products == Products(rotation="hadamard")
    assert monitor.fallen_back == {"down": ["forward"]}
    assert "down (forward)" in str(monitor)
    trainer.save_checkpoint(path)

    trainer.validate(model, verbose=False)  # converts again, with the plugin's products
    assert model.down.products == expected

    resumed, again = Model(spike=100), LowBitMonitor(1, minimum_snr=35, fallback=True, picture=False)
    with warnings.catch_warnings():  # others are errors: it is not reported again
        warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch")
        fit(resumed, tmp_path, again, ckpt_path=path, **settings)
    assert resumed.down.products == expected
    assert again.fallen_back == monitor.fallen_back

    torch.load(path, weights_only=True)


@pytest.mark.usefixtures("stays_in_int8")
def test_it_rotates_before_it_falls_back(tmp_path: Path) -> None:
    """A rotation brings 13 dB to more than 20: it runs in int8 to the end, and a checkpoint says so."""
    model, monitor = Model(spike=100), LowBitMonitor(1, fallback=True, per_layer=True, picture=False)
    said = r"down \(forward, 1.\.. dB\)\. They are rotated from the next step on"
    with pytest.warns(UserWarning, match=said) as seen:
        fit(model, tmp_path, monitor)
    assert ours(seen) == 1
    assert model.down.products == Products(forward="hadamard")
    assert (monitor.rotated, monitor.fallen_back) == ({"down": ["forward"]}, {})
    assert monitor.metrics["int8/forward/snr/down"] > 25
    assert "rotated since they fell below 20.0: down (forward)" in str(monitor)
    again = LowBitMonitor(1, picture=False)
    again.load_state_dict(monitor.state_dict())
    assert again.rotated == monitor.rotated
    again.load_state_dict({name: value for name, value in monitor.state_dict().items() if name != "rotated"})
    assert again.rotated == {}


def test_patience_counts_samples_in_a_row(tmp_path: Path) -> None:
    class Spikes(Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            pl_module.spike = 100.0 if batch_idx in (0, 1, 3, 4) else 1.0

    fit(Model(), tmp_path, LowBitMonitor(1, patience=3, picture=False), Spikes())
    with pytest.warns(UserWarning, match="in 2 samples in a row: down"):
        fit(Model(), tmp_path, LowBitMonitor(1, patience=2, picture=False), Spikes())


# -- what it can't see -----------------------------------------------------------------------------------------------


def test_compiled_layers_are_named(tmp_path: Path) -> None:
    plain, compiled, monitor = Model(), Model(), quiet(per_layer=True)
    fit(plain, tmp_path)
    compiled.up.compile(backend="aot_eager", fullgraph=True)
    with pytest.warns(UserWarning, match=r"could not measure 1 of 2 int8 layers.*torch.compile.*: up$") as seen:
        fit(compiled, tmp_path, monitor)
    assert ours(seen) == 1
    assert "int8/forward/snr/down" in monitor.metrics
    assert "int8/forward/snr/up" not in monitor.metrics
    assert compiled.losses == plain.losses


def test_a_model_without_int8(tmp_path: Path) -> None:
    model = Model()
    trainer = L.Trainer(
        accelerator="cpu", max_steps=2, callbacks=[quiet()], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="no int8 layer"):
        trainer.fit(model, data())
    assert "int8/optimizer/exp_avg/zero" in trainer.callback_metrics


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps must be a positive integer, got 0"),
        ({"patience": 1.5}, "patience must be a positive integer, got 1.5"),
        ({"minimum_snr": None, "fallback": True}, "fallback=True needs minimum_snr"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LowBitMonitor(**settings)


def test_a_state_of_another_version() -> None:
    with pytest.raises(ValueError, match="version 1 of its state, not 2"):
        quiet().load_state_dict({"version": 2})
