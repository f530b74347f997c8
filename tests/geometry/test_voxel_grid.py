"""Grids of voxels in space: their sizes, and where one lies in another."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zpatch.errors import OptionError
from zpatch.geometry.voxel_grid import VoxelGrid, snapped

seeds = st.integers(0, 2**32 - 1)
spacings = st.tuples(*[st.floats(0.2, 5)] * 3)


def some_affine(seed: int, spacing: Any) -> np.ndarray:
    rng, affine = np.random.default_rng(seed), np.eye(4)
    affine[:3, :3] = np.linalg.qr(rng.normal(size=(3, 3)))[0] * spacing
    affine[:3, 3] = rng.uniform(-100, 100, 3)
    return affine


@given(seed=seeds, spacing=spacings, wanted=spacings, shape=st.tuples(*[st.integers(1, 300)] * 3))
def test_another_spacing_is_exact_and_the_first_faces_meet(
    seed: int, spacing: Any, wanted: Any, shape: Any
) -> None:
    grid = VoxelGrid(shape, some_affine(seed, spacing))
    new = grid.with_spacing(wanted)
    assert np.allclose(new.spacing, wanted, rtol=1e-12)
    for axis in range(3):
        s, t = grid.spacing[axis], wanted[axis]
        assert new.shape[axis] == max(1, math.floor(shape[axis] * s / t + 0.5))
        if new.shape[axis] > 1:
            assert abs(new.shape[axis] * t - shape[axis] * s) <= t / 2 + 1e-9
    corner = np.array([-0.5, -0.5, -0.5, 1])
    assert np.allclose(new.affine @ corner, grid.affine @ corner)
    assert np.allclose(grid.affine @ grid.spacing_matrix(wanted), new.affine)
    assert np.allclose(grid.matrix_from(new), grid.spacing_matrix(wanted), atol=2e-4)


def test_none_keeps_an_axis() -> None:
    grid = VoxelGrid((10, 10, 10), np.diag([0.7, 0.7, 1.2, 1]))
    assert grid.with_spacing((1.4, None, None)).shape == (5, 10, 10)
    assert grid.spacing_matrix((None, None, 1.2)).tolist() == np.eye(4).tolist()


@pytest.mark.parametrize("spacing", [0, -1, math.nan, math.inf, (1, 2), "1x1", (1, "a", 2), (1, 1, 0), None])
def test_spacings_that_are_no_sizes_are_refused(spacing: Any) -> None:
    with pytest.raises(OptionError, match="spacing must be"):
        VoxelGrid((4, 4, 4), np.eye(4)).with_spacing(spacing)


def test_an_axis_of_too_many_voxels_is_refused() -> None:
    with pytest.raises(OptionError, match=r"an axis of over 2\*\*31 voxels of 400 voxels of 1 x 1 x 1 mm"):
        VoxelGrid((400, 4, 4), np.eye(4)).with_spacing((1e-8, 1, 1))


def test_a_singular_affine_has_no_spacing_and_no_place() -> None:
    flat = np.diag([1.0, 1.0, 0.0, 1.0])
    with pytest.raises(OptionError, match="singular"):
        VoxelGrid((4, 4, 4), flat).with_spacing(1)
    with pytest.raises(OptionError, match="singular"):
        VoxelGrid((4, 4, 4), flat).matrix_from(VoxelGrid((4, 4, 4), np.eye(4)))


def test_sheared_axes_keep_their_directions() -> None:
    sheared = np.eye(4)
    sheared[0, 1] = 0.5
    new = VoxelGrid((4, 4, 4), sheared).with_spacing((0.5, None, None))
    assert np.allclose(new.affine[:3, 1], sheared[:3, 1])
    assert np.allclose(new.affine[:3, 0], sheared[:3, 0] / 2)


def test_images_that_do_not_overlap_are_refused() -> None:
    moved = np.eye(4)
    moved[0, 3] = 4
    here, there = VoxelGrid((4, 4, 4), np.eye(4)), VoxelGrid((4, 4, 4), moved)
    with pytest.raises(OptionError, match="do not overlap in space"):
        here.matrix_from(there)
    moved[0, 3] = 3.9
    assert here.matrix_from(VoxelGrid((4, 4, 4), moved))[0, 3] == 3.9


def test_what_rounding_of_float32_made_unequal_is_equal() -> None:
    affine = some_affine(3, (0.7, 0.7, 1.2))
    rounded = affine.astype(np.float32).astype(np.float64)
    assert VoxelGrid((512, 512, 300), affine).matrix_from(VoxelGrid((512, 512, 300), rounded)).tolist() == (
        np.eye(4).tolist()
    )
    assert snapped(np.diag([0.5, 1, 1, 1]), (10, 10, 10))[0, 0] == 0.5
