"""How long a whole int8 product should take on Hopper, with each of our kernels: computed, **not measured on a GPU**.

A product is cut into tiles, and the GPU computes as many tiles at a time as it has multiprocessors: a wave. A wave
takes the latency of its first copies, its steps along K, and what comes after them. A step takes the longest of

- tensor: its multiplications at the published rate (``mma.sync`` reaches 62 % of it, an estimate),
- issue: its instructions, counted in the machine code, at four a clock,
- shared memory: what is copied there and what the tensor units read, at 128 bytes a clock,
- L2: the bytes of its operands, at 28 a clock and multiprocessor. That is what reads from L2 were measured to reach on
  an H100 (5.6 TB/s on 114 multiprocessors, Chips and Cheese, 2023); matrix products of others seem to reach more. So
  times are given without this limit and with it.

What this cannot see: waits at barriers and fences, copies that come late, a clock that power lowers, and how tiles of a
wave share L2.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from lowbit_lightning.kernels import compile
from lowbit_lightning.kernels.cuda import int8_wgmma
from lowbit_lightning.kernels.sources import specialised
from roofline import sass
from roofline.devices import DEVICES, LANES, SCHEDULERS, Device

SHAPE = 8192, 4096, 4096  # M, N, K

L2_BYTES, SHARED_BYTES = 28, 128  # a clock and multiprocessor
BF16_RATE = 0.75 * 989e12  # multiplications and sums a second by cuBLAS: three quarters of the published rate
RIVALS = {"fp8, scales of blocks": 1.40, "fp8, current scaling": 1.58, "fp8, delayed scaling": 1.69}  # times bf16

NOTES = """
- slots: instructions that a warp issues in a step along K.
- bytes of L2: that the operands of a step need for each clock and multiprocessor, at the full rate of the tensor units.
  28 are what an H100 was measured to give. Neither the order of tiles nor the depth of a step changes them; larger
  tiles do, and the registers of a multiprocessor hold no more than the sums of 192 x 256. Clusters of multiprocessors
  that share operands (TMA's multicast) would need fewer; our kernels have none.
- over bf16: quantising both operands from bfloat16 included, beside cuBLAS's bfloat16 product at three quarters of the
  published rate (an assumption). Published figures of fp8 on an H200, quantising included: {rivals}.
"""


@dataclass(frozen=True)
class Engine:
    """A kernel of the product. ``tile``: rows, columns; ``depth``: columns of K in a step; ``tensor``: a warp's tensor
    instructions in a step; ``read``: bytes of shared memory that all warps read in a step; ``share``: of the tensor
    units' rate, what its instruction reaches."""

    name: str
    text: str
    target: str
    kernel: str
    tile: tuple[int, int]
    depth: int
    threads: int
    tensor: int
    read: int
    share: float

    @property
    def copied(self) -> int:
        """Bytes of operands in a step."""
        return sum(self.tile) * self.depth


def engines() -> list[Engine]:
    """``mma.sync``, and ``wgmma`` with every tile; to bfloat16."""
    bf16, f32 = torch.bfloat16, torch.float32
    text = specialised("int8_product.cu", ELEMENT=bf16, BIAS=f32, TILE_N=256, STAGES=3)
    found = [Engine("mma.sync 128 x 256", text, "sm_90", "int8_product", (128, 256), 64, 256, 64, 8 * 128 * 64, 0.62)]
    for tile in int8_wgmma.TILES:
        groups = tile[0] // 64
        read = groups * (64 + tile[1]) * 128  # each group reads its rows of A and all of B
        text = int8_wgmma.text_of(bf16, f32, tile)
        name = f"wgmma {tile[0]} x {tile[1]}"
        found.append(Engine(name, text, "sm_90a", "int8_product_wgmma", tile, 128, groups * 128, 4, read, 1.0))
    return found


@cache
def slots(engine: Engine) -> tuple[int, int]:
    """A warp's in a step, and outside the loop over steps.

    Raises:
        LookupError: if no path of the kernel does the work.
    """
    blocks = sass.disassemble(compile.cubin(engine.text, engine.target).code)[engine.kernel]
    loads, stores = engine.copied // engine.threads, 2 * engine.tile[0] * engine.tile[1] // engine.threads
    if engine.threads > 256:  # the others do not copy; the warps that do decide
        loads = engine.copied // 256
    steps = [sass.turn(blocks, body, head, loads=loads, tensor=engine.tensor) for head, body in sass.loops(blocks)]
    found = [step.slots for step in steps if step is not None]
    whole = sass.turn(blocks, tensor=engine.tensor, stores=stores)
    if not found or whole is None:
        raise LookupError(f"no path of {engine.kernel} does the work of {engine.name}")
    return min(found), max(0, whole.slots - min(found))


@dataclass(frozen=True)
class Step:
    """Seconds of a step along K by each limit."""

    tensor: float
    issue: float
    shared: float
    l2: float

    def seconds(self, with_l2: bool) -> float:
        return max(self.tensor, self.issue, self.shared, self.l2 if with_l2 else 0.0)


def step_of(engine: Engine, device: Device) -> Step:
    """On one multiprocessor, which has one tile at a time."""
    warps, operations = engine.threads // LANES, 2 * engine.tile[0] * engine.tile[1] * engine.depth
    return Step(
        tensor=operations * device.multiprocessors / (device.int8 * engine.share),
        issue=warps * slots(engine)[0] / (SCHEDULERS * device.clock),
        shared=(engine.copied + engine.read) / (SHARED_BYTES * device.clock),
        l2=engine.copied / (L2_BYTES * device.clock),
    )


def seconds(engine: Engine, device: Device, shape: tuple[int, int, int], with_l2: bool) -> float:
    """Of a product of M x N x K."""
    m, n, k = shape
    tiles = -(-m // engine.tile[0]) * -(-n // engine.tile[1])
    waves = -(-tiles // device.multiprocessors)
    written = 2 * engine.tile[0] * engine.tile[1] / (L2_BYTES * device.clock)
    after = max(engine.threads // LANES * slots(engine)[1] / (SCHEDULERS * device.clock), written)
    steps = -(-k // engine.depth) * step_of(engine, device).seconds(with_l2)
    moved = m * k + n * k + 2 * m * n
    return max(waves * (device.latency + steps + after), moved / device.copy)


def utilisation(engine: Engine, device: Device, shape: tuple[int, int, int], with_l2: bool) -> float:
    """Of the tensor units' published rate."""
    m, n, k = shape
    return 2 * m * n * k / device.int8 / seconds(engine, device, shape, with_l2)


def report() -> str:
    """Markdown: every engine on every Hopper GPU, and what the columns mean."""
    heads = "kernel, device, slots, bytes of L2, us, of the tensor units, us with L2, of the tensor units, over bf16"
    m, n, k = SHAPE
    lines = [f"{m} x {n} x {k} (M x N x K), to bfloat16:", ""]
    lines += [f"| {heads.replace(', ', ' | ')} |", "| --- | --- |" + " ---: |" * 7]
    for device in (device for device in DEVICES if device.architecture == "sm_90"):
        quantising = 3 * (m * k + n * k) / device.copy
        for engine in engines():
            free, bound = (seconds(engine, device, SHAPE, with_l2) for with_l2 in (False, True))
            full = engine.copied / (step_of(engine, device).tensor * engine.share * device.clock)
            bf16 = 2 * m * n * k / BF16_RATE
            cells = (
                *(engine.name, device.name, slots(engine)[0], f"{full:.0f}"),
                *(f"{1e6 * free:.0f}", f"{utilisation(engine, device, SHAPE, False):.0%}"),
                *(f"{1e6 * bound:.0f}", f"{utilisation(engine, device, SHAPE, True):.0%}"),
                f"{bf16 / (bound + quantising):.2f} to {bf16 / (free + quantising):.2f}",
            )
            lines.append(f"| {' | '.join(map(str, cells))} |")
    rivals = ", ".join(f"{name} {times:.2f}" for name, times in RIVALS.items())
    return "\n".join([*lines, NOTES.format(rivals=rivals)])
