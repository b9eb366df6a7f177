"""What ``RunReport`` finds out about a run: memory, layers, codes, ops, configuration, environment.

All of it concerns this rank, asks no other, and is gathered once: when training begins or when it ends.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowbit_lightning import kernels
from lowbit_lightning.callbacks import paging
from lowbit_lightning.callbacks.monitor import LowBitMonitor
from lowbit_lightning.callbacks.quantization import measure
from lowbit_lightning.kernels.formats import dynamic_map
from lowbit_lightning.layers import Int8ExpertsForm, Int8Layer, LowBitEmbedding, LowBitLinear
from lowbit_lightning.state import shards
from lowbit_lightning.state.form import codes_name
from lowbit_lightning.state.pages import Entries

PACKAGES = ("lowbit-lightning", "torch", "lightning", "numpy", "deepspeed", "transformers", "peft")
MOST_MEASURED = 1 << 25
"""Weights that are measured at most when training ends, where no ``LowBitMonitor`` has."""
MOST_COUNTED = 1 << 26
"""Codes of a state that are counted at most."""


# -- memory -----------------------------------------------------------------------------------------------------------


def nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(local.numel() * local.element_size() for local in map(shards.local, tensors))


def memory(module: nn.Module, optimizers: Iterable[Optimizer], gradients: int) -> list[dict[str, Any]]:
    """Rows with the kind of memory, what it is, and its bytes on this rank."""
    rows = []
    for kind, tensors in (("parameters", [*module.parameters()]), ("parameters", [*module.buffers()])):
        of = "buffers, " if tensors and not isinstance(tensors[0], nn.Parameter) else ""
        for dtype, size in _by_dtype(tensors).items():
            rows.append({"kind": kind, "what": f"{of}{str(dtype).removeprefix('torch.')}", "bytes": size})
    if gradients:
        rows.append({"kind": "gradients", "what": "while all are there", "bytes": gradients})
    return [*rows, *_states(optimizers)]


def _by_dtype(tensors: Iterable[Tensor]) -> dict[torch.dtype, int]:
    sizes: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        sizes[tensor.dtype] += nbytes([tensor])
    return {dtype: size for dtype, size in sizes.items() if size}


def _states(optimizers: Iterable[Optimizer]) -> list[dict[str, Any]]:
    """The rows of optimizer states. Codes and scales of a state are one row."""
    sizes: Counter[tuple[str, str]] = Counter()
    for entries in (entries for optimizer in optimizers for entries in getattr(optimizer, "state", {}).values()):
        paged = isinstance(entries, Entries)
        held = entries.raw if paged else entries  # sizes can be told without waiting for pages
        for name, value in held.items() if isinstance(held, Mapping) else ():
            if not isinstance(value, Tensor):
                continue
            base = name.removesuffix("_codes").removesuffix("_scales")
            coded = base != name and codes_name(base) in held
            kind = "8-bit states" if coded or value.dtype in (torch.uint8, torch.int8) else "32-bit states"
            kind = "paged states" if paged and entries.is_paged(name) else kind
            sizes[kind, f"{base}{': codes and scales' if coded else ''}"] += nbytes([value])
    return [{"kind": kind, "what": what, "bytes": size} for (kind, what), size in sorted(sizes.items()) if size]


def peak(device: torch.device, rows: Iterable[Mapping[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The peak and, where the device counts memory, a row for activations and temporary tensors."""
    if device.type == "cuda":
        most = torch.cuda.max_memory_allocated(device)
        rest = most - sum(row["bytes"] for row in rows)
        row = {"kind": "activations and temporary", "what": "the peak less all above", "bytes": rest}
        return {"of": "device", "bytes": most}, [row] if rest > 0 else []
    try:
        import resource
    except ImportError:  # Windows
        return {}, []
    unit = 1 if platform.system() == "Darwin" else 1024
    return {"of": "process", "bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}, []


# -- low-bit arithmetic -----------------------------------------------------------------------------------------------


def linear(module: nn.Module) -> dict[str, list[int]]:
    """Layers with matmuls: how many, and with how many weights, by how they compute."""
    counts: dict[str, list[int]] = {}
    for layer in module.modules():
        if isinstance(layer, LowBitLinear):
            kind, size = "low-bit", layer.out_features * layer.in_features
        elif isinstance(layer, LowBitEmbedding):
            kind, size = "low-bit", layer.num_embeddings * layer.embedding_dim
        elif isinstance(layer, Int8Layer) and layer.products.int8:
            kind, size = "int8", sum(shards.local(weight).numel() for weight in layer.weights)
        elif isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
            kind, size = "high", shards.local(layer.weight).numel()
        else:
            continue
        found = counts.setdefault(kind, [0, 0])
        found[0], found[1] = found[0] + 1, found[1] + size
    return {kind: counts[kind] for kind in ("int8", "low-bit", "high") if kind in counts}


def layers(trainer: L.Trainer, module: nn.Module) -> tuple[dict[str, dict[str, float]], str]:
    """Signal to noise in dB by layer and product, and where it is from: the monitor's last sample, or else the
    rounding of the weights themselves."""
    for callback in getattr(trainer, "callbacks", ()):
        if isinstance(callback, LowBitMonitor):
            step, found = callback.by_layer()
            if found:
                return found, f"the LowBitMonitor's sample at step {step:,}"
    found, left = {}, MOST_MEASURED
    for name, layer in module.named_modules():
        if not isinstance(layer, Int8Layer) or not layer.products.int8:
            continue
        weights = [shards.local(weight.detach()) for weight in layer.weights]
        left -= sum(weight.numel() for weight in weights)
        if left < 0 or not all(weight.numel() for weight in weights):
            break
        rows = (0, -2) if isinstance(layer, Int8ExpertsForm) else (1, -1)
        matrices = [weight.flatten(*rows) for weight in weights]
        snr = [float(measure(matrix, *kernels.quantize_rowwise(matrix), "rows")[0]) for matrix in matrices]
        if min(snr) == min(snr):
            found[name] = {"weight": min(snr)}
    return found, "of the weights' rounding when training ended"


def codes(optimizers: Iterable[Optimizer]) -> dict[str, dict[str, Any]]:
    """How often each code of the 8-bit states occurs, on this rank; paged ones would have to be read, and are not."""
    found: dict[str, dict[str, Any]] = {}
    for optimizer in paging.low_bit(optimizers):
        for group in optimizer.param_groups:
            for name, codebook in group["state_format"]["maps"].items():
                states = [optimizer.state.get(p, {}) for p in group["params"]]
                held = [state.get(codes_name(name)) for state in states if not isinstance(state, Entries)]
                counts = _counted([shards.local(codes) for codes in held if codes is not None])
                if counts is None:
                    continue
                told = found.setdefault(name, {"zero_code": dynamic_map(codebook).zero_code, "counts": [0] * 256})
                told["counts"] = [a + b for a, b in zip(told["counts"], counts, strict=True)]
    return found


def _counted(held: list[Tensor]) -> list[int] | None:
    counts, left = torch.zeros(256, dtype=torch.long), MOST_COUNTED
    for tensor in held:
        part = tensor.flatten()[: max(0, left)]
        left -= part.numel()
        if part.numel():
            counts += torch.histc(part.float(), 256, 0, 255).long().cpu()
    return counts.tolist() if int(counts.sum()) else None


def ops(before: Mapping[tuple[str, str], int]) -> list[list[Any]]:
    """Rows of op, backend and number of calls since ``before``; most calls first."""
    rows = [[op, backend, n - before.get((op, backend), 0)] for (op, backend), n in kernels.calls().items()]
    return sorted((row for row in rows if row[2]), key=lambda row: -row[2])


# -- configuration and environment ------------------------------------------------------------------------------------


def configuration(trainer: L.Trainer, module: L.LightningModule, folder: Path | None) -> dict[str, Any]:
    """The resolved config file of the run, where there is one; else what Trainer, model and optimizers say."""
    saved = _saved_config(folder)
    if saved:
        return saved
    names = ("max_steps", "max_epochs", "accumulate_grad_batches", "gradient_clip_val", "num_nodes", "world_size")
    told: dict[str, Any] = {name: getattr(trainer, name, None) for name in names}
    told["precision"] = trainer.precision
    told["strategy"] = type(trainer.strategy).__name__
    told["accelerator"] = type(trainer.accelerator).__name__
    told["callbacks"] = [type(callback).__name__ for callback in getattr(trainer, "callbacks", ())]
    model = {"class": f"{type(module).__module__}.{type(module).__qualname__}", **dict(module.hparams)}
    optimizers = [_optimizer(optimizer) for optimizer in trainer.optimizers]
    return {"trainer": told, "model": model, "optimizer": optimizers[0] if len(optimizers) == 1 else optimizers}


def _saved_config(folder: Path | None) -> dict[str, Any]:
    if folder is None or not (folder / "config.yaml").is_file():
        return {}
    import yaml  # type: ignore[import-untyped]

    try:
        found = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _optimizer(optimizer: Optimizer) -> dict[str, Any]:
    inner = getattr(optimizer, "optimizer", optimizer)
    told = {k: _plain(v) for k, v in inner.defaults.items() if v is not None}
    return {"class": f"{type(inner).__module__.partition('.')[0]}.{type(inner).__name__}", **told}


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def environment(device: torch.device, world_size: int) -> dict[str, Any]:
    """Versions and hardware; no names of users or machines."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    versions["lowbit-lightning"] = versions.get("lowbit-lightning", "from a checkout")
    told: dict[str, Any] = {
        "packages": versions,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "world_size": world_size,
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        told["cuda"] = torch.version.cuda
    commit = _commit(Path.cwd())
    settings = {k: v for k, v in sorted(os.environ.items()) if k.startswith(("LOWBIT_LIGHTNING_", "OMP_NUM_THREADS"))}
    return told | ({"commit": commit} if commit else {}) | ({"variables": settings} if settings else {})


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{name or platform.processor() or 'CPU'}, {os.cpu_count()} CPUs"


def _commit(folder: Path) -> str:
    """The commit that is checked out; "" outside a repository, or without git."""
    try:
        asked = ["git", "-C", str(folder), "rev-parse", "--short=12", "HEAD"]
        return subprocess.run(asked, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
