"""Products of groups of rows with weights in low bits: those of each group alone, and of its decoded weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowbit_lightning import kernels
from lowbit_lightning.kernels.lowbit import FEW_ROWS
from lowbit_lightning.layers.experts import GROUPED, LowBitTensor
from lowbit_lightning.layers.lowbit import Weights

ENDS, N, K = [3, 3, 60], 40, 70


def weights(form: str, transposed: bool) -> tuple[Tensor, Tensor, int, Tensor]:
    weight = torch.randn(3, *((K, N) if transposed else (N, K)))
    packed, scales = kernels.lowbit_quantize(weight, form)
    decoded = kernels.lowbit_dequantize(packed, scales, form, weight.shape[-1])
    return packed, scales, weight.shape[-1], decoded.mT if transposed else decoded


def expected(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    parts = [x[a:b] @ weight[e].T + bias[e] for e, (a, b) in enumerate(zip([0, *ENDS], ENDS, strict=False))]
    return torch.cat([*parts, x.new_zeros(len(x) - ENDS[-1], N)])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("form", ["int8", "nf4", "int3"])
def test_products_and_gradients(form: str, transposed: bool) -> None:
    torch.manual_seed(0)
    packed, scales, length, decoded = weights(form, transposed)
    x, bias, offs = torch.randn(64, K, requires_grad=True), torch.randn(3, N, requires_grad=True), torch.tensor(ENDS)
    kernels.reset_calls()
    y = kernels.lowbit_grouped_matmul(x, packed, scales, offs, bias, form, length, transposed)
    counts = {op: n for (op, _), n in kernels.calls().items()}
    assert 0 < ENDS[0] <= FEW_ROWS < ENDS[2] - ENDS[1]
    assert counts == ({"lowbit_matmul_backward": 2} if transposed else {"lowbit_gemv": 1, "lowbit_matmul": 1})
    dy = torch.randn_like(y)
    found = y, *torch.autograd.grad(y, (x, bias), dy, create_graph=True)
    wanted = expected(x, decoded, bias)
    for ours, theirs in zip(found, (wanted, *torch.autograd.grad(wanted, (x, bias), dy)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        alone = kernels.lowbit_grouped_matmul(x, packed, scales, offs, bias, form, length, transposed)
    assert torch.equal(alone, y)


def test_transforms_and_the_compiler() -> None:
    packed, scales, length, decoded = weights("nf4", False)
    offs, bias = torch.tensor(ENDS), torch.randn(3, N)

    def product(x: Tensor) -> Tensor:
        return kernels.lowbit_grouped_matmul(x, packed, scales, offs, bias, "nf4", length)

    x = torch.randn(64, K)
    grad = torch.func.grad(lambda x: product(x).square().sum())(x)
    x.requires_grad_()
    torch.testing.assert_close(grad, *torch.autograd.grad(expected(x, decoded, bias).square().sum(), x))
    compiled = torch.compile(product, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), product(x))
    torch.library.opcheck(
        torch.ops.lowbit_lightning.lowbit_grouped_matmul.default,
        (x, packed, scales, offs, bias, "nf4", length, False),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


@pytest.mark.skipif(not GROUPED, reason="torch has no grouped_mm")
def test_torchs_grouped_mm_takes_experts_in_low_bits() -> None:
    torch.manual_seed(0)
    weight, offs = torch.randn(3, N, K), torch.tensor(ENDS, dtype=torch.int32)
    held = LowBitTensor(nn.Parameter(weight), Weights.of("nf4"))
    x = torch.randn(64, K)
    wanted = expected(x, held.dequantize(), torch.zeros(3, N))
    turned: Any = held.transpose(-2, -1)
    assert (turned.shape, turned.ndim, turned.dtype, turned.device.type) == ((3, K, N), 3, torch.float32, "cpu")
    kernels.reset_calls()
    for grouped in GROUPED:
        for experts in (turned, held.mT):
            torch.testing.assert_close(grouped(x, experts, offs=offs), wanted, rtol=1e-4, atol=1e-4)
    as_lies = GROUPED[-1](torch.randn(64, N), held, offs=offs)
    assert as_lies.shape == (64, K)
    assert {op for op, _ in kernels.calls()} == {"lowbit_gemv", "lowbit_matmul", "lowbit_matmul_backward"}
    assert torch.equal(torch.bmm(torch.ones(3, 1, K), turned), torch.ones(3, 1, K) @ held.dequantize().mT)
    assert torch.equal(turned[1], held.dequantize()[1].T)
    with pytest.raises(ValueError, match="takes offs, and no bias"):
        GROUPED[-1](x, turned, offs=offs, bias=torch.zeros(N))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"offs": torch.tensor([1, 2])}, r"offs \[E\], got \(64, 70\), \(3, 40, "),
        ({"x": torch.randn(64, 71)}, "70 inputs as columns"),
        ({"bias": torch.zeros(3)}, r"bias must be float of shape \[3, 40\]"),
        ({"x": torch.randn(64, K).double()}, "x's dtype must be"),
        ({"offs": torch.tensor([1, 2, 65])}, "at most 64"),
    ],
)
def test_what_is_refused(change: dict[str, Any], says: str) -> None:
    packed, scales, length, _ = weights("nf4", False)
    arguments = {"x": torch.randn(64, K), "offs": torch.tensor(ENDS), "bias": None, **change}
    with pytest.raises((TypeError, ValueError), match=says):
        kernels.lowbit_grouped_matmul(packed=packed, scales=scales, form="nf4", row_length=length, **arguments)
