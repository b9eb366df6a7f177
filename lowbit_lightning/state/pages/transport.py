"""What the pager asks of whatever moves pages: two tiers of memory, copies between them, and events.

Optimizer states lie in a *slab*, one flat run of bytes in the far tier (pinned host memory under a GPU, a file under
RAM). Kernels compute in *near* memory. Copies are asynchronous and ordered by events alone: a transport may run them
as late as it likes, and in any order that their ``after`` events and the waits below permit. Nothing but these events
orders anything: not the order of calls, not fetches among themselves, not a fetch against a store.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

Event = Any
"""A point in the course of a transport's work, which is past once all that it stands for is done. Opaque to the pager.
It is good until the call that made it is made again for the same ``Moves``."""


@dataclass(frozen=True, eq=False)
class Moves:
    """What travels together: parts of near memory, each with its place in the slab.

    ``parts``: pairs of a uint8 vector that lies in a tensor of ``Transport.buffer``, and the offset in the slab, in
    bytes, of as many bytes. Parts of one ``Moves`` never overlap, neither near nor far. Any offset and any length may
    occur: a chunk of whole parameters begins at a multiple of 4096 in the slab; the parts of one that is cut begin
    wherever its rows end. Near memory and slab agree in the offset modulo 4096 (from the start of the buffer).

    Objects live as long as their transport and compare by identity: a transport may keep for each what it needs again
    (an event, a request).
    """

    parts: tuple[tuple[Tensor, int], ...]

    @cached_property
    def nbytes(self) -> int:
        return sum(part.numel() for part, _ in self.parts)


class Transport(Protocol):
    """Moves pages between the slab and near memory. One object serves one slab, one optimizer and one device.

    Its constructor takes what it needs to find the far tier; nothing large happens before ``allocate``. Calls come from
    the thread that runs the optimizer's step (backward's thread where gradients are released), one at a time.
    """

    device: torch.device
    """Where near memory lies, and kernels run."""

    def allocate(self, nbytes: int) -> Tensor:
        """The slab: a CPU tensor, uint8 ``[nbytes]``, of any content. Called once.

        The host reads and writes it as memory, but only while no copy is under way (after ``settle`` of all of them).
        Its memory stays valid as long as a tensor holds it, also after ``close``.

        Raises:
            OSError, RuntimeError, MemoryError: if there is no room, saying how much was wanted and what to do.
        """
        ...

    def buffer(self, nbytes: int) -> Tensor:
        """Near memory: uint8 ``[nbytes]``, aligned to 4096 bytes on a CPU. Called before the first copy, once for each
        place of the ring and each resident chunk; the pager keeps what it gets."""
        ...

    def fetch(self, moves: Moves, after: Event | None) -> Event:
        """Start copying from the slab to near memory, once ``after`` is past (None: at once). Returns at once.

        The event is past when all parts have arrived.
        """
        ...

    def store(self, moves: Moves, after: Event | None) -> Event:
        """Start copying from near memory to the slab, once ``after`` is past. Returns at once.

        The event is past when all parts are in the slab: when the near memory may be overwritten, and a fetch or the
        host would read what was stored.
        """
        ...

    def computed(self, moves: Moves) -> Event:
        """An event that is past when all kernels are done that were launched up to this call, on any stream that was
        current in a ``wait`` since the last one. ``moves``: what they worked on; it names the event."""
        ...

    def wait(self, event: Event) -> None:
        """Let kernels that are launched from now on, on the current stream, run after ``event``. May be called again.

        A GPU's stream waits, and this returns at once. Where kernels are functions of the host, the host waits, and an
        error of the copy is raised here.
        """
        ...

    def settle(self, event: Event) -> None:
        """Wait, on the host, until ``event`` is past. Raises the error of the copy, if there was one."""
        ...

    def trim(self) -> None:
        """The host has read or written the slab and is done with it for now, and no copy is under way: memory that this
        cost may be given back. Called before the first fetch after such accesses."""
        ...

    def close(self) -> None:
        """Wait for what is under way, whatever its errors, and give back all but the slab's memory. A file is gone
        afterwards. May be called again, and by ``__del__``."""
        ...
