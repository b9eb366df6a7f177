"""What autocast="auto" chooses, that it says why, and that it is one choice for all ranks and runs. Timings are made up
wherever the answer depends on them."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from support.quiet import quiet_trainer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader

from lowbit_lightning import Int8MixedPrecision
from lowbit_lightning.kernels.compile import cache
from lowbit_lightning.layers import Experts, timing
from lowbit_lightning.precision import FabricInt8MixedPrecision, autocast, int8

FP32_FASTER, BF16_FASTER, EVEN = (1e-3, 2e-3), (2e-3, 1e-3), (1.05e-3, 1e-3)


class Model(L.LightningModule):
    """Records the dtypes that its output layer, which is not in int8, computes in."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.net, self.head = nn.Linear(32, width), nn.Linear(width, 4)
        self.dtypes: set[torch.dtype] = set()

    def training_step(self, x: Tensor, index: int) -> Tensor:
        y = self.head(self.net(x))
        self.dtypes.add(y.dtype)
        return y.float().square().mean()

    def validation_step(self, x: Tensor, index: int) -> None:
        self.training_step(x, index)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-2)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets whether the processor multiplies bf16, and how long matmuls take."""

    def set_up(timings: tuple[float, float] | None, bf16: bool = True) -> None:
        def seconds(shapes: Any) -> tuple[float, float]:
            assert timings is not None, "nothing is measured where the answer is known"
            return timings

        for module in (autocast, int8):
            monkeypatch.setattr(module, "computes_in_bf16", lambda device: bf16)
        monkeypatch.setattr(autocast, "seconds", seconds)

    return set_up


def fit(model: Model, plugin: Int8MixedPrecision, checkpoint: Path | None = None, epochs: int = 1) -> L.Trainer:
    trainer = quiet_trainer(plugins=plugin, max_epochs=epochs)
    data: Any = DataLoader(torch.ones(8, 32), batch_size=4)  # type: ignore[arg-type]
    trainer.fit(model, data, data, ckpt_path=checkpoint)
    return trainer


# -- the choice ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("timings", "bf16", "expected", "why"),
    [
        (
            BF16_FASTER,
            True,
            torch.bfloat16,
            "matmuls of 32 to 64, 64 to 4 features take 2 ms in float32, 1 in bfloat16",
        ),
        (FP32_FASTER, True, torch.float32, "take 1 ms in float32, 2 in bfloat16 on this processor"),
        (EVEN, True, torch.float32, "1.05 ms in float32, 1 in bfloat16"),
        (None, False, torch.float32, "the processor has no instructions for bfloat16"),
    ],
)
def test_the_faster_one_is_chosen_and_the_report_says_why(
    machine: Any, timings: Any, bf16: bool, expected: torch.dtype, why: str
) -> None:
    machine(timings, bf16)
    model, plugin = Model(), Int8MixedPrecision()
    fit(model, plugin)
    assert model.dtypes == {expected}
    name = "bfloat16 (autocast)" if expected == torch.bfloat16 else "float32"
    assert f"other ops run in {name}: " in str(plugin.report)
    assert why in str(plugin.report)


@pytest.mark.parametrize("wanted", ["bf16", "off"])
def test_a_dtype_that_was_asked_for_is_not_measured(machine: Any, wanted: Any) -> None:
    machine(None)
    model, plugin = Model(), Int8MixedPrecision(autocast=wanted)
    fit(model, plugin)
    assert model.dtypes == {torch.bfloat16 if wanted == "bf16" else torch.float32}
    assert "other ops" not in str(plugin.report)


def test_on_a_gpu_it_is_known(machine: Any) -> None:
    for bf16 in (True, False):
        machine(None, bf16)
        assert autocast.choose(Model(), "cuda").bf16 is bf16


def test_fabric_chooses_too(machine: Any) -> None:
    for timings, expected in ((BF16_FASTER, True), (FP32_FASTER, False)):
        machine(timings)
        plugin = FabricInt8MixedPrecision()
        L.Fabric(accelerator="cpu", devices=1, plugins=plugin).setup(Model())
        assert isinstance(plugin.forward_context(), torch.autocast) == expected


# -- one choice ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "then"), [(BF16_FASTER, FP32_FASTER), (FP32_FASTER, BF16_FASTER)])
def test_a_resumed_run_keeps_it(machine: Any, tmp_path: Path, first: Any, then: Any) -> None:
    """Also on a machine where the other one is faster; a run of its own chooses anew."""
    machine(first)
    model = Model()
    fit(model, Int8MixedPrecision()).save_checkpoint(tmp_path / "a.ckpt")
    torch.load(tmp_path / "a.ckpt", weights_only=True)
    machine(then)
    resumed, plugin, other = Model(), Int8MixedPrecision(), Model()
    trainer = fit(resumed, plugin, tmp_path / "a.ckpt", epochs=2)
    trainer.validate(resumed, DataLoader(torch.ones(4, 32)), verbose=False)  # type: ignore[arg-type]
    assert resumed.dtypes == model.dtypes
    assert "so it was in the run that this one resumes" in str(plugin.report)
    fit(other, Int8MixedPrecision())
    assert other.dtypes.isdisjoint(model.dtypes)
    wanted = Model()
    fit(wanted, Int8MixedPrecision(autocast="off"), tmp_path / "a.ckpt", epochs=2)
    assert wanted.dtypes == {torch.float32}


@pytest.mark.parametrize(("here", "there"), [(BF16_FASTER, False), (FP32_FASTER, True)])
def test_a_sharded_run_cannot_follow_and_says_so(machine: Any, here: Any, there: bool) -> None:
    """FSDP2 gathers parameters in the dtype that was chosen when it sharded them: before the checkpoint is read."""

    class Sharded(Model, FSDPModule):  # as fully_shard derives it
        def __new__(cls) -> Any:
            return object.__new__(cls)

    machine(here)
    plugin, model = Int8MixedPrecision(), Sharded()
    plugin.convert_module(model)
    with pytest.warns(UserWarning, match=rf"Int8MixedPrecision\(autocast='{'bf16' if there else 'off'}'\) goes on in"):
        plugin.on_load_checkpoint({int8.KEPT: {"bf16": there}})
    assert isinstance(plugin.forward_context(), torch.autocast) != there
    plugin.on_load_checkpoint({int8.KEPT: {"bf16": not there}})


def test_a_checkpoint_of_before_is_resumed(machine: Any, tmp_path: Path) -> None:
    machine(BF16_FASTER)
    fit(Model(), Int8MixedPrecision(autocast="off")).save_checkpoint(tmp_path / "a.ckpt")
    assert int8.KEPT not in torch.load(tmp_path / "a.ckpt", weights_only=True)
    model = Model()
    fit(model, Int8MixedPrecision(), tmp_path / "a.ckpt", epochs=2)
    assert model.dtypes == {torch.bfloat16}


# -- measuring -------------------------------------------------------------------------------------------------------


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_it_is_measured_once_and_kept(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[Any] = []

    def measure(shapes: Any) -> tuple[float, float]:
        measured.append(shapes)
        return float(len(measured)), 1.0

    monkeypatch.setattr(autocast, "measure", measure)
    for _ in range(2):
        autocast.seconds.cache_clear()  # as a new process
        assert autocast.seconds(((64, 64),)) == (1.0, 1.0)
    assert autocast.seconds(((64, 32),)) == (2.0, 1.0), "another shape"
    assert len(list(empty_cache.iterdir())) == len(measured) == 2
    monkeypatch.setattr(torch, "__version__", "9.9")
    autocast.seconds.cache_clear()
    assert autocast.seconds(((64, 64),)) == (3.0, 1.0), "another torch"
    autocast.seconds.cache_clear()


def test_a_measurement_is_short_and_draws_no_random_number() -> None:
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        times = autocast.measure(((256, 256), (64, 256)))
    assert time.perf_counter() - start < 1
    assert all(0 < value < math.inf for value in times)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_shapes_are_the_largest_of_the_model() -> None:
    layers = [(50_000, 512), (512, 512), (2048, 512), (512, 2048), (512, 512), (10, 512)]
    assert autocast._largest(layers) == ((2048, 512), (512, 2048), (512, 512))


def test_convolutions_count_as_matmuls_and_embeddings_do_not() -> None:
    model = nn.ModuleList(
        [nn.Conv2d(3, 64, 5), nn.Embedding(900, 64), nn.Linear(64, 32), nn.LazyLinear(5), nn.MultiheadAttention(16, 2)]
    )
    assert set(autocast._matrices(model)) == {(64, 75), (32, 64), (48, 16), (16, 16)}


def test_experts_count_each_as_a_matmul() -> None:
    """Not all of them together as one matrix of few rows."""
    assert set(autocast._matrices(Experts(8, 64, 32))) == {(64, 64), (64, 32)}


def test_if_rank_0_fails_all_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others wait for its answer, so it gives one."""
    sent: list[Any] = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda answer, src: sent.append(list(answer)))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    with pytest.raises(ZeroDivisionError):
        timing.agreed(lambda: 1 // 0)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    receive = lambda answer, src: answer.__setitem__(1, sent[0][1])  # noqa: E731
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", receive)
    with pytest.raises(RuntimeError, match=r"rank 0 failed: ZeroDivisionError: integer"):
        timing.agreed(lambda: 2)


def test_hardware_with_bf16_is_recognised() -> None:
    assert autocast.computes_in_bf16("cpu") in (True, False)
    assert autocast.computes_in_bf16("meta") is False
