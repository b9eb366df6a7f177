"""Parameters gathered as int8: the bytes, the error, and that training is not hurt."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.run_program import run

from lowbit_lightning.strategies import ShardedStrategy
from lowbit_lightning.strategies.gather import Int8Rows


@given(st.integers(1, 40), st.integers(16, 70), st.integers(1, 5), st.sampled_from([torch.float32, torch.bfloat16]))
def test_what_is_packed_comes_back(rows: int, length: int, ranks: int, dtype: torch.dtype) -> None:
    x = torch.randn(rows, length, generator=torch.Generator().manual_seed(rows * length))
    form = Int8Rows(rows, length)
    pieces = list(x.chunk(ranks)) + [x[:0]] * ranks  # a rank may hold no row
    packed = [form.pack(piece, ranks) for piece in pieces[:ranks]]
    assert len({len(p) for p in packed}) == 1
    out = torch.full((ranks * -(-rows // ranks), length), float("nan"), dtype=dtype)
    form.unpack(torch.cat(packed), ranks, out)
    scales = np.abs(x.double().numpy()).max(1, keepdims=True) / 127
    expected = torch.from_numpy(np.rint(x.double().numpy() / scales) * scales)
    # A quotient may round the other way in float32: then the two are a step apart.
    error = (out[:rows].double() - expected).abs() / torch.from_numpy(scales)
    rounding = 2.0**-8 * 127 if dtype is torch.bfloat16 else 1e-4
    assert (error < rounding).float().mean() > 0.99
    assert float(error.max()) < 1 + rounding


def test_rounding_twice_changes_nothing() -> None:
    x, form = torch.randn(12, 300), Int8Rows(12, 300)
    once, twice = torch.empty(12, 300), torch.empty(12, 300)
    form.unpack(form.pack(x, 1), 1, once)
    form.unpack(form.pack(once, 1), 1, twice)
    torch.testing.assert_close(once, twice, rtol=2.0**-22, atol=0)


def test_two_ranks(tmp_path: Path) -> None:
    run("int8_gather.py", tmp_path)
    (high, high_bytes, exact), (int8, int8_bytes, error) = json.loads((tmp_path / "result.json").read_text()).values()
    assert exact == 0
    assert 0.9 < error <= 1.001
    assert int8_bytes < 0.27 * high_bytes
    assert int8[0] != high[0]
    assert high[-1] < 0.9 * high[0]
    assert sum(int8[-10:]) == pytest.approx(sum(high[-10:]), rel=0.01)


def test_unknown_form_is_refused() -> None:
    with pytest.raises(ValueError, match="all_gather must be 'high' or 'int8', got 'int4'"):
        ShardedStrategy(all_gather="int4")  # type: ignore[arg-type]
