"""Coarser levels of arrays: averages or most frequent labels, and their shapes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

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
