"""The codebooks and the block grid, against their definitions."""

from __future__ import annotations

from math import ceil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit_lightning.kernels import formats
from lowbit_lightning.kernels.formats import BlockGrid


def defined_dynamic_map(signed: bool) -> np.ndarray:
    """The map as Dettmers et al. define it: middles of equal steps in seven decades, in float64."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = np.linspace(0.1, 1, 2 ** (decade + (0 if signed else 1)) + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)
        values += [*middles, *(-middles if signed else [])]
    return np.sort(np.array(values))


@pytest.mark.parametrize("name", formats.MAPS)
def test_dynamic_maps_are_the_published_ones(name: str) -> None:
    expected = defined_dynamic_map(name == "dynamic_signed")
    values = formats.codebook(name).double().numpy()
    assert values.shape == (256,)
    np.testing.assert_allclose(values, expected, rtol=1e-6, atol=0)
    assert values[formats.dynamic_map(name).zero_code] == 0
    assert values[255] == 1


@pytest.mark.parametrize("name", ["linear", "linear_unsigned", "nf4", "fp4", "nf2", *formats.MAPS])
def test_codebooks_are_valid(name: str) -> None:
    formats.check_codebook(formats.codebook(name))


def test_unknown_codebook_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"codebook must be one of .*'dynamic_signed'.* got 'int3'"):
        formats.codebook("int3")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.tensor([0.0, 1.0], dtype=torch.float64), "float32 vector"),
        (torch.tensor([1.0]), "2 to 256"),
        (torch.linspace(0, 1, 257), "2 to 256"),
        (torch.tensor([0.5, 0.0, 1.0]), "ascending"),
        (torch.tensor([0.0, 0.0, 1.0]), "ascending"),
        (torch.tensor([0.0, float("nan"), 1.0]), "finite"),
        (torch.tensor([0.0, 0.5]), "end at 1.0"),
        (torch.tensor([-2.0, 1.0]), "end at 1.0"),
    ],
)
def test_bad_codebooks_are_refused(values: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        formats.check_codebook(values)


@pytest.mark.parametrize("block_size", [7, 0, -256, 16, 8192, 100])
def test_bad_block_sizes_are_refused(block_size: int) -> None:
    with pytest.raises(ValueError, match=rf"power of two from 32 to 4096, got {block_size}"):
        formats.check_block_size(block_size)


@given(st.lists(st.integers(0, 40), max_size=4), st.sampled_from([32, 64, 256]), st.data())
def test_cutting_rows_never_cuts_a_block(shape: list[int], block_size: int, data: st.DataObject) -> None:
    grid = BlockGrid.of(tuple(shape), block_size)
    assert grid.rows * grid.row_length == np.prod(shape, dtype=int)
    assert grid.scales_shape == (grid.rows, ceil(grid.row_length / block_size))
    if len(shape) >= 2:
        cut = data.draw(st.integers(0, shape[0]))
        parts = [BlockGrid.of((rows, *shape[1:]), block_size) for rows in (cut, shape[0] - cut)]
        assert sum(part.rows for part in parts) == grid.rows
        assert {part.blocks_per_row for part in parts} == {grid.blocks_per_row}
