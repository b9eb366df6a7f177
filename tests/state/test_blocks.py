"""The two forms of a state, and the ways between them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowbit_lightning import kernels
from lowbit_lightning.kernels import rules
from lowbit_lightning.kernels.formats import BlockGrid, dynamic_map
from lowbit_lightning.state import blocks
from lowbit_lightning.state.form import Form, StateFormat, fits_grid

NAMES = ["exp_avg", "exp_avg_sq"]
RULE = rules.get("adamw")
CPU = torch.device("cpu")
shapes = st.lists(st.integers(1, 40), min_size=0, max_size=3).map(tuple)


def format_of(block_size: int = 256) -> StateFormat:
    return StateFormat.of(RULE, block_size)


def form(bits: int = 8, block_size: int = 256, initial: float = 0.0) -> Form:
    return Form(RULE, (bits, bits), block_size, initial)


def created(form: Form, shape: tuple[int, ...]) -> dict[str, Tensor]:
    return {entry.name: blocks.filled(entry, CPU) for entry in form.entries(shape) if entry.name != "step"}


def codings(block_size: int) -> dict[str, tuple[str, int]]:
    return {state.name: (state.codebook, block_size) for state in RULE.states}


def decoded(entries: dict[str, Tensor], name: str, block_size: int = 256) -> Tensor:
    codebook = format_of().maps[name]
    return kernels.dequantize_blockwise(entries[f"{name}_codes"], entries[f"{name}_scales"], codebook, block_size)


@given(shape=shapes, block_size=st.sampled_from([32, 64, 256]))
@settings(max_examples=20, deadline=None)
def test_new_states_are_exactly_zero(shape: tuple[int, ...], block_size: int) -> None:
    entries, zeros = created(form(8, block_size), shape), created(form(32), shape)
    for name in NAMES:
        assert entries[f"{name}_codes"].shape == shape
        assert tuple(entries[f"{name}_scales"].shape) == BlockGrid.of(shape, block_size).scales_shape
        entries[f"{name}_scales"] += 1
        assert not decoded(entries, name, block_size).any()  # whatever the scale
        assert torch.equal(zeros[name], torch.zeros(shape))


def test_new_states_may_start_at_a_number() -> None:
    entries = created(form(8, initial=0.1), (5, 300))
    assert torch.equal(decoded(entries, "exp_avg_sq"), torch.full((5, 300), 0.1))
    assert torch.equal(created(form(32, initial=0.1), (5, 300))["exp_avg_sq"], decoded(entries, "exp_avg_sq"))


@given(shape=shapes, seed=st.integers(0, 10**6), spread=st.sampled_from([0.0, 1.0, 6.0]))
@settings(max_examples=30, deadline=None)
def test_8_to_32_to_8_bits_is_exact(shape: tuple[int, ...], seed: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.exp(spread * torch.randn(shape, generator=generator))
    coded = blocks.convert({"exp_avg": x, "exp_avg_sq": x.abs()}, {}, form(8, 32), CPU)
    wide = blocks.convert(coded, codings(32), form(32), CPU)
    again = blocks.convert(wide, {}, form(8, 32), CPU)
    assert wide.keys() == set(NAMES)
    assert coded.keys() == again.keys()
    assert all(torch.equal(coded[name], again[name]) for name in coded)
    assert (wide["exp_avg_sq"] != 0).eq(x != 0).all()  # nothing positive was lost


def test_the_wanted_form_is_not_copied() -> None:
    for bits in (8, 32):
        entries = created(form(bits), (5, 300))
        kept = blocks.convert(entries, codings(256) if bits == 8 else {}, form(bits), CPU)
        assert kept.keys() == entries.keys()
        assert all(kept[name] is entries[name] for name in entries)


def test_states_of_another_map_are_translated() -> None:
    """A checkpoint whose second moment was signed, as an older rule may have had it."""
    x = torch.rand(5, 300)
    codes, scales = kernels.quantize_blockwise(x, "dynamic_signed")
    entries = {"exp_avg": x, "exp_avg_sq_codes": codes, "exp_avg_sq_scales": scales}
    new = blocks.convert(entries, {"exp_avg_sq": ("dynamic_signed", 256)}, form(), CPU)
    values = kernels.dequantize_blockwise(codes, scales, "dynamic_signed")
    expected = kernels.quantize_blockwise(values, "dynamic_unsigned")
    assert torch.equal(new["exp_avg_sq_codes"], expected[0])
    assert torch.equal(new["exp_avg_sq_scales"], expected[1])


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_states_of_an_element_are_encoded_together(bad: float) -> None:
    """Where one state is not finite all become 0, those in 32 bits and those that were coded already too; the other
    elements are encoded as if that one had been 0."""
    rule = rules.get("ademamix")
    names = [state.name for state in rule.states]
    asked = Form(rule, tuple(32 if state.slow else 8 for state in rule.states), 32)
    values = {name: torch.rand(3, 200) for name in names}
    for lost in names:
        plain = {name: x.clone() for name, x in values.items()}
        plain[lost][1, 7] = bad
        zeroed = {name: x.clone() for name, x in values.items()}
        for x in zeroed.values():
            x[1, 7] = 0.0
        coded_already = "exp_avg" if lost != "exp_avg" else "exp_avg_sq"
        codebook = next(state.codebook for state in rule.states if state.name == coded_already)
        for coded in ((), (coded_already,)):
            entries, expected = dict(plain), dict(zeroed)
            for name in coded:
                codes, scales = kernels.quantize_blockwise(entries.pop(name), codebook, 32)
                entries |= {f"{name}_codes": codes, f"{name}_scales": scales}
                expected.pop(name)
                codes = codes.clone()
                codes[1, 7] = dynamic_map(codebook).zero_code
                expected |= {f"{name}_codes": codes, f"{name}_scales": scales}
            found = blocks.convert(entries, dict.fromkeys(coded, (codebook, 32)), asked, CPU)
            wanted = blocks.convert(expected, dict.fromkeys(coded, (codebook, 32)), asked, CPU)
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)
            assert float(found["exp_avg_slow"][1, 7]) == 0
            wide = blocks.convert(plain, {}, Form(rule, (32,) * 3, 32), CPU)
            assert all(wide[name] is plain[name] for name in names)  # in 32 bits an overflow stays, as in torch


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
    written = format_of(64).to_dict()
    assert StateFormat.parse(written) == format_of(64)
    assert written == {
        "maps": {"exp_avg": "dynamic_signed", "exp_avg_sq": "dynamic_unsigned"},
        "block_size": 64,
        "version": 1,
    }


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_unknown_versions(version: object) -> None:
    with pytest.raises(ValueError, match=r"has format version .*this library reads version 1: update"):
        StateFormat.parse({**format_of().to_dict(), "version": version})
