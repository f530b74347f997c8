"""Statistics computed box by box are those of numpy for the whole array."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray

from zpatch.digests import compact_json
from zpatch.store import value_counts as counting
from zpatch.store.value_counts import (
    MAX_COUNTED_VALUES,
    BinnedValues,
    byte_counts,
    nonzero_box,
    value_counts,
)
from zpatch.store.voxel_statistics import BLOCK_VOXELS, VoxelStatistics

Array = NDArray[Any]

INTEGERS = [f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)]
FLOATS = ["f2", "f4", "f8"]
SHAPES = st.tuples(*[st.integers(1, side) for side in (2, 5, 4, 4)])
SLOPES = st.sampled_from([1.0, 0.25, -1.0, -3.5])
INTERS = st.sampled_from([0.0, -1024.0, 7.5])
PERCENTILES = {"percentile_0_5": 0.5, "percentile_50": 50.0, "percentile_99_5": 99.5}


@st.composite
def integers(draw: st.DrawFn) -> Array:
    """Integers anywhere in the range of their type, close together or spread over all of it."""
    dtype = np.dtype(draw(st.sampled_from(INTEGERS)))
    low, high = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
    if draw(st.booleans()):
        low = draw(st.just(0) | st.integers(low, high))
        high = min(high, low + draw(st.integers(0, 300)))
    zeros = st.just(0) if low <= 0 <= high else st.nothing()
    return draw(npst.arrays(dtype, draw(SHAPES), elements=st.integers(low, high) | zeros))


@st.composite
def floats(draw: st.DrawFn) -> Array:
    """Floats with zeros, NaN and infinities, none too small for a float32."""
    dtype = np.dtype(draw(st.sampled_from(FLOATS)))
    bound = 2.0 ** (15 if dtype.itemsize == 2 else 100)
    numbers = st.floats(-bound, bound, width=min(32, 8 * dtype.itemsize), allow_subnormal=False)
    odd = st.sampled_from([0.0, -0.0, math.nan, math.inf, -math.inf])
    elements = (numbers if draw(st.booleans()) else numbers | odd).filter(
        lambda x: x == 0 or not abs(x) < 1e-30
    )
    return draw(npst.arrays(dtype, draw(SHAPES), elements=elements))


@st.composite
def cuts(draw: st.DrawFn, arrays: st.SearchStrategy[Array]) -> tuple[Array, list[tuple[slice, ...]]]:
    """An array, and boxes that divide it, in any order."""
    array = draw(arrays)
    boxes: list[tuple[slice, ...]] = [()]
    for n in array.shape:
        inner = draw(st.sets(st.integers(1, n - 1), max_size=2)) if n > 1 else set()
        edges = [0, *sorted(inner), n]
        spans = [slice(a, b) for a, b in itertools.pairwise(edges)]
        boxes = [(*box, span) for box in boxes for span in spans]
    return array, draw(st.permutations(boxes))


def gathered(
    array: Array, boxes: list[tuple[slice, ...]] | None = None, slope: float = 1.0, inter: float = 0.0
) -> dict[str, Any]:
    result = one_pass(array, boxes or [(slice(0, None),) * 4]).result(slope, inter)
    compact_json(result)
    return result


def one_pass(array: Array, boxes: list[tuple[slice, ...]]) -> VoxelStatistics:
    statistics = VoxelStatistics(array.dtype)
    for box in boxes:
        z, y, x = (span.start for span in box[1:])
        statistics.update(array[box], (z, y, x))
    return statistics


def merged(array: Array, boxes: list[tuple[slice, ...]]) -> VoxelStatistics:
    """Statistics of each box alone, and their states merged one after the other."""
    statistics = VoxelStatistics(array.dtype)
    for box in boxes:
        statistics.merge(one_pass(array, [box]).state())
    return statistics


@dataclass(frozen=True)
class Oracle:
    """numpy's statistics of finite stored voxels, scaled."""

    stored: NDArray[np.float64]
    slope: float = 1.0
    inter: float = 0.0

    def check(self, found: dict[str, Any], *, exact: bool, std_tolerance: float = 1e-12) -> None:
        assert found["count"] == self.stored.size
        if not self.stored.size:
            assert [found[name] for name in ("min", "max", "mean", "std", *PERCENTILES)] == [None] * 7
            return
        values = self.slope * self.stored + self.inter
        size = abs(self.slope) * float(np.abs(self.stored).max()) + abs(self.inter)
        assert found["min"] == values.min()
        assert found["max"] == values.max()
        assert found["mean"] == pytest.approx(values.mean(), rel=0, abs=1e-12 * size)
        assert found["std"] == pytest.approx(values.std(), rel=1e-9, abs=std_tolerance * size)
        for name, percent in PERCENTILES.items():
            tolerance = 1e-12 * size + (0 if exact else 0.005 * self.largest_neighbour(percent))
            assert found[name] == pytest.approx(np.percentile(values, percent), rel=0, abs=tolerance), name
            assert found["min"] - 1e-12 * size <= found[name] <= found["max"] + 1e-12 * size

    def largest_neighbour(self, percent: float) -> float:
        """The larger of the two voxels around the percentile, without the intercept."""
        percent = percent if self.slope > 0 else 100 - percent
        below, above = (np.percentile(self.stored, percent, method=side) for side in ("lower", "higher"))
        return abs(self.slope) * max(abs(below), abs(above))


