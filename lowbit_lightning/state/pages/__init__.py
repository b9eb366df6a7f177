"""Optimizer states that lie in a far tier of memory and are copied to near memory for their step.

``pager`` decides what is in near memory at which time, ``layout`` decides the place of everything, ``transport``
describes what copies, and ``entries`` is what ``optimizer.state`` holds.
"""

from __future__ import annotations

import torch

from lowbit_lightning.state.pages.entries import Entries, in_a_slab, raw
from lowbit_lightning.state.pages.layout import Want
from lowbit_lightning.state.pages.pager import Chunk, Pager, Piece
from lowbit_lightning.state.pages.statistics import PageStatistics
from lowbit_lightning.state.pages.transport import Event, Moves, Transport


def open_transport(paged: bool | str, device: torch.device, directory: str | None = None) -> Transport | None:
    """The transport between ``device`` and the far tier that ``paged`` names. None if there is no such tier.

    ``paged``: True for host memory, which is a far tier only for a GPU, or "disk" for a file in ``directory`` (None: a
    temporary directory), which is one for the CPU.

    Raises:
        ValueError: for "disk" under a GPU.
    """
    if paged == "disk" and device.type == "cpu":
        from lowbit_lightning.state.pages.file import FileTransport

        return FileTransport(directory)
    if paged == "disk" and device.type != "meta":
        raise ValueError(
            f'paged="disk" pages from the host\'s memory to a file, and the parameters are on {device}: use '
            "paged=True, which pages from the device to host memory"
        )
    if paged is True and device.type == "cuda":
        from lowbit_lightning.state.pages.cuda import CudaTransport

        return CudaTransport(device)
    return None
