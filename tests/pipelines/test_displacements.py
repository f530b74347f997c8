"""Bounds of displacements hold for random transforms, and are close for small angles."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from zpatch.pipelines.displacements import in_voxels, in_world, largest, margin_to, rotated

ORDERS = ["xyz", "xzy", "yxz", "yzx", "zxy", "zyx"]
CORNERS = np.array(np.meshgrid([-1, 1], [-1, 1], [-1, 1])).reshape(3, -1)


@given(
    st.tuples(*[st.floats(0.0, 100.0)] * 3),
    st.tuples(*[st.floats(0.0, 4.0)] * 3),
    st.tuples(*[st.floats(-1.0, 1.0)] * 3),
    st.sampled_from(ORDERS),
)
def test_a_rotated_box_is_inside_its_bound(
    extent: tuple[float, ...], most: tuple[float, ...], parts: tuple[float, ...], order: str
) -> None:
    angles = [parts["xyz".index(axis)] * most["xyz".index(axis)] for axis in order]
    turn = Rotation.from_euler(order, angles).as_matrix()
    reached = np.abs(turn @ (CORNERS * np.array(extent)[:, None])).max(axis=1)
    assert np.all(reached <= rotated(np.array(extent), most) + 1e-6)


def test_the_bound_is_reached_where_one_axis_turns() -> None:
    found = rotated(np.array([10.0, 5.0, 3.0]), [0, 0, 0.2])
    np.testing.assert_allclose(found, [10 + 5 * np.sin(0.2), 5 + 10 * np.sin(0.2), 3])


def test_a_patch_needs_no_more_than_one_voxel_where_nothing_moves() -> None:
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    extent = in_voxels(in_world((8, 6, 4), affine), affine)
    np.testing.assert_allclose(extent, [4, 3, 2])
    assert margin_to(extent, (8, 6, 4)) == (1, 1, 1)
    assert margin_to(extent + np.array([0, 2.5, 10]), (8, 6, 4)) == (1, 4, 11)


def test_ranges_are_numbers_pairs_or_none() -> None:
    assert largest((0.3, (-0.5, 0.2), None), 3) == [0.3, 0.5, 0.0]
    assert largest((0.3,), 3) == [0.3, 0.0, 0.0]
    assert largest((), 2) == [0.0, 0.0]
