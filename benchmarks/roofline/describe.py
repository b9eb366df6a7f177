"""How a kernel is described: the op that starts it, and what a lane of it has to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from unittest.mock import patch

import torch
from emulator.backend import emulated

from lowbit_lightning.kernels.cuda import launch

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
NAMES = {F32: "fp32", BF16: "bf16", F16: "fp16"}


@dataclass(frozen=True)
class Phase:
    """A loop, or with ``whole`` all of a kernel: what a lane loads and stores in one turn (bytes of global memory), its
    tensor products, its sums and products of floats, and the ``elements`` that this is for. Of an unrolled loop a turn
    does a multiple of it. ``ahead``: turns whose loads are on their way together."""

    kernel: str
    elements: float
    loads: int
    stores: int = 0
    tensor: int = 0
    arithmetic: int = 0
    whole: bool = False
    unrolled: tuple[int, ...] = (1,)
    ahead: int = 1


@dataclass(frozen=True)
class Work:
    """A kernel, or several that do one thing.

    ``run``: the op on a small input, which the emulator watches. ``traffic``: bytes to and from memory for an element;
    ``unit``: what an element is. ``operations``: of the tensor units for an element, as many as int8 operations take as
    long; ``full_rate``: by ``wgmma``, which reaches the published rate; ``read``: bytes of shared memory for an element
    that the tensor units read themselves. ``large``: the op on an input for which it chooses the kernel that is meant,
    if it chooses another for a small one; it is not computed. ``architectures`` that have the kernel; empty: all.
    """

    name: str
    phases: tuple[Phase, ...]
    run: Callable[[], object]
    traffic: float
    unit: str
    operations: float = 0.0
    full_rate: bool = False
    read: float = 0.0
    large: Callable[[], object] | None = None
    architectures: tuple[str, ...] = ()

    def runs_on(self, architecture: str) -> bool:
        return not self.architectures or architecture in self.architectures

    def capability(self, architecture: str = "sm_80") -> tuple[int, int]:
        """Of an architecture, or of the first that has the kernel."""
        number = int((self.architectures or (architecture,))[0].removeprefix("sm_"))
        return number // 10, number % 10

    def launch(self, architecture: str) -> launch.Launch:
        """What the backend starts on such a GPU: the text, its threads and its shared memory.

        Raises:
            LookupError: if it does not start the kernel that is described.
        """
        found: list[launch.Launch] = []
        with emulated(capability=self.capability(architecture)), patch.object(launch, "run", found.append):
            (self.large or self.run)()
        wanted = [one for one in found if one.kernel == self.phases[0].kernel]
        if not wanted:
            raise LookupError(
                f"{self.name} for {architecture}: {[one.kernel for one in found]} is started, not {self.phases[0]}"
            )
        return wanted[-1]


def random(rows: int, columns: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