def box_of(array: Array) -> list[list[int]] | None:
    """First and stop of the voxels that are not zero, in (I, J, K)."""
    places = np.argwhere((array != 0).any(axis=0))[:, ::-1]
    return [places.min(axis=0).tolist(), (places.max(axis=0) + 1).tolist()] if len(places) else None


# Integers


@given(cuts(integers()), SLOPES, INTERS)
def test_statistics_of_integers_are_numpys_however_the_volume_is_cut(
    cut: tuple[Array, list[tuple[slice, ...]]], slope: float, inter: float
) -> None:
    array, boxes = cut
    found = gathered(array, boxes, slope, inter)
    counted = array.dtype.itemsize <= 2 or int(array.max()) - int(array.min()) < MAX_COUNTED_VALUES
    stored = array.astype(np.float64).ravel()
    Oracle(stored, slope, inter).check(found, exact=counted)
    foreground = Oracle(stored[stored != 0], slope, inter)
    foreground.check(found["foreground"], exact=counted, std_tolerance=1e-12 if counted else 1e-7)
    assert (found["nan"], found["inf"]) == (0, 0)
    assert found["foreground_box"] == box_of(array)


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("end", ["min", "max"])
def test_integers_at_either_end_of_their_type_are_counted_without_wrapping(dtype: str, end: str) -> None:
    least = np.iinfo(dtype).min if end == "min" else np.iinfo(dtype).max - 63
    array = np.array([least + n for n in range(64)], dtype=dtype).reshape(1, 4, 4, 4)
    slabs = [(slice(0, 1), slice(z, z + 1), slice(0, 4), slice(0, 4)) for z in (2, 0, 3, 1)]
    Oracle(array.astype(np.float64).ravel()).check(gathered(array, slabs), exact=True)


@pytest.mark.parametrize("dtype", ["i4", "i8", "u8"])
@pytest.mark.parametrize(("spread", "exact"), [(MAX_COUNTED_VALUES - 1, True), (MAX_COUNTED_VALUES, False)])
def test_percentiles_of_integers_are_exact_up_to_four_million_values(
    dtype: str, spread: int, exact: bool, rng: np.random.Generator
) -> None:
    base = 10**7
    array = rng.integers(base, base + spread, (1, 10, 10, 10), endpoint=True).astype(dtype)
    array.flat[:2] = base, base + spread
    found = gathered(array)
    Oracle(array.astype(np.float64).ravel()).check(found, exact=exact)
    assert (found["percentile_50"] == np.percentile(array, 50)) == exact


def test_integers_that_are_widely_spread_only_with_the_last_slab_are_all_counted() -> None:
    array = np.arange(64, dtype=np.int32).reshape(1, 4, 4, 4)
    array[0, 3, 3, 3] = 2**31 - 1
    slabs = [(slice(0, 1), slice(z, z + 1), slice(0, 4), slice(0, 4)) for z in range(4)]
    Oracle(array.astype(np.float64).ravel()).check(gathered(array, slabs), exact=False)


def test_large_integers_close_together_keep_their_spread() -> None:
    array = (np.arange(64) % 5 + 2**40).reshape(1, 4, 4, 4)
    assert gathered(array)["std"] == pytest.approx((array - 2**40).std(), rel=1e-3)


