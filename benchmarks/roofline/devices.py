"""Published figures of GPUs, a few estimates, and the time that they allow a kernel."""

from __future__ import annotations

from dataclasses import dataclass

LANES, SCHEDULERS = 32, 4
COPY_SHARE = 0.9  # of the nominal bandwidth that a copy reaches: 4.3 of 4.8 TB/s on an H200


@dataclass(frozen=True)
class Device:
    """What a vendor publishes; ``mma_share``, the clock under load and ``latency`` are estimates.

    ``clock``: of boost, under load, in Hz. ``bandwidth``: nominal, in bytes a second. ``int8``: dense tensor operations
    a second by the fastest instruction; ``mma_share``: what ``mma.sync`` reaches of it. Of a multiprocessor: ``warps``
    that it holds, ``shared``: bytes of shared memory for CUDA blocks, ``alu``: lanes of its arithmetic-logic units.
    ``latency``: of global memory, in seconds.
    """

    name: str
    architecture: str
    multiprocessors: int
    clock: float
    bandwidth: float
    int8: float
    mma_share: float
    warps: int
    shared: int
    alu: int = 64
    latency: float = 650e-9

    @property
    def issue_rate(self) -> float:
        """Issue slots of single lanes a second."""
        return self.multiprocessors * SCHEDULERS * LANES * self.clock

    @property
    def copy(self) -> float:
        """Bytes a second that a copy reads and writes together."""
        return COPY_SHARE * self.bandwidth


DEVICES = (
    Device("T4", "sm_75", 40, 1.35e9, 320e9, 130e12, 1.0, 32, 64 << 10),
    Device("A100", "sm_80", 108, 1.41e9, 2039e9, 624e12, 1.0, 64, 164 << 10),
    Device("L40S", "sm_89", 142, 2.52e9, 864e9, 733e12, 1.0, 48, 100 << 10),
    Device("RTX 4090", "sm_89", 128, 2.52e9, 1008e9, 660e12, 1.0, 48, 100 << 10),
    Device("H100", "sm_90", 132, 1.755e9, 3350e9, 1979e12, 0.62, 64, 228 << 10),
    Device("H200", "sm_90", 132, 1.755e9, 4800e9, 1979e12, 0.62, 64, 228 << 10),
    Device("B200", "sm_100", 148, 1.90e9, 8000e9, 4500e12, 0.3, 64, 228 << 10),
    Device("RTX 5090", "sm_120", 170, 2.41e9, 1792e9, 838e12, 1.0, 48, 100 << 10, alu=128),
)


@dataclass(frozen=True)
class Limits:
    """Seconds that one unit of work takes by each limit. The largest binds."""

    memory: float
    issue: float
    alu: float
    shared: float
    tensor: float

    @property
    def seconds(self) -> float:
        return max(self.memory, self.issue, self.alu, self.shared, self.tensor)

    @property
    def binds(self) -> str:
        return max(("memory", "issue", "alu", "shared", "tensor"), key=lambda name: getattr(self, name))


def limits(
    device: Device, *, traffic: float, slots: float, alu: float, turns: float = 0.0, operations: float = 0.0
) -> Limits:
    """Of one unit of work: bytes to and from memory, slots of a lane, those of the arithmetic-logic unit, turns of
    shared memory (a lane's share of them), operations of tensor units."""
    return Limits(
        memory=traffic / device.copy,
        issue=slots / device.issue_rate,
        alu=alu / (device.multiprocessors * device.alu * device.clock),
        shared=turns / (device.multiprocessors * LANES * device.clock),
        tensor=operations / (device.int8 * device.mma_share),
    )


def occupancy(device: Device, threads: int, registers: int, shared: int) -> int:
    """Warps that a multiprocessor holds of a kernel: by registers (65536, given to warps in units of 256), by shared
    memory and by its own limit."""
    warps = -(-threads // LANES)
    by_registers = 65536 // (-(-registers * LANES // 256) * 256) // warps
    by_shared = device.shared // (shared + 1024) if shared else device.warps
    return warps * max(0, min(by_registers, by_shared, device.warps // warps))
