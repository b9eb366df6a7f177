"""The table of parameters that the optimizer kernels read: addresses and shapes, one row each, in device memory.

It travels there as kernel arguments (``src/table.cu`` says why) and is kept for the next step: as long as parameters,
states and gradients stay where they are, no step sends it again.
"""

from __future__ import annotations

import ctypes
from array import array
from collections import OrderedDict

import torch
from torch import Tensor

from lowbit_lightning.kernels.arguments import StepArguments
from lowbit_lightning.kernels.cuda import launch
from lowbit_lightning.kernels.sources import specialised

_WORDS = 480  # of 8 bytes per launch; all arguments of a kernel may take 4 KiB
_SHAPE_WORDS = 5  # row_length to first_block
_KEPT = 2**21  # words of all tables: 16 MiB. Paged states have one for each chunk
_tables: OrderedDict[tuple[torch.device, int, bytes], Tensor] = OrderedDict()


def parameter_table(arguments: StepArguments) -> tuple[Tensor, int]:
    """The rows of ``struct Parameter`` in src/optimizer_step.cu, on the device, and the number of all blocks.

    Addresses are looked up in every step, shapes once.
    """
    nothing: list[list[Tensor]] = [] if arguments.states else [[]]
    columns = [arguments.params, arguments.grads, arguments.steps]
    columns += [*arguments.states, *nothing, *arguments.scales, *nothing, arguments.remainders]
    if "cuda" not in arguments.cache:
        arguments.cache["cuda"] = _shapes(arguments, len(columns))
    words: array = arguments.cache["cuda"]
    width = len(columns) + _SHAPE_WORDS
    for number, tensors in enumerate(columns):
        if tensors:
            words[number : len(tensors) * width : width] = array("q", map(Tensor.data_ptr, tensors))
    return _on_device(words, arguments.device), words[-1]


def _shapes(arguments: StepArguments, addresses: int) -> array:
    """The table with zeros for addresses."""
    words = array("q")
    first_block = 0
    for i in range(len(arguments.params)):
        grid = arguments.grid(i)
        words.extend([0] * addresses)
        words.extend((grid.row_length, grid.blocks_per_row, arguments.ordinals[i], arguments.offsets[i], first_block))
        first_block += grid.rows * grid.blocks_per_row
    words.extend([0] * (addresses + _SHAPE_WORDS - 1) + [first_block])
    return words


def forget() -> None:
    """Drop the tables that are kept for the next step."""
    _tables.clear()


def _on_device(words: array, device: torch.device) -> Tensor:
    """The words as an int64 tensor, valid for what is launched on the current stream after this call."""
    if _capturing(device):
        # Every replay of the graph has to find the table, wherever later steps move it: it gets its own, sent by nodes
        # of the graph into memory of the graph.
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
