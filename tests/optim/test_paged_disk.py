"""Optimizer states in a page file, end to end: processes that are killed, and states larger than memory."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import run_program
from torch import nn

from lowbit_lightning import optim
from lowbit_lightning.state.pages import file

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="page files are Linux's")

MIB = 2**20


def run(name: str, *arguments: object, timeout: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(run_program.PROGRAMS / name), *map(str, arguments)]
    environment = run_program.surroundings()
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, env=environment)


def test_what_cannot_lie_on_the_disk_is_an_error_before_training(
    page_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, free = [nn.Parameter(torch.zeros(512, 512))], 2 * 512 * 512 - 1
    with pytest.raises(ValueError, match="page_dir must be an existing folder"):
        optim.AdamW(params, paged="disk", page_dir=str(page_dir / "nowhere"))
    optimizer = optim.AdamW(params, paged="disk", page_dir=str(page_dir))
    monkeypatch.setattr(file.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(OSError, match=rf"needs 524,288 bytes in {page_dir}, where {free:,} are free: choose another"):
        optim.AdamW(params, paged="disk", page_dir=str(page_dir))
    with pytest.raises(OSError, match="are free"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(512, 512))]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.filterwarnings("ignore:.*has no O_DIRECT")
@pytest.mark.parametrize(("name", "what"), [("preadv", "reading"), ("pwritev", "writing")])
def test_a_broken_disk_is_an_error_of_the_step(
    name: str, what: str, page_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = [nn.Parameter(torch.zeros(300, 1024)) for _ in range(8)]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = optim.AdamW(params, bits=32, paged="disk", page_dir=str(page_dir))
    for _ in range(2):
        optimizer.step()

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, name, broken)
    says = rf"{what} \d+ bytes at offset \d+ of the page file in {page_dir} failed: Input/output error"
    with pytest.raises(OSError, match=says) as caught:
        for _ in range(2):  # what a step stores last is waited for in the next
            optimizer.step()
    assert caught.value.errno == errno.EIO
    monkeypatch.undo()
    for use in (optimizer.step, optimizer.step, optimizer.state_dict):  # what is lost is lost
        with pytest.raises(OSError, match=says):
            use()


@pytest.mark.parametrize("rounds", [2, pytest.param(25, marks=pytest.mark.slow)])
def test_a_killed_run_leaves_its_last_checkpoint_and_nothing_else(rounds: int, tmp_path: Path, page_dir: Path) -> None:
    printed = run_program.run("paged_kill.py", tmp_path, page_dir, rounds, timeout=60 + 10 * rounds)
    assert printed.count("round ") == rounds


@pytest.mark.slow
def test_states_larger_than_the_memory_that_is_allowed(page_dir: Path) -> None:
    """Under RLIMIT_DATA, which counts all private memory that can be written; to the bit as without paging."""
    limit = 1024
    paged, plain, refused = (
        run("paged_beyond_memory.py", *told, page_dir, timeout=600)
        for told in (("paged", limit), ("plain", 0), ("plain", limit))
    )
    assert paged.returncode == plain.returncode == 0, paged.stderr[-3000:] + plain.stderr[-3000:]
    found, expected = json.loads(paged.stdout), json.loads(plain.stdout)
    assert found["states"] > limit * MIB
    assert found["digest"] == expected["digest"]
    assert found["losses"] == expected["losses"]
    assert found["losses"][-1] < found["losses"][0]
    assert found["VmHWM"] < found["states"] < expected["VmHWM"]  # the kernel's account of resident memory agrees
    assert refused.returncode != 0  # the limit is one
    assert "can't allocate memory" in refused.stderr
