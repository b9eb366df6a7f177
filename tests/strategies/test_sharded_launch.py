"""``strategy="lowbit_sharded"``: its name and arguments, what it shards as one, and ranks that torchrun starts."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import StrategyRegistry
from support.run_program import PROGRAMS, ROOT, run, surroundings
from torch import nn

from lowbit_lightning import sharding
from lowbit_lightning.strategies import ShardedStrategy, blocks

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the ranks are forked")

# -- torchrun ----------------------------------------------------------------------------------------------------------


def torchrun(nodes: int, ranks: int, *program: str) -> None:
    """A launcher per node, all of them here, that find one another at a rendezvous on the loopback device."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc-per-node={ranks}"]
    command += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=test", "--local-addr=127.0.0.1"]
    environment = surroundings()
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


def test_repeated_blocks_are_found() -> None:
    def block() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    model = nn.ModuleDict({"layers": nn.ModuleList([block(), block()]), "head": nn.Linear(4, 4)})
    assert sharding.repeated_blocks(model) == ["layers.0", "layers.1"]
    model.get_submodule("layers.0.0").weight = model["head"].weight  # shared with the root
    assert sharding.chosen_blocks(model, None) == ["layers.1"]
    assert sharding.chosen_blocks(model, lambda name, module: name == "head") == []
