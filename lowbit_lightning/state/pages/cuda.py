"""Pinned host memory under a GPU: one stream in, one stream out, and events.

Everything is made once and kept: the slab, the streams, an event for each chunk and direction. A step allocates nothing
and waits for nothing on the host. Buffers are freed only after ``close``, when all copies are done, so that the
allocator need not know of the streams.

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
        self._computing: list[torch.cuda.Stream] = []  # which have waited since the last ``computed``
        self._in, self._out = torch.cuda.Stream(device), torch.cuda.Stream(device)
        # A wait concerns what an event was recorded for when the wait was asked for: events may be used again.
        self._events: defaultdict[tuple[str, Moves], torch.cuda.Event] = defaultdict(torch.cuda.Event)
        self._pairs: dict[Moves, list[tuple[Tensor, Tensor]]] = {}

    def allocate(self, nbytes: int) -> Tensor:
        slab = aligned(nbytes)
        # Pinned in place, for all devices: torch's own pinned allocations are rounded up to the next power of two.
        with torch.cuda.device(self.device):  # or there would be a context on the current one
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
        self._in.wait_stream(torch.cuda.current_stream(self.device))  # whose kernels may have used it before
        return memory

    def fetch(self, moves: Moves, after: torch.cuda.Event | None) -> torch.cuda.Event:
        with torch.cuda.stream(self._in):
            if after is not None:
                self._in.wait_event(after)
            for near, far in self._tensors(moves):
                near.copy_(far, non_blocking=True)
            return self._recorded("fetch", moves, self._in)

    def store(self, moves: Moves, after: torch.cuda.Event | None) -> torch.cuda.Event:
        with torch.cuda.stream(self._out):
            if after is not None:
                self._out.wait_event(after)
            for near, far in self._tensors(moves):
                far.copy_(near, non_blocking=True)
            return self._recorded("store", moves, self._out)

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
        if not sys.is_finalizing():  # when CUDA may be gone already, and takes all with it
            self.close()

    def _forget_error(self) -> None:
        """The runtime keeps the last error, and torch would raise it for the next kernel, whoever launches that."""
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device=self.device)

    def _tensors(self, moves: Moves) -> list[tuple[Tensor, Tensor]]:
        """Near memory, and the part of the slab."""
        if moves not in self._pairs:
            assert self._slab is not None
            self._pairs[moves] = [(near, self._slab[first : first + near.numel()]) for near, first in moves.parts]
        return self._pairs[moves]

    def _recorded(self, kind: str, moves: Moves, stream: torch.cuda.Stream) -> torch.cuda.Event:
        event = self._events[kind, moves]
        event.record(stream)
        return event
