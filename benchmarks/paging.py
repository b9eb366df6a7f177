"""Steps of paged optimizers beside what moves the pages: the disk under RAM, or the link between host and GPU.

    python benchmarks/paging.py [--device cuda] [--millions 64] [--resident 0.1] [--page-dir DIR] [--output FOLDER]

On the CPU pages lie in a file (``paged="disk"``); on a GPU in pinned host memory (``paged=True``). All states are
streamed, in and out, unless ``--resident`` lets a share of them stay. The rival is the bare medium, moving the same
bytes both ways at once in chunks of the same size: a loop of ``preadv`` and ``pwritev`` over a second file in the same
folder, or copies on two streams. Both take turns with the step; the ratio of their times is the share of the medium's
bandwidth that paging reaches. The same step without paging says what the kernels take; a paged step cannot be faster
than the slower of the two.

The disk is read and written with O_DIRECT, past this machine's page cache, where its file system has that; a disk may
have a cache of its own, and a virtual machine's host has one. A run is three steps, and on the CPU all that they have
stored; times are per step. On a GPU a trace of one step follows, with the calls in it that would make the host wait or
allocate.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from _common import HOW_TO_READ, Candidate, Report, measure, parser, rival, skipped
from torch import Tensor, nn

from lowbit_lightning import optim
from lowbit_lightning.state.pages import file, layout
from lowbit_lightning.state.pages.memory import aligned

STEPS = 3
LAYERS = 16
THREADS = 2  # each way, as the pager has them
WAITS = ("Synchronize", "cudaMalloc", "cudaFree", "cudaHostAlloc", "cuMemAlloc", "cuMemFree")
BITS = {8: "AdamW 8 bits", 32: "AdamW 32 bits"}


def make_parameters(millions: float, device: str) -> list[nn.Parameter]:
    """Square matrices, with gradients."""
    side = math.isqrt(int(millions * 2**20) // LAYERS) // 64 * 64
    params = [nn.Parameter(torch.full((side, side), 0.02, device=device)) for _ in range(LAYERS)]
    for p in params:
        p.grad = torch.full_like(p, 1e-3)
    return params


def state_bytes(bits: int, count: int) -> int:
    """Of what is paged: scales of 8-bit states stay near."""
    return count * (2 if bits == 8 else 8)


def steps(optimizer: torch.optim.Optimizer) -> Callable[[], object]:
    first = optimizer.param_groups[0]["params"][0]

    def run() -> None:
        for _ in range(STEPS):
            optimizer.step()
        if not first.is_cuda:
            dict(optimizer.state[first])  # whoever reads states waits until all of them are stored

    return run


# -- the bare medium -------------------------------------------------------------------------------------------------


@contextmanager
def page_file(folder: Path, nbytes: int) -> Iterator[tuple[int, bool]]:
    """A descriptor of a file without a name, allocated as the pager's is; whether it has O_DIRECT."""
    with tempfile.TemporaryFile(dir=folder, buffering=0) as named:
        os.posix_fallocate(named.fileno(), 0, nbytes)
        try:
            opened, direct = os.open(f"/proc/self/fd/{named.fileno()}", os.O_RDWR | os.O_DIRECT), True
        except OSError:
            opened, direct = os.dup(named.fileno()), False
        try:
            yield opened, direct
        finally:
            os.close(opened)


