"""Grids: the patches of the formula in lexicographic order, padded as numpy pads; and templates."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import zpatch as zp
from zpatch.errors import OptionError, PatchOverlapError, PatchSizeError

KINDS: dict[str, type[zp.Image]] = {"t1": zp.ScalarImage, "seg": zp.LabelMap, "where": zp.SamplingMap}


def in_memory(**arrays: Any) -> zp.Subject:
    return zp.Subject(**{name: KINDS[name](array) for name, array in arrays.items()})


@pytest.fixture
def subject(rng: np.random.Generator) -> zp.Subject:
    return in_memory(t1=rng.random((9, 8, 7)), seg=rng.integers(0, 3, (9, 8, 7), np.uint8))


def starts(n: int, p: int, o: int) -> list[int]:
    regular = list(range(0, n - p + 1, p - o))
    return regular if regular[-1] == n - p else [*regular, n - p]


@st.composite
def grids(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Shape, patch and overlap of a grid without padding."""
    shape = draw(st.tuples(*[st.integers(1, 8)] * 3))
    patch = tuple(draw(st.integers(1, n)) for n in shape)
    overlap = tuple(2 * draw(st.integers(0, (p - 1) // 2)) for p in patch)
    return shape, patch, overlap


@given(grids())
def test_a_grid_has_the_patches_of_the_formula_in_lexicographic_order(
    given_grid: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]],
) -> None:
    shape, patch, overlap = given_grid
    volume = np.arange(np.prod(shape)).reshape(shape)
    grid = zp.GridSampler(in_memory(t1=volume), patch, overlap)
    expected = list(itertools.product(*map(starts, shape, patch, overlap)))
    assert [location.index for location in grid.locations] == expected
    assert len(grid) == len(expected)
    for number in {0, len(grid) // 2, len(grid) - 1}:
        box = tuple(slice(a, a + p) for a, p in zip(expected[number], patch, strict=True))
        np.testing.assert_array_equal(grid[number].t1.data[0], volume[box])
        assert grid[number - len(grid)].location == grid[number].location == grid.locations[number]


@given(grids(), st.sampled_from(["constant", "edge", "reflect", "symmetric", "wrap"]))
def test_a_padded_grid_is_the_grid_of_the_volume_padded_by_numpy(
    given_grid: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]], mode: str
) -> None:
    shape, patch, overlap = given_grid
    half = [o // 2 for o in overlap]
    volume = np.arange(np.prod(shape)).reshape(shape)
    choice = {"constant_values": -5} if mode == "constant" else {}
    padded = np.pad(volume, [(h, h) for h in half], mode=mode, **choice)  # type: ignore[call-overload]
    grid = zp.GridSampler(in_memory(t1=volume), patch, overlap, padding_mode=mode, fill=-5)
    expected = list(itertools.product(*map(starts, padded.shape, patch, overlap)))
    assert [location.index for location in grid.locations] == [
        tuple(np.subtract(index, half).tolist()) for index in expected
    ]
    for number in {0, len(grid) // 2, len(grid) - 1}:
        box = tuple(slice(a, a + p) for a, p in zip(expected[number], patch, strict=True))
        np.testing.assert_array_equal(grid[number].t1.data[0], padded[box])


def test_a_fill_is_an_intensity_and_maps_are_padded_with_zero() -> None:
    ones = {name: np.ones((2, 2, 2), dtype) for name, dtype in (("t1", "i2"), ("seg", "u1"), ("where", "f4"))}
    [patch] = zp.GridSampler(in_memory(**ones), (4, 2, 2), padding_mode="constant", fill=-1024)
    for name, fill in (("t1", -1024), ("seg", 0), ("where", 0)):
        assert patch[name].data[0, :, 0, 0].tolist() == [fill, 1, 1, fill]


def test_a_fill_that_an_image_cannot_represent_is_an_error() -> None:
    grid = zp.GridSampler(in_memory(t1=np.ones((2, 2, 2), np.uint8)), 4, padding_mode="constant", fill=-1024)
    with pytest.raises(
        OptionError, match=r"uint8\) cannot be padded with fill=-1024, .* choose another fill"
    ):
        grid[0]


def test_a_small_volume_is_padded_up_to_the_patch() -> None:
    volume = np.arange(3 * 4 * 5).reshape(3, 4, 5)
    grid = zp.GridSampler(in_memory(t1=volume), (6, 4, 8), padding_mode="edge")
    assert [location.index for location in grid.locations] == [(-1, 0, -1)]
    expected = np.pad(volume, [(1, 2), (0, 0), (1, 2)], mode="edge")
    np.testing.assert_array_equal(grid[0].t1.data[0], expected)


def test_a_grid_can_be_read_by_a_torch_loader_in_order(subject: zp.Subject) -> None:
    grid = zp.GridSampler(subject, 4, 2)
    batches = list(torch.utils.data.DataLoader(grid, batch_size=5, collate_fn=zp.collate))
    assert [loc for batch in batches for loc in batch.patch_location] == grid.locations
    assert batches[0].t1.data.shape == (5, 1, 4, 4, 4)
    assert [patch.location for patch in grid] == grid.locations


def test_a_grid_without_a_subject_is_a_template(subject: zp.Subject) -> None:
    template = zp.GridSampler(patch_size=4, patch_overlap=2, padding_mode="edge")
    found = [patch.location for patch in template(subject)]
    assert found == zp.GridSampler(subject, 4, 2, "edge").locations
    for use in (len, list, lambda grid: grid[0], lambda grid: grid.locations):
        with pytest.raises(OptionError, match="this GridSampler is a template without a subject; give it on"):
            use(template)


@pytest.mark.parametrize(
    ("overlap", "why"),
    [
        (1, "patch_overlap must be even and at least 0, not 1 on axis I; half of it is cut from each side"),
        ((0, 3, 0), "must be even and at least 0, not 3 on axis J"),
        (-2, "must be even and at least 0, not -2 on axis I"),
        (4, r"patch_overlap of 4 voxels on axis I is not smaller than the patch \(4\); use at most 2"),
        (
            (0, 0, 6),
            r"patch_overlap of 6 voxels on axis K is not smaller than the patch \(4\); use at most 2",
        ),
    ],
)
def test_an_overlap_that_is_odd_or_too_large_is_an_error(subject: zp.Subject, overlap: Any, why: str) -> None:
    with pytest.raises(PatchOverlapError, match=why):
        zp.GridSampler(subject, 4, overlap)


@pytest.mark.parametrize("index", [64, -65, 1000])
def test_a_patch_beyond_the_end_of_a_grid_is_an_error(index: int) -> None:
    grid = zp.GridSampler(in_memory(t1=np.zeros((10, 10, 10))), 4, 2)
    with pytest.raises(IndexError, match=f"patch {index} of a grid of 64 patches"):
        grid[index]


def test_a_grid_patch_larger_than_the_volume_is_an_error_that_names_the_padding(subject: zp.Subject) -> None:
    with pytest.raises(PatchSizeError, match=r"does not fit axis K .*\(7 voxels\); .*padding_mode"):
        zp.GridSampler(subject, 8)


def test_a_grid_needs_a_patch_size_and_a_padding_that_exists(subject: zp.Subject) -> None:
    with pytest.raises(OptionError, match="patch_size is missing; say"):
        zp.GridSampler(subject)
    with pytest.raises(OptionError, match=r"padding_mode must be one of constant, edge, .*, not 'mirror'"):
        zp.GridSampler(subject, 4, padding_mode="mirror")
