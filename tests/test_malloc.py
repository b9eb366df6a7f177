"""malloc's threshold: who sets it, who is told, and that freed tensors go."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist

from lowbit_lightning import Int8MixedPrecision, malloc
from lowbit_lightning.strategies import ShardedStrategy

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries have no such threshold")


@pytest.fixture(autouse=True)
def as_new() -> Iterator[None]:
    malloc._set.cache_clear()
    before = dict(os.environ)
    for name in ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"):
        os.environ.pop(name, None)
    yield
    os.environ.clear()  # Lightning adds where the ranks meet
    os.environ.update(before)


@glibc
def test_it_is_said_once() -> None:
    said: list[str] = []
    malloc.return_large_tensors("cuda", said.append)
    assert said == []
    for _ in range(2):
        malloc.return_large_tensors("cpu", said.append)
    (line,) = said
    assert "1 MiB" in line
    assert "MALLOC_MMAP_THRESHOLD_" in line


@pytest.mark.parametrize(
    ("name", "value"),
    [("MALLOC_MMAP_THRESHOLD_", "4194304"), ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=4194304")],
)
def test_the_environment_overrules_it(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(malloc.ctypes, "CDLL", lambda _: pytest.fail("mallopt is called"))
    malloc.return_large_tensors("cpu", lambda line: pytest.fail(line))


@glibc
@pytest.mark.parametrize("told", [{"plugins": [Int8MixedPrecision()]}, {"strategy": ShardedStrategy()}])
def test_the_first_lines_of_a_run_say_it(told: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Net(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))

        def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
            return self.layers(batch).sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(accelerator="cpu", devices=1, max_steps=1, default_root_dir=tmp_path, **quiet, **told)
    try:
        with caplog.at_level("INFO"):
            trainer.fit(Net(), torch.utils.data.DataLoader([*torch.randn(2, 64)]))  # type: ignore[arg-type]
    finally:
        if dist.is_initialized():  # Lightning leaves its process group to the end of the process
            dist.destroy_process_group()
    assert sum("malloc: tensors of 1 MiB" in line for line in caplog.messages) == 1


@glibc
def test_what_is_freed_goes_back() -> None:
    """Of tensors of 8 MiB every second one; malloc has seen larger ones go, and raised its own threshold."""
    program = """
        import importlib.util, sys, torch
        from pathlib import Path
        spec = importlib.util.spec_from_file_location("malloc_alone", sys.argv[2])  # the package takes seconds
        malloc = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(malloc)
        def resident():
            return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 // 2**20
        if sys.argv[1] == "set":
            malloc.return_large_tensors("cpu", lambda line: None)
        for size in (8, 16, 24):
            torch.ones(size * 2**18)
        kept = [torch.ones(2**21) for _ in range(20)]
        before = resident()
        del kept[::2]
        print(before - resident())
    """
    lines = "\n".join(line[8:] for line in program.splitlines())
    given_back = {}
    for told in ("set", "default"):
        command = [sys.executable, "-c", lines, told, malloc.__file__]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        given_back[told] = int(done.stdout)
    assert given_back["set"] >= 75  # MiB, of 80
    assert given_back["default"] < 40
