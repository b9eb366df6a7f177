"""What limits each CUDA kernel on GPUs that are not here: issue slots, memory or tensor units.

    python benchmarks/cuda_roofline.py [--only adamw] [--architectures sm_90] [--json FILE]
    python benchmarks/cuda_roofline.py --update

Slots are counted in the machine code of each architecture, on the path that a full, aligned block takes. Time is the
largest of bytes over bandwidth, slots over issue rate, turns of shared memory and tensor operations over their rates,
with published figures: a prediction that no kernel beats, and that a good one comes near. The emulator gives the
addresses of a small input: sectors of global memory over those needed, and turns of shared memory over those without
bank conflicts. **Nothing is measured on a GPU.** Kernels are compiled by as many processes as there are processors.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import repeat
from pathlib import Path
from typing import Any

from lowbit_lightning.kernels import compile

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from emulator.backend import emulated
from roofline import product, sass
from roofline.describe import Phase, Work
from roofline.devices import DEVICES, Device, Limits, limits, occupancy
from roofline.memory import Traffic, traffic
from roofline.work import works

FIGURES = Path(__file__).resolve().parent / "roofline" / "figures.json"
HELD = "sm_90"  # whose figures a test holds
ARCHITECTURES = ("sm_75", "sm_80", "sm_89", "sm_90", "sm_100", "sm_120")

REPORT = """# Predicted: what limits each CUDA kernel

**Nothing here was measured on a GPU.** `make cuda-roofline` counts issue slots in the machine code that NVRTC
{nvrtc} makes, on the path that a full, aligned block takes, and compares them with published figures of GPUs. A
kernel cannot be faster than its limit; how near it comes, only a GPU shows. What `mma.sync` reaches of the tensor units
(62 % on sm_90, 30 % on sm_100) is an estimate.

- slots: instructions that a warp issues for an element. Of the ALU: those that only the half-width integer units take.
- in flight: kilobytes that a multiprocessor has asked for at a time, over those that its bandwidth needs.
- sectors: of 32 bytes, moved over needed. banks: turns of shared memory over those without conflicts. Both are counted
  by the emulator, on a small input.
- of the limit: of the bandwidth of a copy (nine tenths of the nominal one), for a product of the tensor units.

{table}

## A whole int8 product on Hopper

What waves of tiles, steps along K, and what comes before and after them take. It is computed without the limit of L2
and with it; `benchmarks/roofline/product.py` says what is taken into account, and what cannot be seen.

