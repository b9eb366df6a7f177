"""bitsandbytes' own unit tests, run through ``lowbit_lightning.bitsandbytes``.

    python benchmarks/bitsandbytes_tests.py CHECKOUT [pytest arguments]

CHECKOUT is a clone of bitsandbytes' repository. Its tests run unchanged; ``import bitsandbytes`` gives them this
package's module. Two things are translated for ``test_optim.py``: the names of states (``state1`` is ``exp_avg``), and
the decoding of 8-bit states, whose blocks lie inside rows here. Where ``lion_pytorch`` is not installed, a few lines of
torch stand for it. Prints a table by file, and a line for each failure.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lowbit_lightning.bitsandbytes as bnb
from lowbit_lightning import kernels
from lowbit_lightning.kernels.formats import BlockGrid, codebook
from lowbit_lightning.kernels.rules import State

FILES = ("functional", "autograd", "linear4bit", "linear8bitlt", "modules", "optim")
"""Those whose names are served. Others test C symbols, torch.ops.bitsandbytes, downloads, and nn.parametrize."""


def substitute(checkout: Path) -> None:
    """Make ``import bitsandbytes`` and its submodules ours; references that tests compare with are the checkout's."""
    modules: dict[str, Any] = {
        "": bnb,
        ".functional": bnb.functional,
        ".nn": bnb.nn,
        ".nn.modules": bnb.nn,
        ".optim": bnb.optim,
        ".cextension": types.SimpleNamespace(HIP_ENVIRONMENT=False),
        ".utils": types.SimpleNamespace(sync_gpu=lambda tensor: None),
        ".optim.optimizer": types.SimpleNamespace(Optimizer1State=object, Optimizer2State=object),
    }
    sys.modules.update({f"bitsandbytes{name}": module for name, module in modules.items()})
    optim: Any = bnb.optim
    optim.ademamix = _loaded(checkout / "bitsandbytes/optim/ademamix.py")
    optim.PytorchLARS = _loaded(checkout / "bitsandbytes/optim/lars.py").PytorchLARS
    if importlib.util.find_spec("lion_pytorch") is None:
        sys.modules["lion_pytorch"] = types.SimpleNamespace(Lion=Lion)  # type: ignore[assignment]


def _loaded(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"bitsandbytes_reference_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Lion(torch.optim.Optimizer):
    """Chen et al. (2023), algorithm 2."""

    def __init__(self, params: Any, lr: float = 1e-4, betas: Any = (0.9, 0.99), weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - lr * group["weight_decay"]).sub_(lr * (beta1 * m + (1 - beta1) * p.grad).sign())
                m.mul_(beta2).add_(p.grad, alpha=1 - beta2)


# -- test_optim.py -------------------------------------------------------------------------------------------------


class Named(Mapping[str, Any]):
    """A parameter's states by bitsandbytes' names."""

    def __init__(self, entries: Mapping[str, Any], states: tuple[State, ...]) -> None:
        self._found: dict[str, Any] = {}
        names = ["m1", "m2", "2"] if len(states) == 3 else ["1", "2"]
        for number, state in zip(names, states, strict=False):
            coded = f"{state.name}_codes" in entries
            self._found[f"state{number}"] = entries[f"{state.name}_codes" if coded else state.name]
            if coded:
                self._found[f"absmax{number}"] = entries[f"{state.name}_scales"]
                self._found[f"qmap{number}"] = codebook(state.codebook)
        if "statem1" in self._found:
            fast, slow = self._found.pop("statem1"), self._found.pop("statem2")
            self._found["state1"] = torch.stack([fast, slow]) if fast.dtype == slow.dtype else fast
            self._found |= {f"{kind}1": self._found.get(f"{kind}m1") for kind in ("absmax", "qmap")}

    def __getitem__(self, name: str) -> Any:
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


class States:
    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def __getitem__(self, p: Tensor) -> Named:
        optimizer = self._optimizer
        return Named(optimizer.__dict__["state"][p], optimizer.rule_of(optimizer.param_groups[0]).states)


class Viewed:
    """An optimizer whose ``state`` has bitsandbytes' names."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer, self.state = optimizer, States(optimizer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


def decoded(
    A: Tensor, quant_state: Any = None, absmax: Any = None, code: Any = None, out: Any = None, blocksize: int = 4096
) -> Tensor:
    if absmax is not None and tuple(absmax.shape) == BlockGrid.of(A.shape, blocksize).scales_shape:
        return kernels.dequantize_blockwise(A, absmax, code, blocksize)
    return bnb.functional.dequantize_blockwise(A, quant_state, absmax, code, out, blocksize)


def view_states(module: Any) -> None:
    """Let the tests of optimizers read states by bitsandbytes' names."""

    def viewing(make: Callable[..., Any]) -> Callable[..., Any]:
        def made(*args: Any, **kwargs: Any) -> Viewed:
            optimizer = make(*args, **kwargs)
            return optimizer if isinstance(optimizer, Viewed) else Viewed(optimizer)

        return made

    module.F = types.SimpleNamespace(**{**vars(bnb.functional), "dequantize_blockwise": decoded})
    module.str2optimizers = {
        name: (*makers[:-1], viewing(makers[-1])) for name, makers in module.str2optimizers.items()
    }
    ours = {name: viewing(getattr(bnb.optim, name)) for name in bnb.optim.__all__ if name != "GlobalOptimManager"}
    optim = types.SimpleNamespace(**{**vars(bnb.optim), **ours})
    module.bnb = types.SimpleNamespace(**{**vars(bnb), "optim": optim})


class Plugin:
    """Collects outcomes by file, and why tests fail."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = {}
        self.failures: dict[str, list[str]] = {}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        for module in {item.module for item in items if item.module.__name__.endswith("test_optim")}:
            view_states(module)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        path, _, name = report.nodeid.partition("::")
        self.counts.setdefault(Path(path).name, Counter())[report.outcome] += 1
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = (crash.message if crash is not None else str(report.longrepr)).strip().splitlines()
            self.failures.setdefault(name.partition("[")[0], []).append(reason[0][:150] if reason else "")

    def table(self) -> str:
        lines = ["| file | passed | failed | skipped |", "| --- | --- | --- | --- |"]
        for name, found in sorted(self.counts.items()):
            lines.append(f"| `{name}` | {found['passed']} | {found['failed']} | {found['skipped']} |")
        for test, reasons in sorted(self.failures.items()):
            lines += [f"{test}: {count} x {reason}" for reason, count in Counter(reasons).most_common()]
        return "\n".join(lines)


def main() -> int:
    if len(sys.argv) < 2 or not (Path(sys.argv[1]) / "tests/test_functional.py").exists():
        print(__doc__)
        return 2
    checkout, arguments = Path(sys.argv[1]).resolve(), sys.argv[2:]
    substitute(checkout)
    os.environ["BNB_TEST_DEVICE"] = os.environ.get("BNB_TEST_DEVICE", "cpu")
    os.chdir(checkout)
    sys.path.insert(0, str(checkout))
    files = [] if any(".py" in argument for argument in arguments) else [f"tests/test_{name}.py" for name in FILES]
    plugin = Plugin()
    signal.signal(signal.SIGTERM, lambda *_: pytest.exit("stopped: the table has what ran"))
    quiet = ["-q", "--no-header", "-p", "no:cacheprovider", "--tb=line", "-o", "log_cli=false"]
    status = pytest.main([*quiet, *files, *arguments], plugins=[plugin])
    print(plugin.table())
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
