"""``load_quantized``: loads checkpoints from disk directly into low bits, for models on the meta device.

Tensors are read one at a time. Each is read from a mapping of its file, which is closed afterwards, so only the current
tensor of a file stays in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lowbit_lightning.convert import bitsandbytes
from lowbit_lightning.convert.fused import settle_fused_path
from lowbit_lightning.convert.lowbit import adopt, layer_at, select_weights
from lowbit_lightning.layers.lowbit import FLOATS, PARTS, LowBitWeight, Weights

Module = TypeVar("Module", bound=nn.Module)
Paths = str | Path | Iterable[str | Path]
Read = Callable[[], Tensor]

INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE = ("model.safetensors", "pytorch_model.bin")


@contextmanager
def empty_parameters() -> Iterator[None]:
    """Models that are built inside have their parameters on the meta device, which takes no memory, but real buffers:
    tables that are computed and never saved, such as the frequencies of rotary embeddings, are right."""
    register = nn.Module.register_parameter

    def registered(module: nn.Module, name: str, p: nn.Parameter | None) -> None:
        empty = p if p is None or p.is_meta else nn.Parameter(p.detach().to("meta"), p.requires_grad)
        register(module, name, empty)  # one that is shared stays one

    with _replaced(nn.Module, "register_parameter", registered):
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def load_quantized(
    model: Module,
    files: Paths,
    weights: str = "nf4",
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    strict: bool = True,
    progress: bool = True,
    embeddings: bool = False,
    experts: bool = True,
    fit: str | None = None,
    compute_dtype: torch.dtype | None = None,
    threshold: float = 0.0,
    **choice: Any,
) -> Module:
    """Load a checkpoint into a model whose parameters are on the meta device, quantising on the way; returns the model.

    The whole model is never held in high precision: the peak is the low-bit model plus the largest tensor of the files.
    Weights that the files hold in low bits, in this package's or bitsandbytes' format, stay as they are.

    Args:
        model: built in ``empty_parameters()`` or ``torch.device("meta")``.
        files: a ``.safetensors`` file or one that ``torch.save`` wrote, several of them, or a folder with an index
            (``model.safetensors.index.json``), ``model.safetensors`` or ``pytorch_model.bin``.
        weights, fit, compute_dtype, threshold, embeddings, experts: as for ``quantize``.
        choice: ``include``, ``exclude``, ``filter``, ``output_layer``, ``overrides``, as for ``quantize``.
        dtype: dtype of the tensors that are not quantised; None keeps that of the files.
        device: the device of the model.
        strict: raise if the files lack a tensor of the model or have one that the model lacks.
        progress: show a bar.

    Raises:
        FileNotFoundError: for a path that does not exist, or a folder without a checkpoint.
        ValueError: for a damaged file, a tensor of another shape, what ``strict`` refuses, and the errors of
            ``quantize``.
    """
    if dtype not in (None, *FLOATS):
        raise TypeError(f"dtype must be None, torch.float32, torch.float16 or torch.bfloat16, got {dtype}")
    found = tensors(files)
    settings = Weights.of(weights, fit=fit, compute_dtype=compute_dtype, threshold=threshold)
    selection = select_weights(model, settings, embeddings=embeddings, experts=experts, **choice)
    aliases = _aliases(model)
    served = {name: _served(name, aliases, found) for name in found}
    _check_names(aliases, served, strict)
    for name, own in selection.chosen.items():
        adopt(layer_at(model, name), own)
    settle_fused_path(model)
    target = torch.device(device)
    with _bar(found, progress) as names:
        for name in names:
            _load(model, aliases.get(served[name] or "", []), name, found, dtype, target)
    _check_loaded(model, strict)
    return model._apply(lambda x: x if x.is_meta else x.to(target))


def tensors(files: Paths) -> dict[str, Read]:
    """Every tensor of the files by its name, with a function that reads it."""
    found: dict[str, Read] = {}
    for path in _expand(files):
        for name, read in _safetensors(path) if path.suffix == ".safetensors" else _torch(path):
            if name in found:
                raise ValueError(f"{path} has {name}, which another of the files has too: leave one of them out")
            found[name] = read
    return found


def _expand(files: Paths) -> list[Path]:
    given = [Path(files)] if isinstance(files, (str, Path)) else [Path(path) for path in files]
    result: list[Path] = []
    for path in given:
        if not path.exists():
            raise FileNotFoundError(f"{path} is not there; files must name a checkpoint's files or its folder")
        if not path.is_dir():
            result.append(path)
            continue
        index = next((path / name for name in INDICES if (path / name).exists()), None)
        single = next((path / name for name in SINGLE if (path / name).exists()), None)
        if index is not None:
            listed = sorted(set(_parse(index)["weight_map"].values()))
            result += [path / Path(name).name for name in listed]
            if missing := [str(p) for p in result if not p.exists()]:
                raise FileNotFoundError(f"{index} lists files that are not there: {missing}")
        elif single is not None:
            result.append(single)
        elif shards := sorted(path.glob("*.safetensors")):
            result += shards
        else:
            raise FileNotFoundError(f"{path} has none of {[*INDICES, *SINGLE, '*.safetensors']}")
    return result


def _parse(index: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(index.read_text())
        if all(isinstance(name, str) for name in parsed["weight_map"].values()):
            return parsed
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index} is not the index of a checkpoint: {error!r}") from None
    raise ValueError(f"{index} is not the index of a checkpoint: its weight_map must name files")


def _safetensors(path: Path) -> Iterator[tuple[str, Read]]:
    from safetensors import SafetensorError, safe_open

    def read(name: str) -> Tensor:
        with safe_open(path, "pt") as file:  # a mapping of its own, gone with the tensor
            return file.get_tensor(name)

    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
    return ((name, partial(read, name)) for name in names)


def _torch(path: Path) -> Iterator[tuple[str, Read]]:
    def load() -> Mapping[str, Any]:
        try:
            loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # a damaged file may raise anything
            raise ValueError(f"{path} is damaged, or not a file of tensors that torch.save wrote: {error}") from error
        loaded = loaded.get("state_dict", loaded) if isinstance(loaded, Mapping) else None
        if not loaded or not all(isinstance(value, Tensor) for value in loaded.values()):
            raise ValueError(f"{path} holds no state_dict of tensors")
        return loaded

    return ((name, partial(lambda name: load()[name], name)) for name in load())


@contextmanager
def _bar(names: Iterable[str], show: bool) -> Iterator[Iterable[str]]:
    from tqdm.auto import tqdm

    with tqdm(names, desc="loading", unit=" tensors", disable=not show) as bar:
        yield bar


# -- into the model --------------------------------------------------------------------------------------------------


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """For each entry of the model's state, all its names: a shared one has several."""
    names: dict[int, list[str]] = {}
    for name, held in model.state_dict(keep_vars=True).items():
        names.setdefault(id(held), []).append(name)
    return {name: shared for shared in names.values() for name in shared}