{product}"""


@cache
def by_name() -> dict[str, Work]:
    return {work.name: work for work in works()}


def _processes(most: int) -> ProcessPoolExecutor:
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(min(most, os.cpu_count() or 1), mp_context=spawn)


@dataclass(frozen=True)
class Count:
    """Of one kernel on one architecture.

    ``slots`` for an element; of them ``alu`` and ``kinds``; ``turns`` of shared memory; ``registers`` of the largest
    kernel; ``shared``: bytes of shared memory, of a CUDA block of ``threads``; ``in_flight``: bytes that a warp has
    asked for at a time; ``tensor``: slots for a tensor product.
    """

    work: Work
    architecture: str
    slots: float
    alu: float
    kinds: dict[str, float]
    turns: float
    registers: int
    threads: int
    shared: int
    in_flight: int
    tensor: float
    spilled: int


def count(work: Work, architecture: str) -> Count:
    """Compile a kernel and count.

    Raises:
        LookupError: if its machine code has no path that does the work: the description of the work is wrong.
    """
    launch = work.launch(architecture)
    binary = compile.cubin(launch.text, architecture + ("a" if launch.own_features else ""))
    code = sass.disassemble(binary.code)
    resources = compile.resources(binary.log)
    slots, alu, turns, in_flight, products, spilled = 0.0, 0.0, 0.0, 0, 0.0, 0
    kinds: dict[str, float] = defaultdict(float)
    for phase in work.phases:
        turn, times = _cheapest(code[phase.kernel], phase, f"{work.name} for {architecture}")
        elements = phase.elements * times
        slots += turn.slots / elements
        alu += turn.alu / elements
        for kind, number in turn.kinds().items():
            kinds[kind] += number / elements
        turns += turn.shared_turns / elements
        in_flight = max(in_flight, sass.LANES * turn.loaded_bytes * phase.ahead)
        products += turn.tensor / elements
        spilled += turn.local
    used = [resources[name] for name in dict.fromkeys(phase.kernel for phase in work.phases)]
    return Count(
        work=work,
        architecture=architecture,
        slots=slots,
        alu=alu,
        kinds=dict(kinds),
        turns=turns,
        registers=max(r.registers for r in used),
        threads=launch.block,
        shared=launch.shared + max(r.shared for r in used),
        in_flight=in_flight,
        tensor=slots / products if products else 0.0,
        spilled=spilled,
    )


def _cheapest(blocks: list[sass.Block], phase: Phase, where: str) -> tuple[sass.Turn, int]:
    found: list[tuple[float, sass.Turn, int]] = []
    bodies = [(0, None)] if phase.whole else sass.loops(blocks)
    for times in phase.unrolled:
        asked = {"loads": phase.loads * times, "stores": phase.stores * times, "tensor": phase.tensor * times}
        asked["arithmetic"] = phase.arithmetic * times
        turns = [sass.turn(blocks, body, head, **asked) for head, body in bodies]
        found += [(turn.slots / times, turn, times) for turn in turns if turn is not None]
    if not found:
        raise LookupError(f"{where}: no path of {phase.kernel} does {phase}")
    _, turn, times = min(found, key=lambda one: one[0])
    return turn, times


def figures(counted: Count) -> dict[str, float]:
    """What a test compares with the figures of before."""
    return {"slots": round(counted.slots, 4), "alu": round(counted.alu, 4), "registers": counted.registers}


def update(names: list[str]) -> None:
    """Write the figures of these kernels that ``tests/test_roofline.py`` holds."""
    names = [name for name in names if by_name()[name].runs_on(HELD)]
    found = json.loads(FIGURES.read_text())["kernels"]
    with _processes(len(names)) as pool:
        found |= dict(zip(names, pool.map(held_figures, names), strict=True))
    FIGURES.write_text(json.dumps({"nvrtc": compile.nvrtc_version(), "kernels": found}, indent=1) + "\n")


def held_figures(name: str) -> dict[str, float]:
    """Of a kernel, as they are now."""
    return figures(count(by_name()[name], HELD))


def watch(work: Work) -> Traffic:
    """What the emulator sees of the kernels of ``work``."""
    records: list[Any] = []
    with emulated(check=True, records=records, capability=work.capability()) as launches:
        work.run()
    wanted = {phase.kernel for phase in work.phases}
    return traffic(found for launch, found in zip(launches, records, strict=True) if launch.kernel in wanted)


def row(counted: Count, seen: Traffic, device: Device) -> dict[str, Any]:
    """What the table and JSON say of a kernel on a device."""
    work = counted.work
    bound = bounds(counted, device, seen.conflicts)
    warps = occupancy(device, counted.threads, counted.registers, counted.shared)
    wanted = device.copy * device.latency / device.multiprocessors
    result = {
        "kernel": work.name,
        "device": device.name,
        "architecture": device.architecture,
        "unit": work.unit,
        "slots": round(counted.slots, 4),
        "alu": round(counted.alu, 4),
        "kinds": {kind: round(number, 4) for kind, number in counted.kinds.items()},
        "registers": counted.registers,
        "warps": warps,
        "bytes": round(work.traffic, 4),
        "bytes_in_flight": warps * counted.in_flight,
        "bytes_in_flight_needed": round(wanted),
        "sectors_over_needed": round(seen.excess, 4),
        "bank_turns_over_free": round(seen.conflicts, 4),
        "binds": bound.binds,
        "units_per_second": 1 / bound.seconds,
        "spilled": counted.spilled,
    }
    if work.traffic:
        result["of_copy_bandwidth"] = round(bound.memory / bound.seconds, 4)
    if work.operations:
        result["slots_per_tensor_product"] = round(counted.tensor, 3)
        result["of_tensor_units"] = round(bound.tensor / bound.seconds, 4)
    return result


def bounds(counted: Count, device: Device, conflicts: float = 1.0) -> Limits:
    """The limits of a kernel on a device."""
    work = counted.work
    slower = device.mma_share if work.full_rate else 1.0  # than what limits() takes into account
    return limits(
        device,
        traffic=work.traffic,
        slots=counted.slots,
        alu=counted.alu,
        turns=counted.turns * conflicts + work.read / 4,
        operations=work.operations * slower,
    )


def _share(r: dict[str, Any]) -> float:
    """Of the limit that is meant to bind: a product's is the tensor units, any other's the bandwidth."""
    return float(r.get("of_copy_bandwidth", r.get("of_tensor_units", 0.0)))


def line(counted: Count, seen: Traffic, rows: list[dict[str, Any]]) -> str:
    """What is printed of a kernel on an architecture."""
    work = counted.work
    kinds = ", ".join(f"{kind} {number:.3g}" for kind, number in sorted(counted.kinds.items()))
    devices = "; ".join(
        f"{r['device']} {r['warps']} warps, {r['units_per_second'] / 1e9:,.4g} G/s, {r['binds']} binds, {_share(r):.0%}"
        for r in rows
    )
    return (
        f"{work.name} {counted.architecture}: {counted.slots:.4g} slots per {work.unit} ({kinds}),"
        f" {counted.registers} registers, {work.traffic:.4g} bytes, sectors {seen.excess:.2f},"
        f" banks {seen.conflicts:.2f}; {devices}"
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    heads = (
        "kernel, device, slots, of the ALU, registers, warps, bytes, in flight, sectors, banks, binds, of the limit,"
        " predicted"
    )
    lines = [f"| {heads.replace(', ', ' | ')} |", "| --- | --- |" + " ---: |" * 8 + " --- | ---: | ---: |"]
    for r in rows:
        flight, needed = r["bytes_in_flight"] / 1024, r["bytes_in_flight_needed"] / 1024
        cells = (
            *(r["kernel"], f"{r['device']} ({r['architecture']})", f"{r['slots']:.3g}", f"{r['alu']:.3g}"),
            *(r["registers"], r["warps"], f"{r['bytes']:.4g}", f"{flight:.0f} / {needed:.0f}"),
            *(f"{r['sectors_over_needed']:.2f}", f"{r['bank_turns_over_free']:.2f}", r["binds"], f"{_share(r):.0%}"),
            f"{r['units_per_second'] / 1e9:,.4g} G {r['unit']}s/s",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def examine(name: str, architectures: tuple[str, ...]) -> tuple[list[str], list[dict[str, Any]]]:
    """What is printed of a kernel, and its rows of the table."""
    work = by_name()[name]
    seen, lines, rows = watch(work), [], []
    for architecture in filter(work.runs_on, architectures):
        try:
            counted = count(work, architecture)
        except LookupError as error:  # of a compiler that arranges this loop otherwise
            lines.append(f"{name} {architecture}: not counted; {error}")
            continue
        new = [row(counted, seen, device) for device in DEVICES if device.architecture == architecture]
        lines.append(line(counted, seen, new))
        rows += new
    return lines, rows


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="comma-separated parts of kernels' names")
    parser.add_argument("--architectures", default=",".join(ARCHITECTURES))
    parser.add_argument("--output", type=Path, help="write the table there, as Markdown")
    parser.add_argument("--json", type=Path, help="write every figure there")
    parser.add_argument("--update", action="store_true", help="renew the figures that a test holds; print nothing")
    args = parser.parse_args(arguments)
    names = [name for name in by_name() if any(part in name for part in args.only.split(","))]
    if args.update:
        update(names)
        return 0
    rows = []
    with _processes(len(names)) as pool:
        for lines, new in pool.map(examine, names, repeat(tuple(args.architectures.split(",")))):
            print("\n".join(lines), flush=True)
            rows += new
    print("\n" + table(rows))
    whole = product.report() if any(name.startswith("int8 product") for name in names) else ""
    print("\n" + whole)
    if args.output:
        args.output.write_text(REPORT.format(nvrtc=compile.nvrtc_version(), table=table(rows), product=whole))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
