"""Coarser levels of arrays: averages or most frequent labels, and their shapes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from zpatch.chunks import levels
from zpatch.chunks.levels import halve, plan_levels

shapes = st.tuples(st.integers(1, 2), *(st.integers(1, 7) for _ in range(3)))


def groups(voxels: NDArray[Any]) -> NDArray[Any]:
    """The up to eight fine voxels (…, n) of each coarse voxel; an odd last plane counts twice."""
    padded = np.pad(voxels, [(0, 0), *((0, n % 2 if n > 1 else 0) for n in voxels.shape[1:])], mode="edge")
    c, z, y, x = padded.shape
    a, b, d = (2 if n > 1 else 1 for n in (z, y, x))
    split = padded.reshape(c, z // a, a, y // b, b, x // d, d)
    return split.transpose(0, 1, 3, 5, 2, 4, 6).reshape(c, z // a, y // b, x // d, a * b * d)


@given(shapes, st.integers(0, 2**31))
def test_images_are_averaged(shape: tuple[int, ...], seed: int) -> None:
    voxels = np.random.default_rng(seed).integers(-1000, 1000, shape).astype(np.int16)
    found = halve(voxels, majority=False)
    np.testing.assert_array_equal(found, np.rint(groups(voxels).mean(axis=-1)))
    assert found.dtype == voxels.dtype


@given(
    st.sampled_from(["u1", "i1", "u2", "i2"]),
    st.tuples(st.integers(1, 2), st.integers(1, 5), st.integers(1, 5), st.integers(1, 1100)),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_integers_are_averaged_alike_with_the_compiled_loop_and_without(
    dtype: str, shape: tuple[int, ...], is_view: bool, seed: int
) -> None:
    limits = np.iinfo(dtype)
    voxels = np.random.default_rng(seed).integers(limits.min, limits.max, shape, dtype, endpoint=True)
    voxels = voxels[:, ::-1, -3:] if is_view else voxels
    found = halve(voxels, majority=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(levels, "_compiled", None)
        expected = halve(voxels, majority=False)
    np.testing.assert_array_equal(found, expected)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)


@pytest.mark.skipif(levels._compiled is None, reason="no compiler was at hand")
@pytest.mark.parametrize(
    ("fine", "coarse"),
    [((1, 4, 4, 4), (1, 2, 2, 3)), ((1, 4, 4, 4), (2, 2, 2, 2)), ((4, 4, 4), (2, 2, 2))],
)
def test_the_compiled_loop_writes_only_into_a_level_of_the_right_shape(
    fine: tuple[int, ...], coarse: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="voxels of one or two bytes"):
        levels._compiled(np.zeros(fine, np.int16), np.zeros(coarse, np.int16), True)
    with pytest.raises(ValueError, match="voxels of one or two bytes"):
        levels._compiled(np.zeros((1, 4, 4, 4), np.int32), np.zeros((1, 2, 2, 2), np.int32), True)


@given(shapes, st.integers(0, 2**31))
def test_the_most_frequent_label_is_kept_and_the_smallest_of_equally_frequent_ones(
    shape: tuple[int, ...], seed: int
) -> None:
    voxels = np.random.default_rng(seed).integers(0, 4, shape).astype(np.uint8)
    found = halve(voxels, majority=True)
    for place, group in zip(np.ndindex(*found.shape), groups(voxels).reshape(found.size, -1), strict=True):
        counts = Counter(group.tolist())
        assert found[place] == min(v for v, n in counts.items() if n == max(counts.values()))


@given(st.tuples(*(st.integers(1, 400) for _ in range(3))))
def test_levels_halve_until_no_side_is_over_64_voxels(shape: tuple[int, ...]) -> None:
    chunks = tuple(min(n, 32) for n in shape)
    shards = tuple(-(-n // c) * c for n, c in zip(shape, chunks, strict=True))
    levels = plan_levels(shape, chunks, shards)
    for above, level in zip([shape, *(level.shape for level in levels)][: len(levels)], levels, strict=True):
        assert max(above) > 64
        assert level.shape == tuple(-(-n // 2) for n in above)
        assert all(s % c == 0 for s, c in zip(level.shards, level.chunks, strict=True))
    assert max(([shape, *(level.shape for level in levels)])[-1]) <= 64
