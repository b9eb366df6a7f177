"""NVRTC, the CUDA compiler, and its builtins, a library that it opens only when it compiles."""

from __future__ import annotations

import os
import re
import tempfile
import time
import warnings
from typing import Any

from lowbit_command.doctor.finding import Finding, fail, ok
from lowbit_command.doctor.read import has_gpu

BARE = True
LIMIT = 60.0
_TINY = 'extern "C" __global__ void answer(float* x) { x[threadIdx.x] = sqrtf(x[threadIdx.x]); }\n'
_INSTALL = "pip install 'cuda-core>=1.2,<2' 'cuda-bindings>={},<{}' 'cuda-toolkit[cudart,nvrtc]=={}.*'"


def gather() -> dict[str, Any]:
    from lowbit_command.doctor.probes import gpu
    from lowbit_lightning.kernels import compile

    facts: dict[str, Any] = {"gpu": has_gpu(), "version": "", "error": "", "seconds": 0.0}
    facts["torch_cuda"] = gpu.torch_cuda()
    try:
        facts["version"] = compile.nvrtc_version()
    except compile.CompilerNotFound as error:
        return facts | {"error": str(error.__cause__ or error)}
    with tempfile.TemporaryDirectory() as cache, warnings.catch_warnings():
        os.environ["LOWBIT_LIGHTNING_CACHE"] = cache
        warnings.simplefilter("ignore")
        start = time.perf_counter()
        try:
            compile.cubin(_TINY, "sm_80")
        except compile.CompileError as error:
            facts["error"] = error.log or str(error)
        facts["seconds"] = time.perf_counter() - start
    return facts


def judge(facts: dict[str, Any]) -> list[Finding]:
    said = facts["error"]
    if not said:
        return [ok("NVRTC", f"{facts['version']}, {facts['seconds']:.1f} s for a small kernel")]
    if not facts["gpu"]:
        return [ok("NVRTC", "not available, and not needed without an NVIDIA GPU")]
    costs = "GPU kernels run by the plain-torch reference, many times slower"
    if facts["version"]:
        builtins = re.search(r"libnvrtc-builtins\S*", said)
        if builtins:
            text = f"NVRTC {facts['version']} does not find its builtins ({builtins[0]}): {costs}"
            return [fail("NVRTC", text, _install(facts, reinstall=True))]
        return [fail("NVRTC", f"NVRTC {facts['version']} does not compile: {_first(said)}", _install(facts))]
    return [fail("NVRTC", f"NVRTC, the CUDA compiler, is not available ({_first(said)}): {costs}", _install(facts))]


def _install(facts: dict[str, Any], reinstall: bool = False) -> str:
    twelve = (facts["torch_cuda"] or "13").startswith("12")
    command = _INSTALL.format(*(("12.8", "13", "12") if twelve else ("13.0.3", "14", "13")))
    return command.replace("install ", "install --force-reinstall ", 1) if reinstall else command


def _first(said: str) -> str:
    return said.strip().partition("\n")[0][:200]
