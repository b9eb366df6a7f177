"""The roofline tool sees each planted slow-down in its figures, and no kernel gets slower unseen."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import cuda_roofline  # noqa: E402
from emulator import Module  # noqa: E402
from roofline import memory, sass  # noqa: E402
from roofline.devices import DEVICES, limits, occupancy  # noqa: E402

from lowbit_lightning.kernels import compile  # noqa: E402

FIGURES = ROOT / "benchmarks" / "roofline" / "figures.json"

SCALE = """
extern "C" __global__ void scale(const float* x, float* out, int turns, float factor) {
    %(before)s
    for (int turn = 0; turn < turns; ++turn) {
        const int i = (turn * gridDim.x + blockIdx.x) * blockDim.x + threadIdx.x;
        float v = x[%(index)s];
        %(work)s
        out[i] = v * factor;
    }
}
"""


def scale(before: str = "", index: str = "i", work: str = "") -> str:
    return SCALE % {"before": before, "index": index, "work": work}


def turn_of(text: str, architecture: str = "sm_90", arithmetic: int = 0) -> sass.Turn:
    blocks = sass.disassemble(compile.cubin(text, architecture).code)["scale"]
    turns = [
        (found.slots / times, found)
        for times in (1, 2, 4, 8)
        for head, body in sass.loops(blocks)
        if (found := sass.turn(blocks, body, head, loads=4 * times, stores=4 * times, arithmetic=arithmetic * times))
    ]
    return min(turns, key=lambda one: one[0])[1]


def traffic_of(text: str) -> memory.Traffic:
    module = Module(text, check=True)
    x, out = torch.ones(32 * 256), torch.zeros(256)  # which begin a line of the cache
    with module.recorded() as records:
        module.launch("scale", 1, 256, [x, out, 1, 2.0])
    return memory.traffic(records)


def per_element(turn: sass.Turn) -> float:
    return turn.slots / (turn.stored_bytes / 4)


def test_a_turn_of_known_code() -> None:
    """By hand: a loop of a load, a multiplication and a store, with its counter, address and branch."""
    turn = turn_of(scale())
    assert turn.loaded_bytes == turn.stored_bytes
    assert turn.kinds()["float"] == turn.loaded_bytes / 4
    assert turn.kinds()["memory"] >= 2 * turn.loaded_bytes / 4
    assert turn.local == 0


@pytest.mark.parametrize("architecture", ["sm_75", "sm_90", "sm_120"])
def test_more_arithmetic_shows(architecture: str) -> None:
    if architecture == "sm_120" and tuple(map(int, compile.nvrtc_version().split("."))) < (12, 8):
        pytest.skip("NVRTC before 12.8 does not know sm_120")
    plain = turn_of(scale(), architecture)
    more = turn_of(scale(work="v = v * v + factor; v = v * v + factor; v = v * v + factor;"), architecture)
    assert per_element(more) >= per_element(plain) + 3


def test_a_branch_shows() -> None:
    """On the way to a rare case, which itself is not counted."""
    rare = "if (v > 3e38f) { for (int k = 0; k < turns; ++k) v = sqrtf(v) + __sinf(v); }"
    plain, branched = turn_of(scale()), turn_of(scale(work=rare))
    assert per_element(branched) >= per_element(plain) + 2
    assert "MUFU.SIN" not in {i.opcode for i in branched.instructions}


def test_a_path_that_skips_arithmetic_is_not_taken() -> None:
    """It moves the bytes and has fewer slots, but does not do the work."""
    skips = "if (v == 0.0f) { out[i] = v; continue; }" + 12 * "v = v * v + factor;"
    plain, skipping = turn_of(scale(), arithmetic=1), turn_of(scale(work=skips), arithmetic=25)
    assert skipping.arithmetic >= 25 * skipping.stored_bytes / 4
    assert per_element(skipping) >= per_element(plain) + 24 + 1  # and the branch
    assert per_element(turn_of(scale(work=skips))) < per_element(skipping) - 24


def test_a_spill_shows() -> None:
    many = "".join(f"float a{k} = x[{k} * 977 + threadIdx.x];" for k in range(80))
    use = "".join(f"a{k} = a{k} * v + a{(k + 1) % 80}; v += a{k};" for k in range(80))
    text = scale(before=many, work=use).replace("void scale", "void __launch_bounds__(1024, 2) scale")
    blocks = sass.disassemble(compile.cubin(text, "sm_90").code)["scale"]
    head, body = max(sass.loops(blocks), key=lambda loop: len(loop[1]))
    turn = sass.turn(blocks, body, head, loads=4, stores=4)
    assert turn is not None
    assert turn.local > 0


def test_an_uncoalesced_load_shows() -> None:
    plain, strided = traffic_of(scale()), traffic_of(scale(index="i * 32"))
    assert plain.excess == 1.0
    assert strided.sectors == 256 + 256 * 4 // memory.SECTOR  # a sector for each load; the stores are side by side
    assert strided.excess > 4


def test_a_misaligned_load_shows() -> None:
    shifted = traffic_of(scale(index="i + 1"))
    assert shifted.sectors == 8 * 5 + 8 * 4


@pytest.mark.parametrize(("stride", "conflicts"), [(1, 1), (2, 2), (4, 4), (32, 32), (33, 1)])
def test_a_bank_conflict_shows(stride: int, conflicts: int) -> None:
    before = f"__shared__ float bank[256 * 33]; bank[threadIdx.x * {stride}] = factor; __syncthreads();"
    seen = traffic_of(scale(before=before, work=f"v += bank[threadIdx.x * {stride}];"))
    assert seen.conflicts == conflicts


def test_wide_accesses_to_shared_memory_have_no_conflicts() -> None:
    before = "__shared__ float4 bank[256]; bank[threadIdx.x] = make_float4(1, 2, 3, 4); __syncthreads();"
    seen = traffic_of(scale(before=before, work="v += ((float*)bank)[threadIdx.x];"))
    assert seen.turns == seen.free == 8 * (4 + 1)  # a warp's 512 bytes in four turns, its 128 in one


def test_limits_and_occupancy() -> None:
    """By hand, of an H200: 132 multiprocessors at 1.755 GHz, 4.8 TB/s, 65536 registers."""
    device = next(d for d in DEVICES if d.name == "H200")
    found = limits(device, traffic=16.0, slots=119.0, alu=40.0)
    assert found.memory == pytest.approx(16 / 4.32e12)
    assert found.issue == pytest.approx(119 / (132 * 128 * 1.755e9))
    assert found.alu == pytest.approx(40 / (132 * 64 * 1.755e9))
    assert found.binds == "issue"
    assert limits(device, traffic=16.0, slots=60.0, alu=70.0).binds == "alu"
    of_banks = limits(device, traffic=1.0, slots=1.0, alu=1.0, turns=4.0)  # each serves 32 lanes
    assert of_banks.binds == "shared"
    assert of_banks.shared == pytest.approx(4 / (132 * 32 * 1.755e9))
    assert occupancy(device, 256, 77, 1024) == 24  # 80 registers a thread: 25 warps' worth, in blocks of 8
    assert occupancy(device, 256, 32, 0) == 64
    assert occupancy(device, 256, 32, 100 << 10) == 16


QUICK = {"adamw fp32", "lion bf16", "quantize fp32", "int8 product, tiles of 128 x 256"}


@pytest.mark.parametrize("names", [QUICK, pytest.param(set(), marks=pytest.mark.slow)], ids=["quick", "all"])
def test_no_kernel_got_slower(names: set[str]) -> None:
    """Against the figures that are committed. ``make cuda-roofline ARGS=--update`` renews them, when a kernel got
    better or what it costs is worth it."""
    known = json.loads(FIGURES.read_text())
    if known["nvrtc"] != compile.nvrtc_version():
        pytest.skip(f"the figures are of NVRTC {known['nvrtc']}, this one is {compile.nvrtc_version()}")
    found = {name for name, work in cuda_roofline.by_name().items() if work.runs_on(cuda_roofline.HELD)}
    assert found == set(known["kernels"])
    for name in names or found:
        figures = cuda_roofline.held_figures(name)
        assert set(figures) == set(known["kernels"][name])
        for what, value in figures.items():
            assert value <= 1.03 * known["kernels"][name][what], f"{name}: {what}"