# Floats


@given(cuts(floats()), SLOPES, INTERS)
def test_statistics_of_floats_are_numpys_and_percentiles_within_half_a_percent(
    cut: tuple[Array, list[tuple[slice, ...]]], slope: float, inter: float
) -> None:
    array, boxes = cut
    found = gathered(array, boxes, slope, inter)
    finite = array[np.isfinite(array)].astype(np.float64)
    Oracle(finite, slope, inter).check(found, exact=False, std_tolerance=1e-7)
    foreground = Oracle(finite[finite != 0], slope, inter)
    foreground.check(found["foreground"], exact=False, std_tolerance=1e-7)
    assert found["nan"] == np.isnan(array).sum()
    assert found["inf"] == np.isinf(array).sum()
    assert found["foreground_box"] == box_of(array)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_volume_without_a_finite_voxel_has_counts_and_no_numbers(value: float) -> None:
    found = gathered(np.full((1, 2, 3, 4), value, dtype=np.float32))
    assert found["count"] == found["foreground"]["count"] == 0
    assert found["mean"] is found["foreground"]["percentile_50"] is None
    assert found["nan"] + found["inf"] == 24


@pytest.mark.parametrize("voxels", [[0.0, 1.0, 1.7e308, -1.7e308], [0.0, 1.0, 2.0, -1.7e308], [1.7e308] * 4])
def test_voxels_near_the_largest_float64_have_statistics_that_a_manifest_can_hold(
    voxels: list[float],
) -> None:
    found = gathered(np.array(voxels).reshape(1, 1, 2, 2))
    assert (found["count"], found["min"], found["max"]) == (4, min(voxels), max(voxels))


def test_the_spread_of_floats_is_exact_beside_a_large_offset(rng: np.random.Generator) -> None:
    array = rng.normal(1e6, 1e-2, (1, 20, 20, 20))
    slabs = [(slice(0, 1), slice(z, z + 1), slice(0, 20), slice(0, 20)) for z in range(20)]
    assert gathered(array, slabs)["std"] == pytest.approx(array.std(), rel=1e-4)


# Other types and sizes


def test_complex_voxels_count_by_magnitude() -> None:
    array = np.array([3 + 4j, 0, -6j, 1]).reshape(1, 1, 2, 2).astype(np.complex64)
    found = gathered(array)
    Oracle(np.abs(array).astype(np.float64).ravel()).check(found, exact=False)
    assert found["foreground"]["count"] == 3


def test_booleans_count_as_zero_and_one() -> None:
    array = np.array([True, False, True, True]).reshape(1, 1, 2, 2)
    found = gathered(array)
    assert (found["count"], found["mean"], found["foreground"]["count"]) == (4, 0.75, 3)


@pytest.mark.parametrize("dtype", ["i2", "i4", "f4"])
def test_all_blocks_of_a_volume_are_counted(dtype: str, rng: np.random.Generator) -> None:
    array = rng.normal(0, 1000, (2, 40, 70, 60)).astype(dtype)
    assert array.size > BLOCK_VOXELS
    stored = array.astype(np.float64).ravel()
    found = gathered(array)
    Oracle(stored).check(found, exact=dtype != "f4")
    Oracle(stored[stored != 0]).check(found["foreground"], exact=dtype != "f4", std_tolerance=1e-7)


# Foreground


def test_a_volume_of_zeros_has_no_foreground_and_no_box() -> None:
    found = gathered(np.zeros((2, 3, 4, 5), dtype=np.int16))
    assert found["count"] == 120
    assert found["foreground"]["count"] == 0
    assert found["foreground"]["max"] is None
    assert found["foreground_box"] is None


def test_the_foreground_is_all_voxels_stored_as_nonzero_whatever_the_intercept() -> None:
    array = np.array([0, 0, 1024, 2048], dtype=np.int16).reshape(1, 1, 2, 2)
    foreground = gathered(array, slope=1.0, inter=-1024.0)["foreground"]
    assert (foreground["count"], foreground["min"], foreground["max"]) == (2, 0.0, 1024.0)


def test_the_foreground_box_is_in_i_j_k_and_spans_all_channels() -> None:
    array = np.zeros((2, 5, 6, 7), dtype=np.uint8)
    array[0, 1, 2, 3] = array[1, 4, 2, 5] = 1
    assert gathered(array)["foreground_box"] == [[3, 2, 1], [6, 3, 5]]


