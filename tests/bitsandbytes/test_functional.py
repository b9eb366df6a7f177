"""``bitsandbytes.functional``: bits, scales and states of the real one, and both read what the other wrote."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lowbit_lightning.bitsandbytes import functional as F
from lowbit_lightning.kernels.formats import codebook

theirs: Any = pytest.importorskip("bitsandbytes.functional")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_four_bits(quant_type: str, dtype: torch.dtype, nested: bool) -> None:
    for shape, block in (((64, 128), 64), ((64, 128), 32), ((2, 4096), 4096), ((3, 40), 64), ((7,), 64)):
        x = torch.randn(shape).to(dtype)
        codes, state = F.quantize_4bit(x, blocksize=block, quant_type=quant_type, compress_statistics=nested)
        wanted, their = theirs.quantize_4bit(x, blocksize=block, quant_type=quant_type, compress_statistics=nested)
        pairs = x.numel() // 2  # half a byte is left over where the number is odd
        assert codes.shape == wanted.shape
        assert torch.equal(codes[:pairs], wanted[:pairs])
        assert nested or torch.equal(state.absmax, their.absmax)
        if len(shape) < 2 or shape[-1] % block:
            continue  # what bitsandbytes decodes wrongly on CPUs
        mine = F.dequantize_4bit(codes, state)
        assert mine.dtype == dtype
        assert torch.allclose(mine, theirs.dequantize_4bit(wanted, their), rtol=0, atol=0.06 if nested else 0)
        # Each reads what the other wrote.
        read = theirs.dequantize_4bit(codes, theirs.QuantState.from_dict(state.as_dict(packed=True), "cpu"))
        assert torch.equal(read, mine)
        back = F.QuantState.from_dict({f"x.weight.{k}": v for k, v in their.as_dict(packed=True).items()}, "cpu")
        assert torch.equal(F.dequantize_4bit(wanted, back), theirs.dequantize_4bit(wanted, their))


def test_blocks_cross_rows() -> None:
    """Decoded by hand: the kernels have their blocks inside rows."""
    x = torch.randn(3, 40)
    codes, state = F.quantize_4bit(x, quant_type="nf4")
    nibbles = torch.stack([codes.flatten() >> 4, codes.flatten() & 15], 1).flatten()
    values = codebook("nf4")[nibbles.int()] * state.absmax.repeat_interleave(64)[:120]
    assert torch.equal(F.dequantize_4bit(codes, state), values.view(3, 40))
    inputs = torch.randn(5, 40, requires_grad=True)
    y = F.gemv_4bit(inputs, codes.T, state=state)
    assert torch.allclose(y, inputs @ values.view(3, 40).T, atol=1e-5)
    y.sum().backward()
    assert torch.allclose(inputs.grad, values.view(3, 40).sum(0).expand(5, 40), atol=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_storage_is_the_same_bytes(storage: torch.dtype) -> None:
    x = torch.randn(64, 128)
    codes, state = F.quantize_4bit(x, quant_storage=storage)
    plain, same = F.quantize_4bit(x)
    assert codes.dtype == storage
    assert torch.equal(codes.view(torch.uint8).flatten(), plain.flatten())
    assert torch.equal(F.dequantize_4bit(codes, state), F.dequantize_4bit(plain, same))


def test_eight_bits_in_blocks() -> None:
    for code in (None, theirs.create_dynamic_map(signed=False), theirs.create_fp8_map(True, 4, 3, 8)):
        x = torch.rand(33, 50) if code is not None and code.min() == 0 else torch.randn(33, 50)
        codes, state = F.quantize_blockwise(x, code=code, blocksize=64)
        wanted, their = theirs.quantize_blockwise(x, code=code, blocksize=64)
        mine, other = F.dequantize_blockwise(codes, state), theirs.dequantize_blockwise(wanted, their)
        assert (mine - x).norm() <= 1.02 * (other - x).norm()
        read = theirs.dequantize_blockwise(codes, theirs.QuantState(**_fields(state)))
        assert torch.allclose(read, mine, rtol=1e-6, atol=0)
        again, _ = F.quantize_blockwise(mine, code=code, blocksize=64)
        assert torch.equal(again, codes)
    codes, state = F.quantize_blockwise(x, blocksize=256, nested=True)
    assert (F.dequantize_blockwise(codes, state) - x).norm() <= 0.03 * x.norm()


def _fields(state: F.QuantState) -> dict[str, Any]:
    return {"absmax": state.absmax, "code": state.code, "blocksize": state.blocksize, "dtype": state.dtype}


@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_int8(threshold: float) -> None:
    x = torch.randn(17, 40).half()
    mine, other = F.int8_vectorwise_quant(x, threshold), theirs.int8_vectorwise_quant(x, threshold)
    assert all(torch.equal(a, b) for a, b in zip(mine[:2], other[:2], strict=True))
    assert mine[2] is other[2] is None or torch.equal(mine[2], other[2])  # type: ignore[arg-type]
    assert torch.allclose(F.int8_vectorwise_dequant(*mine[:2]), theirs.int8_vectorwise_dequant(*mine[:2]))
    large = torch.full((2, 8), 1e6)  # beyond float16, through which bitsandbytes goes
    codes, stats, _ = F.int8_vectorwise_quant(large)
    assert torch.allclose(F.int8_vectorwise_dequant(codes, stats), large)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        *(("create_dynamic_map", a) for a in ((True,), (False,), (True, 3, 8), (True, 5, 5))),
        *(("create_linear_map", a) for a in ((True,), (False,), (True, 4), (False, 8, False))),
        *(("create_fp8_map", a) for a in ((True, 5, 2), (True, 2, 5), (True, 2, 1, 4))),
        *(("create_normal_map", a) for a in ((), (0.9677083, False))),
    ],
)
def test_maps(name: str, arguments: tuple) -> None:
    assert torch.allclose(getattr(F, name)(*arguments), getattr(theirs, name)(*arguments), atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: F.quantize_4bit(x, quant_type="int4"), "quant_type must be 'nf4' or 'fp4', got 'int4'"),
        (lambda x: F.quantize_4bit(x, blocksize=48), "block_size must be .* got 48"),
        (lambda x: F.quantize_4bit(x.int()), r"A must be float32, .* got torch\.int32"),
        (lambda x: F.quantize_blockwise(x.int()), "A must be float32"),
        (lambda x: F.dequantize_blockwise(x), "needs quant_state or absmax"),
        (lambda x: F.dequantize_4bit(x), "needs quant_state, or absmax and out"),
        (lambda x: F.QuantState.from_dict({"absmax": x}, "cpu"), r"\['blocksize', .*\] are missing"),
        (lambda x: F.int8_double_quant(x, out_row=x), "must be None"),
    ],
)
def test_errors(call: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call(torch.randn(8, 64))