def _served(name: str, aliases: Mapping[str, list[str]], found: Mapping[str, Read]) -> str | None:
    """Which entry of the model a tensor of the files is for; None of what comes along with another."""
    owner, _, part = name.rpartition(".")
    if part in PARTS and owner in aliases:  # an expert, whose parameter has become a module
        return owner if part == "weight" else None
    if part in PARTS[1:] and f"{owner}.weight" in found:
        return None
    return None if any(name in bitsandbytes.parts_of(n, [name]) for n in bitsandbytes.weights_of(found)) else name


def _check_names(aliases: Mapping[str, list[str]], served: Mapping[str, str | None], strict: bool) -> None:
    """Before anything is changed."""
    have = set(served.values())
    missing = [name for name, shared in aliases.items() if name == shared[0] and not have.intersection(shared)]
    unexpected = [name for name, target in served.items() if target is not None and target not in aliases]
    if strict and (missing or unexpected):
        raise ValueError(
            f"the files and the model don't fit: the files lack {_some(missing)}, the model lacks {_some(unexpected)}; "
            "strict=False takes what fits"
        )


def _some(names: list[str]) -> str:
    return f"{names[:8]}{f' and {len(names) - 8} others' if len(names) > 8 else ''}" if names else "nothing"


def _load(
    model: nn.Module,
    names: list[str],
    name: str,
    found: Mapping[str, Read],
    dtype: torch.dtype | None,
    device: torch.device,
) -> None:
    """Load the tensor ``name`` of the files wherever the model has it."""
    plain: list[str] = []
    low: list[LowBitWeight] = []
    for alias in names:
        layer = _low_bit_at(model, alias)
        if layer is None:
            plain.append(alias)
        elif same := next((other for other in low if other.weights == layer.weights), None):
            layer.share(same)
        else:
            _load_low_bit(layer, name, found, device)
            low.append(layer)
    if not plain:
        return
    value = found[name]().to(device)
    value = value.to(dtype) if dtype is not None and value.is_floating_point() else value
    value = value.clone() if device.type == "cpu" else value  # off the file's mapping
    for alias in plain:
        owner, _, part = alias.rpartition(".")
        holder = model.get_submodule(owner)
        old = getattr(holder, part)
        if old.shape != value.shape:
            raise ValueError(f"{alias} must be of shape {tuple(old.shape)}, the files have {tuple(value.shape)}")
        if isinstance(old, nn.Parameter) and not isinstance(value, nn.Parameter):
            value = nn.Parameter(value, old.requires_grad)
        setattr(holder, part, value)


def _low_bit_at(model: nn.Module, name: str) -> LowBitWeight | None:
    """The low-bit module whose weight had this name in high precision."""
    owner, _, part = name.rpartition(".")
    held = model.get_submodule(owner)
    layer = held if part == "weight" else held._modules.get(part)
    return layer if isinstance(layer, LowBitWeight) else None


def _load_low_bit(layer: LowBitWeight, name: str, found: Mapping[str, Read], device: torch.device) -> None:
    prefix = name.removesuffix("weight")
    if bitsandbytes.is_weight(name, found):
        layer.hold(*bitsandbytes.read(name, found, layer.weight_shape, layer.weights, device))
    elif f"{prefix}weight_format" in found:
        parts = {part: found[f"{prefix}{part}"]() for part in PARTS if f"{prefix}{part}" in found}
        layer.hold_saved(parts, name, device)
    else:
        value = layer.oriented(found[name]())
        if value.shape != layer.weight_shape or not value.is_floating_point():
            wanted = tuple(layer.weight_shape)
            raise ValueError(f"{name} must be a float tensor of shape {wanted}, got {value.dtype} {tuple(value.shape)}")
        layer.keep(value.to(device), layer.weights)


def _check_loaded(model: nn.Module, strict: bool) -> None:
    empty = [name for name, x in (*model.named_parameters(), *model.named_buffers()) if x.is_meta]
    if empty and strict:
        raise ValueError(
            f"{empty[:8]} are still without values: they are not in the files. Buffers that are computed and not saved "
            "are right if the model is built in convert.empty_parameters() instead of torch.device('meta')"
        )
