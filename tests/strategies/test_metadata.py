"""The index of a folder is a pickle: what it may hold, and what hostile ones are answered."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from lowbit_lightning.strategies import AtomicCheckpointIO, checkpoints, consolidate, metadata

RAN = "the pickle ran code"


def fail() -> None:
    raise AssertionError(RAN)


class Calls:
    """Unpickles to ``function(*arguments)``."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


class Builds:
    """Unpickles to ``made`` with ``state`` put into it by BUILD."""

    def __init__(self, made: Callable[..., Any], arguments: tuple[Any, ...], state: Any) -> None:
        self.parts = made, arguments, state

    def __reduce__(self) -> Any:
        return self.parts


def index() -> Metadata:
    return Metadata({}, storage_data={})


def with_planner_data(x: Any) -> Metadata:
    return Metadata({}, planner_data=x, storage_data={})


def reading(name: Any) -> Metadata:
    return Metadata({}, storage_data={MetadataIndex("a"): _StorageInfo(name, 0, 1)})


def sets_an_attribute_of_a_class() -> bytes:
    """BUILD on a class itself, which pickle's C version answers with setattr."""
    return pickle.PROTO + b"\x04" + b"c" + f"{Metadata.__module__}\nMetadata\n".encode() + b"N}V__init__\nNs\x86b."


HOSTILE: dict[str, Callable[[], Any]] = {
    "a function": lambda: Calls(fail),
    "beside an index": lambda: with_planner_data(Calls(fail)),
    "os.system": lambda: with_planner_data(Calls(os.system, "false")),
    "eval": lambda: with_planner_data(Calls(eval, "1")),
    "getattr": lambda: with_planner_data(Calls(getattr, Metadata, "__init__")),
    "import": lambda: with_planner_data(Calls(__import__, "os")),
    "torch.load": lambda: with_planner_data(Calls(torch.load, "x")),
    "another function of torch": lambda: with_planner_data(Calls(torch.zeros, 3)),
    "a class of ours": lambda: with_planner_data(AtomicCheckpointIO()),
    "the state of a path": lambda: with_planner_data(Builds(Path, ("x",), {"a": 1})),
    "a class with attributes set": sets_an_attribute_of_a_class,
    "no index": lambda: {"a": 1},
    "no entries": lambda: Metadata({"a": 3}, storage_data={}),  # type: ignore[dict-item]
    "no storage": lambda: Metadata({}, storage_data=[1]),
    "a file above": lambda: reading("../secret"),
    "a file elsewhere": lambda: reading("/etc/passwd"),
    "a path that is a list": lambda: reading(["x"]),
    "nothing": lambda: b"",
    "half": lambda: pickle.dumps(index())[:-20],
    "text": lambda: b"no pickle at all",
    "a length beyond the file": lambda: pickle.PROTO + b"\x04" + pickle.BINBYTES8 + b"\xff" * 7 + b"\x0f",
    "an object outside": lambda: pickle.PROTO + b"\x04" + b"K\x01Q.",
}


def write(folder: Path, content: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / metadata.NAME).write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_index_is_refused(name: str, tmp_path: Path) -> None:
    write(tmp_path, HOSTILE[name]())
    before = dict(vars(Metadata))
    with pytest.raises(ValueError, match=r"\.metadata is not the index of a checkpoint"):
        metadata.read(tmp_path)
    assert dict(vars(Metadata)) == before


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_an_index_is_read_as_torch_reads_it(protocol: int, tmp_path: Path) -> None:
    saved = make()
    checkpoints.save_folder(saved, tmp_path / "a", "token", True, lambda action: action())
    theirs = FileSystemReader(tmp_path / "a").read_metadata()
    write(tmp_path / "b", pickle.dumps(theirs, protocol))
    ours = metadata.read(tmp_path / "b")
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data
    assert ours.planner_data == theirs.planner_data


def make(**others: Any) -> dict[str, Any]:
    dtypes = [torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.bool]
    weights = {str(dtype): torch.ones(3, 5).to(dtype) for dtype in dtypes}
    return {"state_dict": {**weights, "scalar": torch.tensor(1.0)}, **others}


@pytest.mark.parametrize("read", ["load_checkpoint", "load_folder", "consolidate"])
def test_no_read_of_ours_runs_what_a_folder_holds(read: str, tmp_path: Path) -> None:
    """A whole checkpoint with a hostile index, and one with a hostile object among the rest."""
    folder = tmp_path / "folder"
    actions: dict[str, Callable[[], Any]] = {
        "load_checkpoint": lambda: AtomicCheckpointIO().load_checkpoint(folder, weights_only=True),
        "load_folder": lambda: checkpoints.load_folder(folder, weights_only=True),
        "consolidate": lambda: consolidate(folder, tmp_path / "file"),
    }
    checkpoints.save_folder(make(), folder, "token", True, lambda action: action())
    actions[read]()
    good = FileSystemReader(folder).read_metadata()
    good.planner_data = Calls(fail)
    write(folder, good)
    resized(folder)
    with pytest.raises(ValueError, match="which no index does"):
        actions[read]()
    checkpoints.save_folder(make(other=Calls(fail)), folder, "token", True, lambda action: action())
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        actions[read]()


def resized(folder: Path) -> None:
    """The marker with the sizes that the files have now."""
    marker = folder / checkpoints.MARKER
    content = json.loads(marker.read_text())
    content["files"] = {name: (folder / name).stat().st_size for name in content["files"]}
    marker.write_text(json.dumps(content))
