"""Pinned host memory under a GPU: one stream in, one stream out, and events.

The slab, the streams, and an event for each chunk and direction are made once and kept. A step allocates nothing, and
the host waits for nothing in it. Buffers are freed only after ``close``, when all copies are done. So the allocator
need not know the streams.

Kernels run on whatever streams are current when ``wait`` is called: backward may use several for one chunk. The event
of ``computed`` comes after all of them.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections import defaultdict

import torch
from torch import Tensor

from lowbit_lightning.state.pages.memory import aligned
from lowbit_lightning.state.pages.transport import Moves


class CudaTransport:
    """See ``transport.Transport``."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._process = device, os.getpid()
        self._slab: Tensor | None = None
        self._computing: list[torch.cuda.Stream] = []  # streams that have waited since the last ``computed``
        self._in, self._out = torch.cuda.Stream(device), torch.cuda.Stream(device)
        # A wait refers to the last record of the event before the call of wait. So events may be recorded again.
        self._events: defaultdict[tuple[str, Moves], torch.cuda.Event] = defaultdict(torch.cuda.Event)
        self._pairs: dict[Moves, list[tuple[Tensor, Tensor]]] = {}

    def allocate(self, nbytes: int) -> Tensor:
        slab = aligned(nbytes)
        # Pinned in place, for all devices: torch's own pinned allocations are rounded up to the next power of two.
        with torch.cuda.device(self.device):  # otherwise the current device would get a context
            status = torch.cuda.cudart().cudaHostRegister(slab.data_ptr(), nbytes, 1) if nbytes else 0
        if int(status) != 0:
            self._forget_error()
            raise RuntimeError(
                f"paged=True needs {nbytes} bytes of pinned host memory, and the driver does not give them (cudaError "
                f"{int(status)}): make room in the host's memory, raise `resident` so that less is paged, or page less"
            )
        self._slab = slab
        return slab

    def buffer(self, nbytes: int) -> Tensor:
        memory = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        self._in.wait_stream(torch.cuda.current_stream(self.device))  # its kernels may have used this memory before
        return memory

    def fetch(self, moves: Moves, after: torch.cuda.Event | None) -> torch.cuda.Event:
        return self._copied("fetch", self._in, moves, after)

    def store(self, moves: Moves, after: torch.cuda.Event | None) -> torch.cuda.Event:
        return self._copied("store", self._out, moves, after)

    def computed(self, moves: Moves) -> torch.cuda.Event:
        stream = torch.cuda.current_stream(self.device)
        for other in self._computing:
            if other != stream:
                stream.wait_stream(other)
        self._computing.clear()
        return self._recorded("computed", moves, stream)

    def wait(self, event: torch.cuda.Event) -> None:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a paged optimizer cannot be captured in a CUDA graph: build it with paged=False")
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(event)
        if stream not in self._computing:
            self._computing.append(stream)

    def settle(self, event: torch.cuda.Event) -> None:
        event.synchronize()

    def trim(self) -> None:
        pass

    def close(self) -> None:
        if self._slab is None or os.getpid() != self._process:  # a forked process has no CUDA
            return
        slab, self._slab = self._slab, None
        self._in.synchronize()
        self._out.synchronize()
        self._pairs.clear()
        self._events.clear()
        if slab.numel():
            with torch.cuda.device(self.device):
                torch.cuda.cudart().cudaHostUnregister(slab.data_ptr())

    def __del__(self) -> None:
        if not sys.is_finalizing():  # at the interpreter's end CUDA may be gone already, and its memory with it
            self.close()

    def _forget_error(self) -> None:
        """Clear the runtime's last error: otherwise torch would raise it at the next kernel launch of any code."""
        with contextlib.suppress(RuntimeError):
            torch.ones(1, dtype=torch.float32, device=self.device)

    def _copied(
        self, kind: str, stream: torch.cuda.Stream, moves: Moves, after: torch.cuda.Event | None
    ) -> torch.cuda.Event:
        with torch.cuda.stream(stream):
            if after is not None:
                stream.wait_event(after)
            for near, far in self._tensors(moves):
                to, source = (near, far) if kind == "fetch" else (far, near)
                to.copy_(source, non_blocking=True)
            return self._recorded(kind, moves, stream)

    def _tensors(self, moves: Moves) -> list[tuple[Tensor, Tensor]]:
        """Pairs of near memory and its part of the slab."""
        if moves not in self._pairs:
            assert self._slab is not None
            self._pairs[moves] = [(near, self._slab[first : first + near.numel()]) for near, first in moves.parts]
        return self._pairs[moves]

    def _recorded(self, kind: str, moves: Moves, stream: torch.cuda.Stream) -> torch.cuda.Event:
        event = self._events[kind, moves]
        event.record(stream)
        return event
