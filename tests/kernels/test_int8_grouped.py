"""Int8 matrices in groups of rows: equal to the bit to the ops for one matrix, group by group, on every backend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from emulator.backend import emulated
from support.int8_oracle import BACKENDS, assert_same
from torch import Tensor

from lowbit_lightning import kernels
from lowbit_lightning.kernels import int8_grouped

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Groups of several tiles, of one row, empty ones first, in the middle and last; rows of no group behind them
ENDS = ([130, 131, 131, 195], [0, 3, 3, 20], [70], [5, 5, 5, 5])
SIZES = ((70, 33), (64, 128), (1, 5))


def groups(ends: list[int]) -> Iterator[tuple[int, slice]]:
    return enumerate(slice(*pair) for pair in zip([0, *ends], ends, strict=False))


def on(backend: str) -> AbstractContextManager[Any]:
    return emulated() if backend == "cuda" else kernels.use_backend(backend)


@pytest.mark.parametrize("backend", [*BACKENDS, "cuda"])
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("seed", [None, 2**63 - 2])
def test_quantised_groups(seed: int | None, dtype: torch.dtype, backend: str) -> None:
    for ends in ENDS[1:2] if backend == "cuda" else ENDS:
        x = torch.randn(ends[-1] + 7, 70).to(dtype)
        x[2, 3] = float("nan")
        offs = torch.tensor(ends, dtype=torch.int32)
        with on(backend):
            q, scales, columns, column_scales = kernels.quantize_groups(x, offs, seed)
            alone = kernels.quantize_group_columns(x, offs, seed)
        for e, rows in groups(ends):
            own = None if seed is None else seed + e
            with kernels.use_backend("reference"):
                wanted = kernels.quantize_both(x[rows], own)
            transposed = columns[rows].view(70, len(x[rows]))
            for found, expected in zip((q[rows], scales[rows], transposed, column_scales[e]), wanted, strict=True):
                assert_same(found, expected)
        assert not q[ends[-1] :].any()
        assert not scales[ends[-1] :].any()
        assert_same(alone[0], columns)
        assert_same(alone[1], column_scales)


@pytest.mark.parametrize("backend", [*BACKENDS, "cuda"])
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_products(dtype: torch.dtype, backend: str) -> None:
    for ends in ENDS[1:2] if backend == "cuda" else ENDS:
        for n, k in SIZES[:1] if backend == "cuda" else SIZES:
            rows, offs = ends[-1] + 4, torch.tensor(ends)
            a, b, dy = (
                torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((rows, k), (len(ends), n, k), (rows, n))
            )
            of_rows, of_n, of_k = torch.rand(rows), torch.rand(len(ends), n), torch.rand(len(ends), k)
            of_n[0, 0] = float("nan")
            bias = torch.randn(len(ends), n).to(dtype)
            with on(backend):
                y = kernels.int8_grouped_matmul(a, b, of_rows, of_n, offs, bias, dtype)
                plain = kernels.int8_grouped_matmul(a, b, of_rows, of_n, offs)
                dw = kernels.int8_grouped_outer(dy, a, of_n, of_k, offs, dtype)
            with kernels.use_backend("reference"):
                for e, own in groups(ends):
                    product = (a[own], b[e], of_rows[own], of_n[e])
                    assert_same(y[own], kernels.int8_matmul(*product, bias[e], dtype))
                    assert_same(plain[own], kernels.int8_matmul(*product))
                    columns = dy[own].view(n, len(a[own])), a[own].reshape(k, len(a[own]))
                    assert_same(dw[e], kernels.int8_matmul(*columns, of_n[e], of_k[e], None, dtype))
            assert not y[ends[-1] :].any()


def test_an_op_is_one_call_for_all_groups() -> None:
    x, offs = torch.randn(40, 32), torch.tensor([10, 40])
    kernels.reset_calls()
    with kernels.use_backend("reference"):
        q, scales, columns, column_scales = kernels.quantize_groups(x, offs)
        weights, weight_scales = q[:20].view(2, 10, 32), scales[:20].view(2, 10)
        kernels.int8_grouped_matmul(q, weights, scales, weight_scales, offs)
        kernels.int8_grouped_outer(columns, columns, column_scales, column_scales, offs)
    assert kernels.calls() == {
        (op, "reference"): 1 for op in ("quantize_groups", "int8_grouped_matmul", "int8_grouped_outer")
    }


def test_groups_beyond_what_an_int32_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_grouped, "LONGEST_INT8_SUM", 20)
    x, offs = torch.randn(50, 8), torch.tensor([30, 50])
    columns, scales = kernels.quantize_group_columns(x, offs)
    found = kernels.int8_grouped_outer(columns, columns, scales, scales, offs)
    monkeypatch.undo()
    assert_same(found, kernels.int8_grouped_outer(columns, columns, scales, scales, offs))


def arguments(**changes: Any) -> dict[str, Any]:
    a, b = torch.zeros(6, 4, dtype=torch.int8), torch.zeros(2, 3, 4, dtype=torch.int8)
    of = {"a_scales": torch.zeros(6), "b_scales": torch.zeros(2, 3), "offs": torch.tensor([2, 6])}
    return {"a": a, "b": b, **of, **changes}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"offs": torch.tensor([3, 2])}, r"offs must ascend from 0 to at most 6, the number of rows, got \[3, 2\]"),
        ({"offs": torch.tensor([3, 7])}, "at most 6"),
        ({"offs": torch.tensor([-1, 6])}, "must ascend from 0"),
        ({"offs": torch.tensor([1.0, 2.0])}, "offs must be an int32 or int64 vector, got torch.float32"),
        ({"offs": torch.tensor([6])}, r"b must be int8 of shape \[1, 3, 4\], got torch.int8 of \(2, 3, 4\)"),
        ({"a": torch.zeros(6, 4)}, r"a must be int8 of shape \[6, 4\], got torch.float32"),
        ({"b": torch.zeros(3, 4, dtype=torch.int8)}, r"must be \[S, K\] and \[E, N, K\], got \(6, 4\) and \(3, 4\)"),
        ({"b_scales": torch.zeros(2)}, r"b_scales must be float32 of shape \[2, 3\]"),
        ({"bias": torch.zeros(3)}, r"bias must be float of shape \[2, 3\]"),
        ({"out_dtype": torch.float64}, "out_dtype must be torch.float32, torch.float16 or torch.bfloat16"),
        ({"b_scales": torch.zeros(2, 3, device="meta")}, "b_scales is on meta but a on cpu"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises((TypeError, ValueError), match=says):
        kernels.int8_grouped_matmul(**arguments(**changes))


def test_too_many_columns_are_refused() -> None:
    a, b = torch.zeros(1, 131_072, dtype=torch.int8), torch.zeros(1, 1, 131_072, dtype=torch.int8)
    with pytest.raises(ValueError, match="at most 131071 columns, whose products an int32 holds, got 131072"):
        kernels.int8_grouped_matmul(a, b, torch.ones(1), torch.ones(1, 1), torch.tensor([1]))
    with pytest.raises(TypeError, match="x must be a float32, float16 or bfloat16 matrix, got"):
        kernels.quantize_groups(a, torch.tensor([1]))


def test_inputs_as_they_lie() -> None:
    """Not contiguous, and views that begin anywhere."""
    x, offs = torch.randn(70, 40), torch.tensor([20, 40])
    q, scales, *_ = kernels.quantize_groups(x.T, offs)
    assert_same(q, kernels.quantize_rowwise(x.T.contiguous())[0])
    b: Tensor = torch.randint(-128, 128, (70, 30, 2), dtype=torch.int8).permute(2, 1, 0)
    y = kernels.int8_grouped_matmul(q, b, scales, torch.ones(2, 30), offs)
    assert_same(y[20:], kernels.int8_matmul(q[20:], b[1].contiguous(), scales[20:], torch.ones(30)))