def bare_disk(folder: Path, nbytes: int) -> Iterator[Callable[[], object]]:
    """Reads all of a file and writes all of it, at once, in the pager's pieces and with as many threads."""
    piece, free = file.PIECE, SimpleQueue[memoryview]()
    offsets = range(0, nbytes // piece * piece, piece)
    for _ in range(2 * THREADS):
        free.put(aligned(piece).random_(0, 256).numpy().data)
    with page_file(folder, nbytes) as (opened, direct):

        def move(call: Callable[..., int], offset: int) -> None:
            buffer = free.get()
            if call(opened, [buffer], offset) != piece:
                raise OSError(f"fewer than {piece} bytes at {offset}")
            if not direct:
                if call is os.pwritev:
                    os.fdatasync(opened)
                os.posix_fadvise(opened, offset, piece, os.POSIX_FADV_DONTNEED)
            free.put(buffer)

        def run() -> None:
            with ThreadPoolExecutor(THREADS) as reads, ThreadPoolExecutor(THREADS) as writes:
                tasks = [task for _ in range(STEPS) for task in pairs(reads, writes)]
                for task in tasks:
                    task.result()

        def pairs(reads: ThreadPoolExecutor, writes: ThreadPoolExecutor) -> Iterator[Future[None]]:
            for number, offset in enumerate(offsets):
                yield reads.submit(move, os.preadv, offset)
                yield writes.submit(move, os.pwritev, offsets[number - len(offsets) // 2])

        run()  # what was never written would not be read from the disk
        yield run


def bare_link(nbytes: int) -> Callable[[], object]:
    """Copies so many bytes from pinned host memory to the device and as many back, at once, on two streams."""
    chunk = layout.CHUNK
    host = torch.empty(2**31, dtype=torch.uint8, pin_memory=True)  # more than any cache; torch rounds up to powers of 2
    places = host.split(chunk)
    ring = [torch.empty(chunk, dtype=torch.uint8, device="cuda") for _ in range(4)]
    inward, outward = torch.cuda.Stream(), torch.cuda.Stream()

    def copy(stream: torch.cuda.Stream, one: Callable[[int], tuple[Tensor, Tensor]]) -> None:
        with torch.cuda.stream(stream):
            for number in range(nbytes // chunk):
                target, source = one(number)
                target.copy_(source, non_blocking=True)

    def run() -> None:
        here = torch.cuda.current_stream()
        for stream in (inward, outward):
            stream.wait_stream(here)
        for _ in range(STEPS):
            copy(inward, lambda i: (ring[i % 2], places[i % len(places)]))
            copy(outward, lambda i: (places[(i + len(places) // 2) % len(places)], ring[2 + i % 2]))
        for stream in (inward, outward):
            here.wait_stream(stream)

    return run


# -- the report ------------------------------------------------------------------------------------------------------


def theirs(name: str) -> Callable[..., Any]:
    return rival("bitsandbytes.optim", name)


def contenders(bits: int, params: list[nn.Parameter], arguments: argparse.Namespace) -> list[Candidate]:
    """The bare medium, the step, and the paged step."""
    nbytes = state_bytes(bits, sum(p.numel() for p in params))
    resident = int(arguments.resident * nbytes)
    options: dict[str, Any] = {"bits": bits, "lr": 1e-4}
    if arguments.device == "cuda":
        bare = Candidate("bare link", lambda: bare_link(nbytes))
        where: dict[str, Any] = {"paged": True, "resident": resident}
    else:
        running = bare_disk(arguments.page_dir, nbytes)  # the file lives as long as this
        bare = Candidate("bare disk", lambda: next(running))
        where = {"paged": "disk", "resident": resident, "page_dir": str(arguments.page_dir)}
    everyone = [
        bare,
        Candidate(BITS[bits], lambda: steps(optim.AdamW(params, **options))),
        Candidate(f"{BITS[bits]} paged", lambda: steps(optim.AdamW(params, **options, **where))),
    ]
    if arguments.device == "cuda":
        name = {8: "PagedAdamW8bit", 32: "PagedAdamW32bit"}[bits]
        everyone.append(Candidate(f"bitsandbytes {name}", lambda: steps(theirs(name)(params, lr=1e-4))))
    return everyone


def case(report: Report, bits: int, params: list[nn.Parameter]) -> None:
    arguments, count = report.arguments, sum(p.numel() for p in params)
    nbytes = state_bytes(bits, count)
    gc.collect()
    everyone = contenders(bits, params, arguments)
    bare, plain, paged = everyone[:3]
    running = measure(everyone, arguments)
    report.add(f"## AdamW, {bits} bits: {count / 1e6:.0f} M parameters, {nbytes / 1e9:.2f} GB of paged states", "")
    rows = []
    for c in running:
        times = f"{1e3 * c.median / STEPS:.1f}", c.spread, f"{1e3 * c.best / STEPS:.1f}"
        moved = 2 * nbytes * STEPS / c.median / 1e9
        rows.append([c.name, *times, "-" if c is plain else f"{moved:.2f}"])
    report.table(["", "ms a step", "spread", "best", "GB/s, in and out"], rows)
    report.add(*skipped(everyone))
    if all(c in running for c in (bare, plain, paged)):
        slower = max(bare, plain, key=lambda c: c.median)
        report.add(
            f"Paging runs at {100 * bare.median / paged.median:.0f} % of the bare medium's bandwidth; no step could "
            f"be faster than its slower part, here {slower.name}; it takes {paged.median / slower.median:.2f}x that; "
            f"{paged.median / plain.median:.2f}x the unpaged step. Resident: {100 * arguments.resident:.0f} % of the "
            "states.",
            "",
        )


def trace(report: Report, bits: int, params: list[nn.Parameter], arguments: argparse.Namespace) -> None:
    """Calls of the CUDA runtime in a warm paged step that wait or allocate."""
    optimizer = optim.AdamW(params, bits=bits, paged=True, resident=0)
    for _ in range(3):
        optimizer.step()
    report.add(f"A trace of a paged step of {bits} bits: {describe(calls_in(optimizer.step))}.", "")


def calls_in(run: Callable[[], object]) -> Counter[str]:
    """How often each call of the CUDA runtime and driver that waits or allocates occurs inside ``run``."""
    from torch.profiler import ProfilerActivity, profile, record_function

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        with record_function("measured"):
            run()
        torch.cuda.synchronize()  # this one, and the profiler's own, are behind what is measured
    events = recorded.events() or []
    measured = next(e for e in events if e.name == "measured").time_range
    inside = [e.name for e in events if measured.start <= e.time_range.start <= measured.end]
    assert any("Memcpy" in name or "memcpy" in name for name in inside), "the trace shows no copies"
    return Counter(name for name in inside if any(part in name for part in WAITS))


def describe(calls: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in calls.items()) or "nothing that waits or allocates"


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--millions", type=float, help="parameters; default 64 on the CPU, 1024 on a GPU")
    options.add_argument("--bits", default="8,32", help="of the states: 8, 32 or both")
    options.add_argument("--resident", type=float, default=0.0, help="share of the states that stays near (default 0)")
    options.add_argument("--page-dir", type=Path, help="folder of the page files; default: the pager's own")
    options.set_defaults(repeats=9)
    arguments = options.parse_args()
    if not 0 <= arguments.resident < 1:
        options.error(f"--resident must be a share, from 0 to below 1, got {arguments.resident}")
    report = Report("paging", arguments)
    if arguments.device == "cpu":
        if sys.platform != "linux":
            options.error("page files are Linux's")
        arguments.page_dir = file.FileTransport(arguments.page_dir).folder
        report.add(f"- pages in {arguments.page_dir}, on {file.filesystem(arguments.page_dir) or 'unknown'}", "")
    report.add(HOW_TO_READ, "")
    params = make_parameters(arguments.millions or (64 if arguments.device == "cpu" else 1024), arguments.device)
    for bits in map(int, arguments.bits.split(",")):
        case(report, bits, params)
        if arguments.device == "cuda":
            trace(report, bits, params, arguments)
    report.save()


if __name__ == "__main__":
    main()
