"""Every kernel on every device against the plain-torch reference, with times: what ``--full`` runs in a child.

The child tells each case before it runs, so that one that crashes or hangs is known by name; the parent then starts
another child behind it.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from lowbit_command.doctor import children
from lowbit_command.doctor.children import Died
from lowbit_command.doctor.coverage import (
    CACHED,
    COMPILED,
    REFERENCE,
    backend_of,
    devices,
    engine,
    runs_reference,
)

LIMIT = 180.0
"""Seconds for one case, the compilation of its kernel included."""


def results(start: str = "0") -> Iterator[dict[str, Any]]:
    """In the child: ``{"case", "of", "device", "op", "name"}`` before each case, and the same with its result after
    it: ``state``, ``error`` ("" where it is right), ``engine`` (``coverage.engine``), ``seconds`` of the first call,
    ``ours`` and ``reference`` in ms."""
    from lowbit_command.doctor.cases import cases

    todo = [(device, case) for device in devices() for case in cases()]
    compiled = _count_compilations()
    for i, (device, case) in enumerate(todo[int(start) :], start=int(start)):
        about = {"case": i, "of": len(todo), "device": device, "op": case.op, "name": case.name}
        yield about
        compiled.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield about | _run(case, device, compiled)


def _run(case: Any, device: str, compiled: list[str]) -> dict[str, Any]:
    import torch

    from lowbit_lightning import kernels

    backend, place = backend_of(device)[0], torch.device(device)
    found: dict[str, Any] = {"seconds": 0.0, "ours": 0.0, "reference": 0.0, "error": "", "engine": ""}
    try:
        with kernels.use_backend("reference"):
            expected, found["reference"] = _timed(lambda: case.run(torch.device("cpu")), "cpu")
        results, first = _timed(lambda: case.run(place), device)
        _, again = _timed(lambda: case.run(place), device)
        found |= {"seconds": first / 1000, "ours": again, "error": difference(results, expected, case.tolerance)}
    except Exception as error:  # whatever a kernel or a driver may raise is this case's result
        found["error"] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    left = runs_reference(backend, case.op) or backend_of(device)[0] == REFERENCE
    if not left and not found["error"]:
        found["engine"] = engine(case.op, device)
    return found | {"state": REFERENCE if left else COMPILED if compiled else CACHED}


def _timed(run: Callable[[], Any], device: str) -> tuple[Any, float]:
    """What it returns, and milliseconds."""
    import torch

    start = time.perf_counter()
    found = run()
    if device != "cpu":
        torch.cuda.synchronize(device)
    return found, 1000 * (time.perf_counter() - start)


def difference(ours: list[Any], expected: list[Any], tolerance: float) -> str:
    """What is wrong with results, "" where they are right."""
    import torch

    if len(ours) != len(expected) or not ours:
        return f"{len(ours)} results, not {len(expected)}"
    for i, (x, y) in enumerate(zip(ours, expected, strict=True)):
        x = x.detach().cpu()
        y = y.detach()
        if x.dtype != y.dtype or x.shape != y.shape:
            return f"result {i} is {x.dtype} {tuple(x.shape)}, not {y.dtype} {tuple(y.shape)}"
        if torch.equal(x, y):
            continue
        error = float((x.double() - y.double()).norm() / y.double().norm().clamp_min(1e-300))
        if not error <= tolerance:
            allowed = "it must be equal to the bit" if tolerance == 0 else f"at most {tolerance:g} is right"
            return f"result {i} differs from the reference by {error:.2g} of its norm; {allowed}"
    return ""


def _count_compilations() -> list[str]:
    """A list that gets an entry whenever a compiler runs in this process."""
    from lowbit_lightning.kernels import compile

    ran: list[str] = []

    def counting(make: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*told: Any) -> Any:
            ran.append("compiled")
            return make(*told)

        return counted

    for name in ("_compile_host", "_compile_cuda"):
        setattr(compile, name, counting(getattr(compile, name)))
    return ran


def run(report: Callable[[dict[str, Any]], None]) -> list[dict[str, Any]]:
    """In the parent: the results of all cases; ``report`` gets each case as it starts and as it ends."""
    found: list[dict[str, Any]] = []
    start = 0
    while True:
        running: dict[str, Any] = {}
        died = None
        for value in children.results(["selftest", str(start)], LIMIT):
            if isinstance(value, Died):
                died = value
                continue
            running = {} if "error" in value else value
            report(value)
            if "error" in value:
                found.append(value)
        if died is None:
            return found
        detail = f"{died.why}{': ' + died.said if died.said else ''}"
        if not running:
            return [*found, {"case": start, "device": "cpu", "op": "self-test", "name": "start", "error": detail}]
        found.append({**running, "error": f"the kernel {detail}", "state": "", "seconds": 0, "ours": 0, "reference": 0})
        report(found[-1])
        start = running["case"] + 1
