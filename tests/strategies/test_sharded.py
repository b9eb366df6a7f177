"""``strategy="lowbit_sharded"`` on several ranks, and its checkpoints.

The ranks run ``programs/sharded_strategy.py``, once for all tests of a world size; a single device with no strategy of
ours is what they are compared with. ``make slow`` runs 50 steps on 1, 2, 3 and 4 ranks, with every check on each.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import StrategyRegistry
from support.run_program import PROGRAMS, ROOT, check, outcomes, run
from torch import nn

from lowbit_lightning import optim, sharding
from lowbit_lightning.strategies import ShardedStrategy, blocks, buffers, checkpoints

CHECKPOINTS = (
    "saves_of_every_strategy_load_everywhere",
    "bad_checkpoints_change_nothing",
    "saves_replace_and_recover",
    "a_folder_becomes_a_file",
    "a_file_may_be_written_asynchronously",
    "groups_that_a_callback_added_are_loaded",
    "fit_ends_when_asynchronous_saves_have",
)
CHECKS = (
    "trains_like_a_single_device",
    "clipping_and_norms_are_global",
    "accumulation_reduces_once",
    "traffic_is_the_formulas",
    "manual_optimization_works",
    "a_step_may_call_forward",
    "evaluates_without_and_after_fit",
    "configure_model_is_respected",
    "errors_name_the_remedy",
    "ranks_need_no_common_seed",
    "buffers_are_those_of_rank_0",
    "a_resume_has_the_buffers_of_the_run",
    "parameters_and_buffers_of_two_dtypes_mix",
    "batch_norm_may_be_synchronised",
    *CHECKPOINTS,
)
AGAIN = ("single again", ("saves_of_every_strategy_load_everywhere",))
QUICK = {
    "single": CHECKS,
    "2": (*CHECKS, "replicas_are_equal"),
    "3": ("trains_like_a_single_device", "saves_of_every_strategy_load_everywhere"),
    AGAIN[0]: AGAIN[1],
}
ALL = {
    "single": CHECKS,
    "4": (*CHECKS, "replicas_are_equal"),
    "1": CHECKS,
    "3": CHECKS,
    "2": CHECKS,
    AGAIN[0]: AGAIN[1],
}

pytestmark = [pytest.mark.multiprocess, pytest.mark.skipif(sys.platform == "win32", reason="the ranks are forked")]


def results_of(folder: Path, steps: int, rounds: dict[str, tuple[str, ...]], timeout: float) -> dict[str, Any]:
    run("sharded_strategy.py", folder, steps, *rounds, timeout=timeout)
    return outcomes(folder)


def examine(results: dict[str, Any], world: str, name: str) -> None:
    check(name, (results[f"{world}.{rank}"] for rank in range(int(world) if world.isdigit() else 1)))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return results_of(tmp_path_factory.mktemp("ranks"), 6, QUICK, timeout=280)


@pytest.mark.parametrize(("world", "name"), [(world, name) for world, names in QUICK.items() for name in names])
def test_on_ranks(world: str, name: str, results: dict[str, Any]) -> None:
    examine(results, world, name)


@pytest.fixture(scope="module")
def all_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return results_of(tmp_path_factory.mktemp("ranks"), 50, ALL, timeout=1700)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("world", "name"), [(world, name) for world, names in ALL.items() for name in names])
def test_on_up_to_four_ranks(world: str, name: str, all_results: dict[str, Any]) -> None:
    examine(all_results, world, name)


# -- saves that die ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rounds", [3, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(900)])], ids=["3", "50"]
)
def test_killed_saves_leave_a_checkpoint(rounds: int, tmp_path: Path) -> None:
    output = run("sharded_strategy_kill.py", tmp_path, rounds, timeout=850 if rounds > 3 else 250)
    assert output.count("killed") == rounds


# -- torchrun ----------------------------------------------------------------------------------------------------------


def torchrun(nodes: int, ranks: int, *program: str) -> None:
    """A launcher per node, all of them here, that find one another at a rendezvous on the loopback device."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc-per-node={ranks}"]
    command += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=test", "--local-addr=127.0.0.1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    launchers = [
        subprocess.Popen([*command, *program], env=environment, stderr=subprocess.PIPE, text=True) for _ in range(nodes)
    ]
    try:
        for launcher in launchers:
            _, errors = launcher.communicate(timeout=200)
            assert launcher.returncode == 0, errors[-4000:]
    finally:
        for launcher in launchers:
            launcher.terminate()  # it ends its ranks
            launcher.wait()


@pytest.mark.slow
@pytest.mark.parametrize(("nodes", "ranks"), [(1, 2), (2, 1), (2, 2)])
def test_torchrun(nodes: int, ranks: int, tmp_path: Path) -> None:
    run("sharded_strategy_torchrun.py", tmp_path / "alone", timeout=100)
    expected = json.loads((tmp_path / "alone").read_text())["losses"]
    torchrun(nodes, ranks, str(PROGRAMS / "sharded_strategy_torchrun.py"), str(tmp_path / "together"))
    found = json.loads((tmp_path / "together").read_text())
    assert (found["nodes"], found["ranks"]) == (nodes, nodes * ranks)
    assert found["losses"] == pytest.approx(expected, rel=1e-6)
    names = [torch.load(tmp_path / f"{which}.ckpt")["state_dict"].keys() for which in ("alone", "together")]
    assert names[0] == names[1]


