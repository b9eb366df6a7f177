"""Hopper's int8 product in the emulator: equal to NumPy to the bit, and what decides that it is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from emulator import EmulatorError, Module
from emulator.backend import emulated
from kernels.test_int8_product import assert_same, expected_product, operands
from torch import Tensor

from lowbit_lightning import kernels
from lowbit_lightning.kernels import compile
from lowbit_lightning.kernels.cuda import fastest, int8_product, int8_wgmma, launch
from lowbit_lightning.kernels.cuda.int8_wgmma import TILES, is_right, text_of, wgmma_product

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
HOPPER = (9, 0)
# Less than a fragment, K not in multiples of 16, several tiles and steps of the ring, more row tiles than a band,
# nothing to sum.
SHAPES = [
    *((1, 1, 1), (5, 3, 7), (20, 24, 0), (0, 4, 8), (4, 0, 8), (130, 72, 700), (200, 300, 130)),
    *((128, 128, 128), (129, 129, 129), (2180, 40, 16)),
]


@pytest.mark.parametrize("order", ["forward", "backward", "random"])
def test_any_shape(order: str) -> None:
    for shape in SHAPES[: None if order == "random" else -1]:
        of = operands(*shape, BF16)
        with emulated(capability=HOPPER, order=order) as launches:
            result = wgmma_product(*of, BF16, tile=(128, 128))
        assert_same(result, expected_product(of, BF16), shape)
        assert len(launches) == (shape[0] * shape[1] > 0)


@pytest.mark.slow
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("bias", [None, F32, F16, BF16], ids=str)
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_every_form(dtype: torch.dtype, bias: torch.dtype | None, tile: tuple[int, int]) -> None:
    for check in (False, True):
        for shape in SHAPES:
            of = operands(*shape, bias)
            with emulated(capability=HOPPER, check=check, order="random"):
                assert_same(wgmma_product(*of, dtype, tile=tile), expected_product(of, dtype), (shape, check))


# -- planted defects --------------------------------------------------------------------------------------------------

DEFECTS = {  # which are switched on one by one: no text is compiled twice
    "wait_for_all_but<AHEAD - 1>();": "if (defect == 1) wait_for_all_but<AHEAD>(); else wait_for_all_but<AHEAD - 1>();",
    "share_with_products();": "if (defect != 2) share_with_products();",
    "__syncthreads();": "if (defect != 3) __syncthreads();",
    "order_sums();": "if (defect != 4) order_sums();",
    "close_products();": "if (defect != 5) close_products();",
    "wait_for_products_but<1>();": "if (defect != 6) wait_for_products_but<1>();",
    "wait_for_sums(sums);": "if (defect == 7) wait_for_products_but<1>(); else wait_for_sums(sums);",
    "full = 0, empty = AHEAD;": "full = 0, empty = defect == 8 ? 1 : AHEAD;",
    "r * LINE + (c ^ r % 8) * 16": "r * LINE + (c ^ (defect == 9 ? 0 : r % 8)) * 16",
    "(uint64_t)1 << 16 | TO_NEXT_8_ROWS << 32": "(uint64_t)1 << 16 | TO_NEXT_8_ROWS / (defect == 10 ? 2 : 1) << 32",
    "-shared_address(unaligned) & (8 * LINE - 1)": "defect == 11 ? 0 : -shared_address(unaligned) & (8 * LINE - 1)",
    "tile.column + dealt(row)": "tile.column + (defect == 12 ? row : dealt(row))",
    "threadIdx.x >= COPYING": "threadIdx.x >= (defect == 13 ? THREADS : COPYING)",
}
Planted = Callable[[int], None]


@pytest.fixture(scope="module")
def planted() -> Planted:
    """Runs the kernel with a defect, or with none (0), in check mode, and compares its result."""
    text = text_of(F32, F32, (192, 256))
    for right, wrong in DEFECTS.items():
        assert right in text, right
        head, _, tail = text.rpartition(right)  # where it is used, not where it is defined
        text = head + wrong + tail
    text = "static int defect;\n" + text
    text += 'extern "C" __global__ void plant(int number) { defect = number; }\n'
    module, of = Module(text, check=True), operands(250, 132, 800)
    expected = expected_product(of, F32)

    def run(defect: int) -> None:
        out, shared = torch.zeros(250, 132), int8_wgmma.shared_bytes((192, 256))
        module.launch("plant", 1, 1, [defect])
        arguments = [*of[:2], 250, 132, 800, *of[2:], out]
        module.launch("int8_product_wgmma", 2, 384, arguments, shared=shared, most_shared=227 << 10)
        assert_same(out, expected)

    return run


def test_the_largest_tile_makes_no_mistake_that_check_mode_sees(planted: Planted) -> None:
    planted(0)


@pytest.mark.parametrize("defect", range(1, len(DEFECTS) + 1), ids=list(DEFECTS))
def test_a_planted_defect_is_found(planted: Planted, defect: int) -> None:
    with pytest.raises((EmulatorError, AssertionError)):
        planted(defect)


# -- machine code -----------------------------------------------------------------------------------------------------


@pytest.mark.timeout(120)
@pytest.mark.parametrize("tile", [(192, 256), pytest.param((128, 256), marks=pytest.mark.slow)])
def test_products_run_beside_each_other(tile: tuple[int, int]) -> None:
    """The compiler makes one instruction of a product, and warns if it has to wait for each. Nothing spills."""
    made = compile.cubin(text_of(BF16, F32, tile), "sm_90a")
    (used,) = compile.resources(made.log).values()
    assert "warning" not in made.log
    assert used.registers * tile[0] * 2 <= 65536
    assert (used.spill_stores, used.spill_loads, used.stack) == (0, 0, 0)


def test_other_architectures_refuse_the_text() -> None:
    with pytest.raises(compile.CompileError, match="wgmma"):
        compile.cubin(text_of(BF16, F32, (128, 128)), "sm_90")


# -- what decides ------------------------------------------------------------------------------------------------------


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A GPU on which kernels take the milliseconds that the dictionary gives; without the check of wgmma."""
    times: dict[str, Any] = {}

    def milliseconds(call: Callable[[], Tensor], device: torch.device) -> float:
        with emulated(capability=HOPPER) as launches:
            call()
        threads = {one.kernel: one.block for one in launches}
        times["measured"] = times.get("measured", 0) + 1
        return float(next(times[kernel] for kernel in threads if kernel in times))

    monkeypatch.setattr(launch, "milliseconds", milliseconds)
    monkeypatch.setattr(int8_wgmma, "TILES", ((128, 128),))
    monkeypatch.setattr(int8_product, "fastest", fastest.Fastest())
    monkeypatch.setattr(int8_wgmma, "is_right", lambda device, other: True)
    return times


