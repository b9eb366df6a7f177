"""Facts of this machine and of staged ones, and the children that gather them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lowbit_command.doctor import children, coverage, examine, selftest, show
from lowbit_command.doctor.cases import cases
from lowbit_command.doctor.children import Died
from lowbit_command.doctor.finding import FAIL, OK, WARN, Finding
from lowbit_command.doctor.probes import cache, compiler, environment, limits, packages, system
from lowbit_lightning import cli
from lowbit_lightning.kernels import backend
from lowbit_lightning.kernels.compile import cache as kernels_cache
from lowbit_lightning.kernels.cpu import int8_product

KERNEL = "0123456789abcdef0123456789abcdef.so"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("LOWBIT_LIGHTNING_CACHE", str(folder))
    return folder


def only(findings: list[Finding]) -> Finding:
    (finding,) = findings
    return finding


# -- the cache --------------------------------------------------------------------------------------------------------


def test_a_good_cache(place: Path) -> None:
    kernels_cache.store(KERNEL, b"kernel")
    found = only(cache.judge(cache.gather()))
    assert found.level == OK
    assert "1 kernel" in found.text


def test_a_broken_cache(place: Path) -> None:
    kernels_cache.store(KERNEL, b"kernel")
    (place / KERNEL).write_bytes(b"kernel, but half of it")
    (place / "autocast-1.json").write_text("{}")  # other files are not kernels
    found = only(cache.judge(cache.gather()))
    assert found.level == WARN
    assert "1 damaged" in found.text
    assert os.system(found.command) == 0
    assert [path.name for path in place.iterdir()] == ["autocast-1.json"]
    assert only(cache.judge(cache.gather())).level == OK, "the command mends it"


def test_a_hostile_cache(place: Path) -> None:
    kernels_cache.store(KERNEL, b"kernel")
    place.chmod(0o777)
    found = only(cache.judge(cache.gather()))
    assert found.level == FAIL
    assert "mode 0777" in found.text
    assert os.system(found.command) == 0
    assert only(cache.judge(cache.gather())).level == OK, "the command mends it"


def test_a_planted_kernel(place: Path) -> None:
    kernels_cache.store(KERNEL, b"kernel")
    (place / KERNEL).chmod(0o666)
    found = only(cache.judge(cache.gather()))
    assert found.level == FAIL
    assert "another user" in found.text


def test_a_cache_that_cannot_be_created(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "file").write_text("")
    monkeypatch.setenv("LOWBIT_LIGHTNING_CACHE", str(place / "file" / "cache"))
    found = only(cache.judge(cache.gather()))
    assert found.level == WARN
    assert "cannot be created" in found.text
    assert found.command == "unset LOWBIT_LIGHTNING_CACHE"


def test_a_noexec_cache(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "noexec", lambda where: str(where).startswith(str(place)))
    found = only(cache.judge(cache.gather()))
    assert found.level == WARN
    assert "noexec" in found.text


# -- other probes -----------------------------------------------------------------------------------------------------


def test_a_missing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = only(compiler.judge(compiler.gather()))
    assert found.level in (FAIL, WARN)
    assert found.command == "unset CXX"


def test_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "c++"
    fake.write_text("#!/bin/sh\necho \"fatal error: 'cmath' file not found\" >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    monkeypatch.setenv("LOWBIT_LIGHTNING_CACHE", os.environ.get("LOWBIT_LIGHTNING_CACHE", ""))  # it is changed
    found = only(compiler.judge(compiler.gather()))
    assert found.level == FAIL
    assert "'cmath' file not found" in found.text


def test_this_machine_is_described() -> None:
    for probe in (system, packages, limits, environment):
        facts = json.loads(json.dumps(probe.gather()))
        assert probe.judge(facts), probe.__name__


def test_a_second_runtime_is_seen_where_it_is_mapped(tmp_path: Path) -> None:
    """Two copies of a library with the name of a runtime, in a process of its own."""
    found = [str(tmp_path / name) for name in ("libgomp.so.1", "libgomp-a34b3233.so.1")]
    subprocess.run(["c++", "-shared", "-x", "c++", "-", "-o", found[0]], input="int gomp;", text=True, check=True)
    shutil.copy(*found)
    program = (
        "import ctypes, sys; from lowbit_command.doctor.probes import torch as probe\n"
        "held = [ctypes.CDLL(path) for path in sys.argv[1:]]; print(*probe.runtimes())"
    )
    done = subprocess.run([sys.executable, "-c", program, *found], capture_output=True, text=True, check=True)
    assert sorted(done.stdout.split()) == sorted(found)


def test_cpu_quotas_of_control_groups(tmp_path: Path) -> None:
    group = tmp_path / "a"
    group.mkdir()
    assert limits._of_group(group) is None
    (group / "cpu.cfs_quota_us").write_text("250000\n")
    (group / "cpu.cfs_period_us").write_text("100000\n")
    assert limits._of_group(group) == 2.5
    (group / "cpu.max").write_text("max 100000\n")
    assert limits._of_group(group) is None
    (group / "cpu.max").write_text("150000 100000\n")
    assert limits._of_group(group) == 1.5


# -- children ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Children run this text."""

    def set_to(text: str) -> None:
        path = tmp_path / "program.py"
        mark = f"import json, os, sys, time\ndef tell(x): print({children.MARK!r} + json.dumps(x), flush=True)\n"
        path.write_text(mark + text)
        monkeypatch.setattr(children, "PROGRAM", path)

    return set_to


