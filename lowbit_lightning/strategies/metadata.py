"""Reading ``.metadata``, the index of a folder of ``torch.distributed.checkpoint``, without trusting it.

It is a pickle, and torch's own reader calls any function that a pickle names. Here it may build only the classes of an
index; the tensors' files are read by ``torch.load(weights_only=True)``. So a folder that is loaded with
``weights_only=True`` runs no code, as a file does not.
"""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.serialization import _get_layout

NAME = ".metadata"

_WITH_STATE = (
    *(BytesStorageMetadata, ChunkStorageMetadata, Metadata, MetadataIndex, StorageMeta),
    *(TensorProperties, TensorStorageMetadata, _StorageInfo),
)


def read(folder: Path) -> Metadata:
    """The index of a folder.

    Raises:
        ValueError: for a pickle that holds anything but an index of files in this folder.
        OSError: if there is no index, or it can't be read.
    """
    content = (folder / NAME).read_bytes()
    try:
        found = _Restricted(io.BytesIO(content)).load()
        _check(found)
    except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError, LookupError) as error:
        raise ValueError(f"{folder / NAME} is not the index of a checkpoint: {error}") from error
    return found


class Reader(FileSystemReader):
    """Reads tensors by an index that was read, and checked, before."""

    def __init__(self, folder: Path, index: Metadata) -> None:
        super().__init__(folder)
        self._index = index

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._index


def _joined(*parts: str) -> str:
    """The path at which the checkpoint was written, which is not needed."""
    return os.path.join("", *parts)


_ALLOWED: dict[tuple[str, str], Any] = {
    **{(x.__module__, x.__qualname__): x for x in (*_WITH_STATE, _MEM_FORMAT_ENCODING, torch.Size, _get_layout)},
    **{("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    **{(m, f"{kind}Path"): _joined for m in ("pathlib", "pathlib._local") for kind in ("", "Posix", "Windows")},
}


class _Restricted(pickle._Unpickler):
    """In Python, so that BUILD is restricted too: given a class, it would set attributes of the class."""

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no index does")
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> NoReturn:
        raise pickle.UnpicklingError("it names an object outside of it, which no index does")

    def load_build(self) -> None:
        if type(self.stack[-2]) not in _WITH_STATE:
            raise pickle.UnpicklingError(f"it sets the state of a {type(self.stack[-2]).__name__}, which no index does")
        super().load_build()  # type: ignore[misc]

    dispatch[pickle.BUILD[0]] = load_build


def _check(found: Any) -> None:
    if not isinstance(found, Metadata):
        raise ValueError(f"it holds a {type(found).__name__}")
    for key, entry in found.state_dict_metadata.items():
        if not isinstance(key, str) or not isinstance(entry, (TensorStorageMetadata, BytesStorageMetadata)):
            raise ValueError(f"{key!r} is a {type(entry).__name__}")
    for index, place in found.storage_data.items():
        name = place.relative_path
        if not isinstance(index, MetadataIndex) or not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{index} lies in {name!r}, which is no file of this folder")