# Merged from states


@given(cuts(integers() | floats()), SLOPES, INTERS)
def test_states_merged_one_after_the_other_are_one_pass_to_the_last_bit(
    cut: tuple[Array, list[tuple[slice, ...]]], slope: float, inter: float
) -> None:
    array, boxes = cut
    found, expected = merged(array, boxes), one_pass(array, boxes)
    assert found.result(slope, inter) == expected.result(slope, inter)
    np.testing.assert_array_equal(found.histogram(slope, inter), expected.histogram(slope, inter))


@given(cuts(integers() | floats()), st.randoms(use_true_random=False))
def test_the_order_of_states_affects_only_the_last_digits_of_binned_moments(
    cut: tuple[Array, list[tuple[slice, ...]]], random: Any
) -> None:
    array, boxes = cut
    found, expected = (merged(array, order).result() for order in (random.sample(boxes, len(boxes)), boxes))
    if array.dtype.kind == "f" or array.dtype.itemsize > 2:
        size = float(np.abs(array[np.isfinite(array)].astype(np.float64)).max(initial=0))
        for one, other in ((found, expected), (found["foreground"], expected["foreground"])):
            for name, tolerance in (("mean", 1e-12), ("std", 1e-7)):
                first, second = (float(stats.pop(name) or 0) for stats in (one, other))  # None of no voxels
                assert first == pytest.approx(second, rel=1e-9, abs=tolerance * size)
    assert found == expected


@given(cuts(integers() | floats()))
def test_a_state_merged_into_empty_statistics_is_that_state(
    cut: tuple[Array, list[tuple[slice, ...]]],
) -> None:
    array, boxes = cut
    state = one_pass(array, boxes).state()
    again = VoxelStatistics(array.dtype)
    again.merge(state)
    again.merge(VoxelStatistics(array.dtype).state())
    assert again.state().keys() == state.keys()
    for name, values in state.items():
        np.testing.assert_array_equal(again.state()[name], values, strict=True)


def test_integers_that_are_widely_spread_only_together_are_binned_as_in_one_pass() -> None:
    array = np.arange(64, dtype=np.int32).reshape(1, 4, 4, 4)
    array[0, 2:] += MAX_COUNTED_VALUES
    slabs = [(slice(0, 1), slice(z, z + 2), slice(0, 4), slice(0, 4)) for z in (0, 2)]
    assert "offset" in one_pass(array, slabs[:1]).state()
    assert "offset" not in merged(array, slabs).state()
    assert merged(array, slabs).result() == one_pass(array, slabs).result()


def test_shards_of_several_blocks_merge_to_the_statistics_of_numpy(rng: np.random.Generator) -> None:
    array = rng.normal(1000, 30, (1, 80, 80, 100)).astype(np.float32)
    slabs = [(slice(0, 1), slice(z, z + 40), slice(0, 80), slice(0, 100)) for z in (0, 40)]
    assert array.size > 2 * BLOCK_VOXELS
    Oracle(array.astype(np.float64).ravel()).check(merged(array, slabs).result(), exact=False)


@pytest.mark.parametrize("dtype", ["u1", "i4", "f4"])
def test_the_state_of_a_map_of_few_values_is_small(dtype: str, rng: np.random.Generator) -> None:
    array = rng.integers(0, 4, (1, 40, 40, 40)).astype(dtype)
    assert sum(values.nbytes for values in one_pass(array, [(slice(0, None),) * 4]).state().values()) < 400


