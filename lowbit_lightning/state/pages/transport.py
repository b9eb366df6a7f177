"""The interface between the pager and what copies pages: two tiers of memory, copies between them, and events.

Optimizer states lie in a *slab*, one contiguous range of bytes in the far tier (pinned host memory for a GPU, a file
for RAM). Kernels compute in *near* memory. Copies are asynchronous, and only events order them. A transport may run
copies as late as it likes, in any order that their ``after`` events and the waits below permit. In particular, the
order of calls means nothing: neither for two fetches nor for a fetch and a store.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

Event = Any
"""An event is past once the work that it stands for is done. The pager does not look inside. An event is valid until
the call that made it is made again for the same ``Moves``."""


@dataclass(frozen=True, eq=False)
class Moves:
    """Parts that are copied together: pieces of near memory, each with its place in the slab.

    ``parts``: pairs of a uint8 vector, which lies in a tensor of ``Transport.buffer``, and its offset in the slab in
    bytes. Parts of one ``Moves`` never overlap, neither in near memory nor in the slab. Offsets and lengths may have
    any value: a chunk of whole parameters begins at a multiple of 4096 in the slab, and a part of a cut parameter
    begins wherever its rows end. The offset in the buffer and the offset in the slab are equal modulo 4096.

    Objects live as long as their transport, and are compared by identity. A transport may keep data for each (an event,
    a request).
    """

    parts: tuple[tuple[Tensor, int], ...]

    @cached_property
    def nbytes(self) -> int:
        return sum(part.numel() for part, _ in self.parts)


class Transport(Protocol):
    """Copies pages between the slab and near memory. One object serves one slab, one optimizer and one device.

    Its constructor takes what it needs to find the far tier; nothing expensive happens before ``allocate``. The thread
    that runs the optimizer's step makes all calls, one at a time (backward's thread, if gradients are released).
    """

    device: torch.device
    """The device of near memory, on which kernels run."""

    def allocate(self, nbytes: int) -> Tensor:
        """The slab: a CPU tensor, uint8 ``[nbytes]``, with any content. Called once.

        The host reads and writes it as memory, but only while no copy is under way (after ``settle`` of all of them).
        Its memory stays valid as long as a tensor holds it, also after ``close``.

        Raises:
            OSError, RuntimeError, MemoryError: if there is no room, saying how much was wanted and what to do.
        """

    def buffer(self, nbytes: int) -> Tensor:
        """Near memory: uint8 ``[nbytes]``, aligned to 4096 bytes on a CPU. Called before the first copy, once for each
        slot of the ring and each resident chunk. The pager keeps the tensors."""

    def fetch(self, moves: Moves, after: Event | None) -> Event:
        """Start copying from the slab to near memory, once ``after`` is past (None: at once). Returns at once.

        The event is past when all parts have arrived.
        """

    def store(self, moves: Moves, after: Event | None) -> Event:
        """Start copying from near memory to the slab, once ``after`` is past. Returns at once.

        The event is past when all parts are in the slab. Then the near memory may be overwritten, and a fetch or the
        host reads what was stored.
        """

    def computed(self, moves: Moves) -> Event:
        """An event for the kernels that were launched up to this call, on any stream that was current in a ``wait``
        since the last call. It is past when they are done. ``moves``: the data that they worked on."""

    def wait(self, event: Event) -> None:
        """Make kernels that are launched from now on, on the current stream, run after ``event``. May be called again.

        On a GPU the stream waits, and this call returns at once. If kernels are functions of the host, the host waits,
        and an error of the copy is raised here.
        """

    def settle(self, event: Event) -> None:
        """Make the host wait until ``event`` is past. Raises the error of the copy, if there was one."""

    def trim(self) -> None:
        """Give back memory that the host's accesses to the slab took. Called after such accesses, before the first
        fetch, when no copy is under way."""

    def close(self) -> None:
        """Wait for the copies under way, ignoring their errors, and give back everything except the slab's memory. A
        file is deleted. May be called again, and by ``__del__``."""