@pytest.fixture
def check(hopper: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The same, with the check."""
    monkeypatch.setattr(int8_wgmma, "is_right", is_right)
    is_right.cache_clear()
    yield hopper
    is_right.cache_clear()


@pytest.mark.parametrize("best", ["int8_product", "scale_sums", "int8_product_wgmma"])
def test_the_fastest_is_measured_once_for_each_kind(hopper: dict[str, Any], best: str) -> None:
    hopper |= dict.fromkeys(("int8_product", "scale_sums", "int8_product_wgmma"), 2.0) | {best: 1.0}
    once = 3 * fastest.ROUNDS
    for rows, measured in ((20, once), (30, once), (33, 2 * once)):
        of = operands(rows, 16, 40)
        with emulated(capability=HOPPER) as launches:
            assert_same(kernels.int8_matmul(*of), expected_product(of, F32))
        assert launches[-1].kernel == best
        assert hopper["measured"] == measured
    names = {"int8_product": "mma.sync", "scale_sums": "cuBLASLt", "int8_product_wgmma": "wgmma 128 x 128"}
    assert engine(HOPPER) == f"{names[best]} (for 64 x 16 x 40)"


def engine(capability: tuple[int, int]) -> str:
    """What ``lowbit doctor`` shows."""
    with emulated(capability=capability):
        return int8_product.engines(torch.device("cpu"))["int8_matmul"]


def test_the_engine_is_named(hopper: dict[str, Any]) -> None:
    assert engine(HOPPER).startswith("the fastest of mma.sync, cuBLASLt and wgmma")
    assert [engine(capability) for capability in ((7, 5), (8, 0), (12, 0))] == ["cuBLASLt", "mma.sync", "mma.sync"]


def test_a_wrong_result_is_warned_of_once(check: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    check |= {"int8_product": 2.0, "scale_sums": 1.0, "int8_product_wgmma": 0.1}
    wrong = {"wgmma 128 x 128": lambda *arguments: wgmma_product(*arguments) + 1}
    monkeypatch.setattr(int8_wgmma, "engines", lambda: wrong)
    of = operands(20, 16, 40)
    with emulated(capability=HOPPER) as launches, pytest.warns(match=r"not used.*wgmma 128 x 128"):
        kernels.int8_matmul(*of)
    assert launches[-1].kernel == "scale_sums"
    with emulated(capability=HOPPER) as launches:  # warnings are errors here
        kernels.int8_matmul(*operands(20, 16, 56))
    assert launches[-1].kernel == "scale_sums"


def test_a_kernel_that_does_not_start_is_not_used(check: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: Any) -> Tensor:
        raise RuntimeError("CUDA kernel 'int8_product_wgmma' did not start")

    monkeypatch.setattr(int8_wgmma, "engines", lambda: {"wgmma": refused})
    with emulated(capability=HOPPER), pytest.warns(match="did not start"):
        assert not is_right(torch.device("cpu"), int8_product.fused_product)


def test_nothing_is_measured_while_a_graph_is_captured(hopper: dict[str, Any]) -> None:
    hopper |= {"int8_product": 3.0, "scale_sums": 2.0, "int8_product_wgmma": 1.0}
    of = operands(20, 16, 40)
    with emulated(capability=HOPPER, capturing=True) as launches:
        kernels.int8_matmul(*of)
    assert [one.kernel for one in launches] == ["int8_product"]  # by the estimate
    with emulated(capability=HOPPER):
        kernels.int8_matmul(*of)
    with emulated(capability=HOPPER, capturing=True) as launches:
        kernels.int8_matmul(*of)
    assert [one.kernel for one in launches] == ["int8_product_wgmma"]  # as measured


@pytest.mark.parametrize(("capability", "value"), [((8, 0), "1"), ((10, 0), "1"), (HOPPER, "0")])
def test_where_it_does_not_exist(capability: tuple[int, int], value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(int8_wgmma.OFF, value)
    with emulated(capability=capability):
        assert not int8_wgmma.exists(torch.device("cpu"))
