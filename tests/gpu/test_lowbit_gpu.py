"""Low-bit weights on a GPU: bits against the reference on the CPU, products against float64, streams and graphs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.cuda_waits import no_synchronisation
from torch import Tensor

from lowbit_lightning import kernels
from lowbit_lightning.kernels.cuda import lowbit_product
from lowbit_lightning.kernels.formats import weight_format

pytestmark = pytest.mark.gpu

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = (F32, F16, BF16)
FORMS = ("int8", "nf4", "nf4-dq", "nf4-g4096", "fp4-g32", "int4", "int4-g128", "int3", "int3-g32", "int2", "int2-g256")
TOLERANCE = {F32: 1e-5, F16: 1e-3, BF16: 8e-3}  # cuBLAS sums 11008 products in a row


def assert_same_bits(ours: Tensor, theirs: Tensor) -> None:
    ours = ours.cpu()
    same = (ours == theirs) | (ours.isnan() & theirs.isnan() if ours.is_floating_point() else ours.isnan())
    bad = (~same).nonzero()
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    assert not len(bad), f"first difference at {bad[0].tolist()}: {ours[~same][0]} against {theirs[~same][0]}"


def stored(form: str, outputs: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """packed and scales on the GPU, and the weight in float64 there."""
    weight = torch.randn(outputs, length, generator=torch.Generator().manual_seed(length))
    with kernels.use_backend("reference"):
        packed, scales = kernels.lowbit_quantize(weight, form, "absmax")
        decoded = kernels.lowbit_dequantize(packed, scales, form, length)
    return packed.cuda(), scales.cuda(), decoded.double().cuda()


def error(result: Tensor, expected: Tensor) -> float:
    return float((result.detach().double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantised_dequantised_and_looked_up(form: str, dtype: torch.dtype) -> None:
    fits = ("absmax",) if form == "int8" else ("absmax", "lsq")
    for rows, length in ((5, 1), (7, 333), (64, 1001), (300, 4096)):
        weight = torch.randn(rows, length)
        weight[1], weight[2, length // 2], weight[3, : length // 2] = 0, float("nan"), 1e-30
        weight = weight.to(dtype)
        indices = torch.randint(0, rows, (3, 50))
        for fit in fits:
            with kernels.use_backend("reference"):
                packed, scales = kernels.lowbit_quantize(weight, form, fit)
                decoded = kernels.lowbit_dequantize(packed, scales, form, length, dtype)
            ours = kernels.lowbit_quantize(weight.cuda(), form, fit)
            if fit == "absmax":
                assert_same_bits(ours[0], packed)
                assert_same_bits(ours[1], scales)
            else:  # sums in another order: nearly all codes, and the error
                assert float((ours[0].cpu() != packed).float().mean()) < 0.01
                again = kernels.lowbit_dequantize(*ours, form, length).cpu()
                first, second = (again - weight).nan_to_num().norm(), (decoded.float() - weight).nan_to_num().norm()
                assert torch.allclose(first, second, rtol=5e-3)
            assert_same_bits(kernels.lowbit_dequantize(packed.cuda(), scales.cuda(), form, length, dtype), decoded)
            found = kernels.lowbit_embedding(indices.cuda(), packed.cuda(), scales.cuda(), form, length, dtype)
            assert_same_bits(found, decoded[indices])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_and_gradients(form: str, dtype: torch.dtype) -> None:
    for outputs, length in ((37, 333), (1001, 520), (4096, 4096), (300, 11008)):
        packed, scales, weight = stored(form, outputs, length)
        bias = torch.randn(outputs, device="cuda").to(dtype)
        for rows in (1, 3, 8, 9, 17, 32, 33, 65, 200, 1100):
            x = torch.randn(rows, length, device="cuda").to(dtype).requires_grad_()
            dy = torch.randn(rows, outputs, device="cuda").to(dtype)
            y = kernels.lowbit_matmul(x, packed, scales, bias, form)
            y.backward(dy)
            assert x.grad is not None
            assert error(y, x.double() @ weight.T + bias.double()) < TOLERANCE[dtype], (outputs, length, rows)
            assert error(x.grad, dy.double() @ weight) < TOLERANCE[dtype], (outputs, length, rows)


ENGINES = [(lowbit_product.tensor_row, 1), (lowbit_product.tensor_gemv, 5), (lowbit_product.plain_gemv, 5)]


@pytest.mark.parametrize(("engine", "rows"), ENGINES)
@pytest.mark.parametrize("form", FORMS)
def test_equal_from_run_to_run_and_at_odd_addresses(engine: Callable[..., Tensor], rows: int, form: str) -> None:
    packed, scales, weight = stored(form, 1000, 2048)
    x = torch.randn(rows, 2048, device="cuda", dtype=F16)
    results = [engine(x, packed, scales, None, form) for _ in range(10)]
    assert all(torch.equal(results[0], other) for other in results[1:])
    room = torch.empty(packed.numel() + 1, dtype=torch.uint8, device="cuda")
    room[1:] = packed.flatten()
    again = engine(x, room[1:].view(packed.shape), scales, None, form)
    assert error(again, x.double() @ weight.T) < TOLERANCE[F16]


def test_what_is_not_finite_stays_in_its_row() -> None:
    weight = torch.randn(12, 200, device="cuda")
    weight[2, 150] = float("inf")
    packed, scales = kernels.lowbit_quantize(weight, "nf4")
    for rows in (3, 20, 40):
        for dtype in DTYPES:
            x = torch.randn(rows, 200, device="cuda").to(dtype)
            x[1, 7] = float("nan")
            y = kernels.lowbit_matmul(x, packed, scales, None, "nf4")
            assert y[:, 2].isnan().all()
            assert y[1].isnan().all()
            assert y[0, [0, 1, 3, 11]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_outliers(dtype: torch.dtype) -> None:
    x, weight = torch.randn(64, 1024, device="cuda"), torch.randn(96, 1024, device="cuda")
    x[:, [3, 77, 200, 201, 400, 1023]] *= 60
    x = x.to(dtype)
    packed, scales = kernels.lowbit_quantize(weight, "int8")
    expected = x.double() @ weight.double().T
    assert error(kernels.int8_outlier_matmul(x, packed, scales), expected) < 0.01
    assert error(kernels.int8_outlier_matmul(x, packed, scales, None, 0.0), expected) > 0.015


def everything(x: Tensor, weights: list[tuple[str, Tensor, Tensor]]) -> list[Tensor]:
    results = []
    for form, packed, scales in weights:
        for rows in (1, 8, 20, 40, 200):
            results.append(kernels.lowbit_matmul(x[:rows], packed, scales, None, form))
        if weight_format(form).kind == "int8":
            results.append(kernels.int8_outlier_matmul(x, packed, scales))
        results.append(kernels.lowbit_embedding(torch.arange(4, device="cuda"), packed, scales, form, x.shape[1]))
    return results


def test_nothing_synchronises_and_a_graph_replays() -> None:
    weights = [(form, *stored(form, 256, 512)[:2]) for form in ("int8", "nf4", "int3")]
    for dtype in DTYPES:
        x = torch.randn(200, 512, device="cuda").to(dtype)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            everything(x, weights)  # compiles
        torch.cuda.current_stream().wait_stream(side)
        with no_synchronisation():
            everything(x, weights)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = everything(x, weights)
        x.copy_(torch.randn(200, 512))
        graph.replay()
        for ours, expected in zip(captured, everything(x, weights), strict=True):
            assert torch.equal(ours, expected)


def test_calls_say_cuda() -> None:
    packed, scales, _ = stored("nf4", 64, 128)
    kernels.reset_calls()
    for rows in (1, 9, 3000):
        kernels.lowbit_matmul(torch.randn(rows, 128, device="cuda", dtype=F16), packed, scales, None, "nf4")
    assert kernels.calls() == {
        ("lowbit_gemv", "cuda"): 1,
        ("lowbit_matmul", "cuda"): 2,
        ("lowbit_dequantize", "cuda"): 1,
    }
