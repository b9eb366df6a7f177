"""The two forms of a state, and the ways between them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import Parameter

from lowbit_lightning import kernels
from lowbit_lightning.kernels import rules
from lowbit_lightning.kernels.formats import BlockGrid
from lowbit_lightning.kernels.rules import State
from lowbit_lightning.state import blocks
from lowbit_lightning.state.form import StateFormat, fits_grid

SIGNED, UNSIGNED = State("exp_avg"), State("exp_avg_sq", non_negative=True)
shapes = st.lists(st.integers(1, 40), min_size=0, max_size=3).map(tuple)


def form(block_size: int = 256) -> StateFormat:
    return StateFormat.of(rules.get("adamw"), block_size)


@pytest.mark.parametrize("state", [SIGNED, UNSIGNED])
@given(shape=shapes, block_size=st.sampled_from([32, 64, 256]))
@settings(max_examples=20, deadline=None)
def test_new_states_are_exactly_zero(state: State, shape: tuple[int, ...], block_size: int) -> None:
    p = Parameter(torch.randn(shape))
    entries = blocks.create(p, state, 8, block_size)
    codes, scales = entries[f"{state.name}_codes"], entries[f"{state.name}_scales"]
    assert codes.shape == p.shape
    assert tuple(scales.shape) == BlockGrid.of(shape, block_size).scales_shape
    codebook = "dynamic_unsigned" if state.non_negative else "dynamic_signed"
    assert not kernels.dequantize_blockwise(codes, scales + 1, codebook, block_size).any()  # whatever the scale
    zeros = blocks.create(p, state, 32, block_size)
    assert torch.equal(zeros[state.name], torch.zeros(shape))


def test_new_states_may_start_at_a_number() -> None:
    p = Parameter(torch.randn(5, 300))
    entries = blocks.create(p, UNSIGNED, 8, 256, value=0.1)
    decoded = kernels.dequantize_blockwise(
        entries["exp_avg_sq_codes"], entries["exp_avg_sq_scales"], "dynamic_unsigned"
    )
    assert torch.equal(decoded, torch.full((5, 300), 0.1))
    assert torch.equal(blocks.create(p, UNSIGNED, 32, 256, value=0.1)["exp_avg_sq"], decoded)


@pytest.mark.parametrize("state", [SIGNED, UNSIGNED])
@given(shape=shapes, seed=st.integers(0, 10**6), spread=st.sampled_from([0.0, 1.0, 6.0]))
@settings(max_examples=30, deadline=None)
def test_8_to_32_to_8_bits_is_exact(state: State, shape: tuple[int, ...], seed: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.exp(spread * torch.randn(shape, generator=generator))
    p, x = Parameter(torch.empty(shape)), x.abs() if state.non_negative else x
    coded = blocks.convert(p, state, {state.name: x}, None, 8, 32)
    wide = blocks.convert(p, state, coded, form(32), 32, 32)
    again = blocks.convert(p, state, wide, form(32), 8, 32)
    assert wide.keys() == {state.name}
    assert all(torch.equal(coded[name], again[name]) for name in coded)
    assert (wide[state.name] != 0).eq(x != 0).all() or not state.non_negative  # nothing positive was lost


def test_the_wanted_form_is_not_copied() -> None:
    p = Parameter(torch.randn(5, 300))
    coded = blocks.create(p, SIGNED, 8, 256)
    kept = blocks.convert(p, SIGNED, coded, form(), 8, 256)
    assert all(kept[name] is coded[name] for name in coded)
    plain = blocks.create(p, SIGNED, 32, 256)
    assert blocks.convert(p, SIGNED, plain, None, 32, 256)["exp_avg"] is plain["exp_avg"]


def test_states_of_another_map_are_translated() -> None:
    """A checkpoint whose second moment was signed, as an older rule may have had it."""
    x = torch.rand(5, 300)
    p = Parameter(torch.empty(5, 300))
    codes, scales = kernels.quantize_blockwise(x, "dynamic_signed")
    saved = StateFormat({"exp_avg_sq": "dynamic_signed"}, 256)
    entries = {"exp_avg_sq_codes": codes, "exp_avg_sq_scales": scales}
    new = blocks.convert(p, UNSIGNED, entries, saved, 8, 256)
    decoded = kernels.dequantize_blockwise(codes, scales, "dynamic_signed")
    expected = kernels.quantize_blockwise(decoded, "dynamic_unsigned")
    assert torch.equal(new["exp_avg_sq_codes"], expected[0])
    assert torch.equal(new["exp_avg_sq_scales"], expected[1])


@pytest.mark.parametrize(
    ("shape", "min_size", "fits"),
    [
        ((64, 64), 4096, True),
        ((64, 63), 4032, False),
        ((4096,), 4096, True),
        ((4095,), 4096, False),
        ((64, 8, 8), 4096, True),
        ((1, 64), 0, True),
        ((), 0, False),
        ((0, 64), 0, True),
        ((64, 0), 0, False),
    ],
)
def test_what_fits_the_grid(shape: tuple[int, ...], min_size: int, fits: bool) -> None:
    assert fits_grid(shape, min_size) == fits


def test_the_format_survives_a_checkpoint() -> None:
    written = form(64).to_dict()
    assert StateFormat.parse(written) == form(64)
    assert written == {
        "maps": {"exp_avg": "dynamic_signed", "exp_avg_sq": "dynamic_unsigned"},
        "block_size": 64,
        "version": 1,
    }


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_unknown_versions(version: object) -> None:
    with pytest.raises(ValueError, match=r"has format version .*this library reads version 1: update"):
        StateFormat.parse({**form().to_dict(), "version": version})
