"""The table of parameters that the optimizer kernels read: one row of addresses and shapes each, in device memory.

It is sent as kernel arguments (``src/table.cu`` explains why), and kept for the next step. It is not sent again as long
as the addresses of parameters, states and gradients stay the same.
"""

from __future__ import annotations

import ctypes
from array import array
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit_lightning.kernels.arguments import StepArguments
from lowbit_lightning.kernels.cuda import launch
from lowbit_lightning.kernels.sources import specialised
from lowbit_lightning.kernels.structs import parameter_rows

_WORDS = 480  # of 8 bytes per launch; all arguments of a kernel may take 4 KiB
_KEPT = 2**21  # words of all tables: 16 MiB. Paged states have one for each chunk
_tables: OrderedDict[tuple[torch.device, int, bytes], Tensor] = OrderedDict()


def parameter_table(arguments: StepArguments, grads: Sequence[Tensor]) -> tuple[Tensor, int]:
    """``structs.parameter_rows`` on the device, and the number of all blocks."""
    words = parameter_rows(arguments, grads)
    return _on_device(words, arguments.device), words[-1]


def forget() -> None:
    """Drop the tables that are kept for the next step."""
    _tables.clear()


def _on_device(words: array, device: torch.device) -> Tensor:
    """The words as an int64 tensor, valid for what is launched on the current stream after this call."""
    if _capturing(device):
        # Every replay of the graph needs this table, and later steps may replace it. So the graph gets a table of its
        # own: nodes of the graph write it into memory of the graph.
        return _send(words, device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = device, stream, words.tobytes()
    if key not in _tables:
        _tables[key] = _send(words, device)
        while len(_tables) > 1 and sum(map(len, _tables.values())) > _KEPT:
            _tables.popitem(last=False)  # the allocator reuses it in the order of its stream: after its last launch
    _tables.move_to_end(key)
    return _tables[key]


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _send(words: array, device: torch.device) -> Tensor:
    text = specialised("table.cu", WORDS=_WORDS)
    table = torch.empty(len(words), dtype=torch.int64, device=device)
    for start in range(0, len(words), _WORDS):
        part = words[start : start + _WORDS]
        packed = (ctypes.c_int64 * _WORDS)(*part)
        arguments = packed, ctypes.c_int(len(part)), table[start:]
        launch.run(launch.Launch(text, "write_words", (1, 1, 1), _WORDS, arguments))
    return table