def test_a_child_answers_whatever_else_it_prints(program: Any) -> None:
    program("print('a library says hello')\ntell({'a': [1, 2]})\nprint('bye')\n")
    assert children.result(["x"], 20) == {"a": [1, 2]}


def test_a_child_that_hangs_crashes_or_fails(program: Any) -> None:
    program("time.sleep(60)\n")
    hung = children.result(["x"], 0.5)
    assert isinstance(hung, Died)
    assert hung.hung
    program("import signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    assert children.result(["x"], 20).why == "crashed (SIGSEGV)"
    program("raise OSError('the reason')\n")
    failed = children.result(["x"], 20)
    assert failed.why == "ended with status 1"
    assert failed.said == "OSError: the reason"


def test_a_kernel_that_crashes_is_named_and_the_others_are_tested(program: Any) -> None:
    program(
        "import signal\n"
        "for i in range(int(sys.argv[2]), 3):\n"
        "    about = {'case': i, 'of': 3, 'device': 'cpu', 'op': 'op', 'name': str(i)}\n"
        "    tell(about)\n"
        "    if i == 1: os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    about |= {'error': '', 'state': 'cached', 'engine': 'AVX2'}\n"
        "    tell({**about, 'seconds': 1, 'ours': 1, 'reference': 1})\n"
    )
    found = selftest.run(lambda value: None)
    assert [result["error"] for result in found] == ["", "the kernel crashed (SIGSEGV)", ""]
    assert show.tests(found)[1] == ["op", "cpu", "2 of 3", "cached 2, - 1: AVX2", "2.0", "2.0", "2.0"]


def test_wrong_results_are_seen() -> None:
    import torch

    x = torch.arange(1.0, 5.0)
    assert selftest.difference([x], [x.clone()], 0.0) == ""
    assert "equal to the bit" in selftest.difference([x + 1e-6], [x], 0.0)
    assert selftest.difference([x + 1e-6], [x], 1e-5) == ""
    assert "at most 1e-05" in selftest.difference([x * torch.nan], [x], 1e-5)
    assert "not torch.float32 (4,)" in selftest.difference([x.double()], [x], 0.0)
    assert "0 results" in selftest.difference([], [], 0.0)


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_on_a_machine_without_a_compiler_and_with_a_hostile_cache(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole of it, in its own processes: what the other tests replace is real here."""
    place.chmod(0o777)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert cli.main(["doctor", "--json"]) == 3
    told = json.loads(capsys.readouterr().out)
    levels = {finding["subject"]: finding["level"] for finding in told["findings"]}
    assert levels["compiler"] == levels["cache"] == FAIL
    assert levels["torch"] == levels["packages"] == OK
    assert [*told["facts"]] == [*examine.PROBES]
    (on_cpu,) = [device for device in told["devices"] if device["device"] == "cpu"]
    assert on_cpu["backend"] == "reference"
    assert {state for states in on_cpu["ops"].values() for state in states} == {coverage.REFERENCE}


def test_a_torch_that_cannot_be_imported_hides_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "torch" / "__init__.py"
    broken.parent.mkdir()
    broken.write_text('raise ImportError("libstdc++.so.6: version `GLIBCXX_3.4.99\' not found")\n')
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.delenv("CXX", raising=False)
    assert cli.main(["doctor"]) == 3
    said = capsys.readouterr().out
    assert "FAIL  torch        the libstdc++ that is loaded first is too old for this torch" in said
    assert "OK    compiler" in said
    assert said.count("FAIL") == 1
    assert said.rstrip().endswith("1 failure") or "warning" in said.splitlines()[-1]


@pytest.mark.parametrize(("level", "status"), [(OK, 0), (WARN, 1), (FAIL, 3)])
def test_exit_status_and_forms(
    level: str, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = f"{sys.prefix}/lib/x.so of /data/teams/secret/run in {os.path.expanduser('~')}/work"
    found = Finding(level, "cache", f"about {path}", "" if level == OK else "unset X")
    device = {
        "device": "cpu",
        "name": "CPU",
        "backend": "cpu",
        "why": "",
        "ops": {"op": {"cached": 2, "on first use": 1}},
        "engines": {"op": "AVX2"},
    }
    monkeypatch.setattr(examine, "examine", lambda: examine.Examination([found], {}, [device]))
    assert cli.main(["doctor"]) == status
    said = capsys.readouterr().out
    assert said.startswith(f"{level:4}  cache  about")
    assert "op  cached 2, on first use 1: AVX2" in said
    assert cli.main(["doctor", "--markdown"]) == status
    said = capsys.readouterr().out
    assert "secret" not in said
    assert sys.prefix not in said
    assert f"| {level} | cache | about" in said
    assert cli.main(["doctor", "--json", "--markdown"]) == 2


def test_engines_are_those_of_the_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    assert coverage.engine("int8_matmul", "cpu") == int8_product.instructions(int8_product.library())
    assert coverage.engine("quantize_rowwise", "cpu") == ""

    def not_cached() -> Any:
        raise coverage._NotCachedError

    monkeypatch.setattr(int8_product, "library", not_cached)
    assert coverage.engine("int8_matmul", "cpu") == ""


def test_every_op_of_a_backend_is_tried() -> None:
    assert {case.op for case in cases()} == backend.OPS.keys()