@pytest.mark.slow
@pytest.mark.parametrize(("nodes", "ranks"), [(1, 2), (2, 1)])
def test_the_example_under_torchrun(nodes: int, ranks: int, tmp_path: Path) -> None:
    example = ROOT / "examples" / "train_gpt.py"
    size = [
        "--steps=8",
        "--warmup=2",
        "--validate-every=8",
        "--validation-batches=4",
        "--batch=2",
        "--width=64",
        "--no-progress",
    ]
    places = [f"--devices={ranks}", f"--nodes={nodes}", "--strategy=lowbit_sharded", f"--out={tmp_path}"]
    torchrun(nodes, ranks, str(example), *size, *places)
    full, low = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert low["int8_matmuls"] == low["int8_matmuls_predicted"] > 0
    assert low["val_loss"] == pytest.approx(full["val_loss"], rel=0.01)
    assert low["optimizer_state_bytes"] < 0.5 * full["optimizer_state_bytes"]


# -- in this process ---------------------------------------------------------------------------------------------------


def test_the_name_is_registered() -> None:
    assert StrategyRegistry["lowbit_sharded"]["strategy"] is ShardedStrategy
    assert isinstance(
        L.Trainer(strategy="lowbit_sharded", accelerator="cpu", devices=1, logger=False).strategy, ShardedStrategy
    )


@pytest.mark.parametrize(
    ("options", "word"), [({"optimizer_bits": 4}, "4"), ({"replicas": 0}, "0"), ({"gather_dtype": torch.int8}, "int8")]
)
def test_arguments_are_checked(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(options))}.*{word}"):
        ShardedStrategy(**options)


def test_under_manual_optimization_what_a_step_calls_is_a_root() -> None:
    model = nn.Module()
    model.one, model.two = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model.several, model.act = nn.ModuleList([nn.Linear(4, 4), nn.ReLU()]), nn.ReLU()
    assert blocks.roots(model) == ["one", "two", "several.0"]
    model.two[0].weight = model.one.weight
    with pytest.raises(ValueError, match="gathers one and two one by one, but they share"):
        blocks.roots(model)
    model.scale = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="scale of Module itself would stay cut"):
        blocks.roots(model)


MIXING: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm1d": lambda: nn.BatchNorm1d(8),
    "BatchNorm2d": lambda: nn.Sequential(nn.Unflatten(1, (8, 1, 1)), nn.BatchNorm2d(8)),
    "BatchNorm3d": lambda: nn.Sequential(nn.Unflatten(1, (8, 1, 1, 1)), nn.BatchNorm3d(8)),
    "InstanceNorm1d": lambda: nn.InstanceNorm1d(6, affine=True, track_running_stats=True),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(8),
    "spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)),
    "old spectral_norm": lambda: nn.utils.spectral_norm(nn.Linear(8, 8)),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", MIXING)
def test_modules_compute_with_buffers_wider_than_their_parameters(kind: str, training: bool) -> None:
    """FSDP2 puts a parameter in bfloat16 into its place; the numbers are those of the same values in float32."""
    x = torch.randn(6, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # old spectral_norm
        exact, module = (MIXING[kind]().train(training) for _ in range(2))
    for p in exact.parameters():
        p.data = torch.randn(p.shape).bfloat16().float()
    module.load_state_dict(exact.state_dict())
    buffers.widen(module)
    cast = {name: nn.Parameter(p.detach().bfloat16()) for name, p in module.named_parameters()}
    for name, p in cast.items():
        owner, _, own = name.rpartition(".")
        module.get_submodule(owner)._parameters[own] = p
    with torch.autocast("cpu", torch.bfloat16):
        outputs = module(x), exact(x)
    torch.testing.assert_close(outputs[0], outputs[1])
    assert all(torch.equal(a, b) for a, b in zip(module.buffers(), exact.buffers(), strict=True))
    outputs[0].sum().backward()
    outputs[1].sum().backward()
    for name, p in exact.named_parameters():
        assert module.get_parameter(name) is cast[name]
        torch.testing.assert_close(cast[name].grad, p.grad.bfloat16())


def test_8_bit_states_are_not_loaded_into_torchs_optimizer() -> None:
    model = nn.Linear(64, 64)
    ours, theirs = optim.AdamW(model.parameters()), torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 64)).sum().backward()
    ours.step()
    with pytest.raises(
        ValueError, match=r"last\.ckpt holds 8-bit states, which torch.*AdamW cannot .*lowbit convert last"
    ):
        checkpoints.load_optimizers([theirs], {"optimizer_states": [ours.state_dict()]}, "last.ckpt")
    assert not theirs.state
    checkpoints.load_optimizers([theirs], {"optimizer_states": [ours.state_dict(bits=32)]}, "last.ckpt")
    assert theirs.state


def test_repeated_blocks_are_found() -> None:
    def block() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    model = nn.ModuleDict({"layers": nn.ModuleList([block(), block()]), "head": nn.Linear(4, 4)})
    assert sharding.repeated_blocks(model) == ["layers.0", "layers.1"]
    model.get_submodule("layers.0.0").weight = model["head"].weight  # shared with the root
    assert sharding.chosen_blocks(model, None) == ["layers.1"]
    assert sharding.chosen_blocks(model, lambda name, module: name == "head") == []