@pytest.mark.parametrize("is_compiled", [True, False])
@given(integers())
def test_integers_are_counted_value_by_value_with_compiled_loops_and_without(
    is_compiled: bool, voxels: Array
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if not is_compiled:
            patch.setattr(counting, "_compiled", None)
        found = value_counts(voxels)
    if int(voxels.max()) - int(voxels.min()) >= MAX_COUNTED_VALUES:
        assert found is None
        return
    assert found is not None
    least, counts = found
    values, wanted = np.unique(voxels, return_counts=True)
    offsets = np.flatnonzero(counts)
    assert [least + n for n in offsets.tolist()] == values.tolist()
    np.testing.assert_array_equal(counts[offsets], wanted)


@pytest.mark.skipif(counting._compiled is None, reason="no compiler was at hand")
@pytest.mark.parametrize(
    ("voxels", "counts"),
    [
        (np.zeros(4, "i4"), 256),
        (np.zeros(4, "u1"), 255),
        (np.zeros(4, "u2"), 256),
        (np.zeros(4, "u1"), 65536),
        (np.zeros(4, "f4"), 256),
        (np.zeros(4, "f8"), 65536),
    ],
)
def test_compiled_loops_count_only_into_a_table_of_the_right_size(voxels: Array, counts: int) -> None:
    with pytest.raises(ValueError, match="values of one, two or four bytes are counted"):
        counting._compiled.count(voxels, np.zeros(counts, np.int64))


@pytest.mark.skipif(counting._compiled is None, reason="no compiler was at hand")
def test_moments_are_computed_of_float32_alone() -> None:
    with pytest.raises(ValueError, match="moments are computed of float32"):
        counting._compiled.moments(np.zeros(4))


ANY_FLOAT32 = npst.arrays(np.uint32, st.integers(0, 40)).map(lambda bits: bits.view(np.float32))


@given(st.lists(ANY_FLOAT32 | ANY_FLOAT32.map(lambda values: np.tile(values, 1000)), min_size=1, max_size=3))
def test_float32_have_the_same_statistics_with_compiled_loops_and_without(blocks: list[Array]) -> None:
    compiled, plain = BinnedValues(), BinnedValues()
    for block in blocks:
        compiled.update(block)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(counting, "_compiled", None)
            plain.update(block)
    found, wanted = compiled.state(), plain.state()
    for name in ("totals", "extremes", "bin", "bin_count"):
        np.testing.assert_array_equal(found[name], wanted[name])
    scale = np.abs(wanted["extremes"][np.isfinite(wanted["extremes"])]).max(initial=1e-100)
    np.testing.assert_allclose(found["moments"][0] / scale, wanted["moments"][0] / scale, atol=1e-12)
    np.testing.assert_allclose(
        found["moments"][1] / scale**2, wanted["moments"][1] / scale**2, rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("is_compiled", [True, False])
@given(
    st.sampled_from([*INTEGERS, *FLOATS, "c8", ">i2"]),
    st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 100)),
    st.lists(st.integers(0, 2**31), max_size=6),
)
def test_the_box_around_nonzero_voxels_is_found_with_compiled_loops_and_without(
    is_compiled: bool, dtype: str, shape: tuple[int, ...], places: list[int]
) -> None:
    voxels = np.zeros(shape, dtype)
    if voxels.dtype.kind == "f":
        voxels = -voxels  # -0.0
    for place in places:
        voxels.reshape(-1)[place % voxels.size] = 1 + place % 2
    hits = np.argwhere(voxels != 0)
    with pytest.MonkeyPatch.context() as patch:
        if not is_compiled:
            patch.setattr(counting, "_compiled", None)
        found = nonzero_box(voxels)
    ends = zip(hits.min(axis=0).tolist(), (hits.max(axis=0) + 1).tolist(), strict=True) if len(hits) else None
    assert found == (None if ends is None else list(ends))


@pytest.mark.skipif(counting._compiled is None, reason="no compiler was at hand")
def test_boxes_are_found_on_three_axes_alone() -> None:
    with pytest.raises(ValueError, match="on three axes"):
        counting._compiled.box(np.zeros((4, 4)), 1)


@given(
    npst.arrays(
        np.uint8, st.tuples(*[st.integers(1, side) for side in (2, 5, 70)]), elements=st.integers(0, 2)
    ),
    st.integers(1, 40),
    st.booleans(),
    st.booleans(),
)
def test_bytes_are_counted_in_pieces_along_the_last_axis(
    voxels: Array, length: int, is_turned: bool, is_part: bool
) -> None:
    voxels = voxels.T if is_turned else voxels
    voxels = voxels[:, :, 1:] if is_part and voxels.shape[2] > 1 else voxels
    counts = byte_counts(voxels, length)
    for piece, found in enumerate(counts):
        expected = voxels[..., piece * length : (piece + 1) * length]
        np.testing.assert_array_equal(found, np.bincount(expected.reshape(-1), minlength=256))
    assert counts.sum() == voxels.size
