"""The index of a map: its counts and sums are those of numpy."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import zpatch as zp
from zpatch.errors import SamplingError
from zpatch.records.image_record import ImageRecord, Kind
from zpatch.store.voxel_index import (
    ChunkGrid,
    LabelIndexBuilder,
    LabelTable,
    MassTable,
    check_weights,
    index_builder,
    sum_table,
)

EYE = tuple(map(tuple, np.eye(4).tolist()))


def record_of(
    voxels: NDArray[Any], chunks: tuple[int, ...], kind: Kind, slope: float = 1, inter: float = 0
) -> ImageRecord:
    return ImageRecord(
        "sub", "map", kind, voxels.shape, voxels.dtype.str, "czyx"[-voxels.ndim :], chunks, chunks, "lz4",
        EYE, slope=slope, inter=inter,
    )  # fmt: skip


def chunks_of(voxels: NDArray[Any], chunks: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], Any]]:
    """First voxel and content of each chunk, in C order; (c, z, y, x)."""
    counts = [-(-n // c) for n, c in zip(voxels.shape, chunks, strict=True)]
    for position in np.ndindex(*counts):
        first = tuple(p * c for p, c in zip(position, chunks, strict=True))
        yield first, voxels[tuple(slice(a, a + c) for a, c in zip(first, chunks, strict=True))]


def label_table(voxels: NDArray[Any], chunks: tuple[int, ...]) -> LabelTable:
    """The index of voxels (c, z, y, x) that are added chunk by chunk, the last one first."""
    builder = index_builder(record_of(voxels, chunks, "label"), "map.nii")
    assert isinstance(builder, LabelIndexBuilder)
    for first, part in reversed(list(chunks_of(voxels, chunks))):
        builder.update(part, first)  # type: ignore[arg-type]
    return builder.table()


def entries(table: LabelTable) -> dict[tuple[int, int], int]:
    """(value, chunk) -> count."""
    rows = np.repeat(table.values, np.diff(table.row_start)).tolist()
    found = list(zip(rows, table.chunk_id.tolist(), strict=True))
    assert len(set(found)) == len(found)
    return dict(zip(found, table.count.tolist(), strict=True))


@given(
    shape=st.tuples(*[st.integers(1, 7)] * 3),
    chunks=st.tuples(*[st.integers(1, 4)] * 3),
    code=st.sampled_from(["u1", "u2", "i2", "i4", "i8"]),
)
def test_a_label_index_counts_each_value_in_each_chunk(
    shape: tuple[int, ...], chunks: tuple[int, ...], code: str
) -> None:
    low = 0 if code.startswith("u") else -3
    voxels = np.random.default_rng(0).integers(low, 4, (1, *shape)).astype(code)
    expected = {
        (int(value), chunk): int(count)
        for chunk, (_, part) in enumerate(chunks_of(voxels, (1, *chunks)))
        for value, count in zip(*np.unique(part, return_counts=True), strict=True)
    }
    table = label_table(voxels, (1, *chunks))
    assert entries(table) == expected
    values, counts = np.unique(voxels, return_counts=True)
    assert table.voxel_counts() == dict(zip(values.tolist(), counts.tolist(), strict=True))


@given(shape=st.tuples(*[st.integers(1, 6)] * 3), chunks=st.tuples(*[st.integers(1, 4)] * 3))
def test_the_index_of_several_channels_counts_the_voxels_of_each_that_are_not_zero(
    shape: tuple[int, ...], chunks: tuple[int, ...]
) -> None:
    voxels = np.random.default_rng(0).integers(0, 3, (3, *shape)).astype(np.uint8)
    voxels[1] = 0
    expected = {
        (first[0], chunk): int(np.count_nonzero(part))
        for chunk, (first, part) in enumerate(chunks_of(voxels, (1, *chunks)))
        if part.any()
    }
    table = label_table(voxels, (1, *chunks))
    assert entries(table) == expected
    assert table.voxel_counts() == {c: int(np.count_nonzero(voxels[c])) for c in (0, 2) if voxels[c].any()}


def test_values_are_scaled_by_slope_and_intercept() -> None:
    voxels = np.array([0, 1, 1, 2], np.uint8).reshape(1, 1, 1, 4)
    builder = index_builder(record_of(voxels, (1, 1, 1, 4), "label", slope=10, inter=-5), "map.nii")
    builder.update(voxels, (0, 0, 0, 0))
    assert builder.statistics() == {"labels": {"-5": 1, "5": 2, "15": 1}}


def test_a_table_of_several_values_lists_the_chunks_that_hold_any_of_them(rng: np.random.Generator) -> None:
    voxels = rng.integers(0, 5, (1, 6, 6, 6)).astype(np.uint8)
    voxels[0, :2, :2, :2] = 0
    table = label_table(voxels, (1, 2, 2, 2)).table([1, 3, 77], 27)
    expected = [np.isin(part, [1, 3]).sum() for _, part in chunks_of(voxels, (1, 2, 2, 2))]
    np.testing.assert_array_equal(table.chunk_id, np.flatnonzero(expected))
    np.testing.assert_array_equal(table.mass, np.array(expected)[table.chunk_id])
    assert label_table(voxels, (1, 2, 2, 2)).table([77], 27).mass.size == 0


@given(shape=st.tuples(*[st.integers(1, 7)] * 3), chunks=st.tuples(*[st.integers(1, 4)] * 3))
def test_a_weight_index_sums_the_scaled_weights_of_each_chunk(
    shape: tuple[int, ...], chunks: tuple[int, ...]
) -> None:
    voxels = np.random.default_rng(0).random((1, *shape)).astype(np.float32)
    builder = index_builder(record_of(voxels, (1, *chunks), "sampling", slope=2, inter=0.5), "map.nii")
    expected = []
    for first, part in chunks_of(voxels, (1, *chunks)):
        builder.update(part, first)  # type: ignore[arg-type]
        expected.append((part.astype(np.float64) * 2 + 0.5).sum())
    np.testing.assert_allclose(builder.tables()["sum"], expected)


@given(
    shape=st.tuples(*[st.integers(1, 7)] * 3),
    chunks=st.tuples(*[st.integers(1, 4)] * 3),
    kind=st.sampled_from(["label", "labels of two channels", "sampling", "scalar"]),
    owners=st.lists(st.integers(0, 2), min_size=1),
)
def test_an_index_merged_from_states_in_any_order_is_that_of_one_pass(
    shape: tuple[int, ...], chunks: tuple[int, ...], kind: str, owners: list[int]
) -> None:
    voxels = np.random.default_rng(0).integers(0, 4, (2 if "two" in kind else 1, *shape)).astype(np.uint8)
    record = record_of(voxels, (1, *chunks), "label" if "label" in kind else kind, slope=2)  # type: ignore[arg-type]
    whole, merged, *parts = (index_builder(record, "map.nii") for _ in range(5))
    for owner, (first, part) in zip(itertools.cycle(owners), chunks_of(voxels, (1, *chunks)), strict=False):
        for builder in (whole, parts[owner]):
            builder.update(part, first)  # type: ignore[arg-type]
    for builder in reversed(parts):
        merged.merge(builder.state())
    assert merged.statistics() == whole.statistics()
    assert merged.tables().keys() == whole.tables().keys()
    for name, table in whole.tables().items():
        np.testing.assert_array_equal(merged.tables()[name], table, strict=True)


def test_a_table_lists_chunks_in_order_whenever_they_were_added(rng: np.random.Generator) -> None:
    voxels = rng.integers(0, 3, (1, 6, 6, 6)).astype(np.uint8)
    table = label_table(voxels, (1, 2, 2, 2))
    for start, stop in itertools.pairwise(table.row_start):
        assert (np.diff(table.chunk_id[start:stop]) > 0).all()


def test_sums_of_small_integers_do_not_wrap() -> None:
    voxels = np.full((1, 8, 8, 8), 255, np.uint8)
    builder = index_builder(record_of(voxels, (1, 8, 8, 8), "sampling"), "map.nii")
    builder.update(voxels, (0, 0, 0, 0))
    assert builder.tables()["sum"].tolist() == [255 * 512]


def test_an_image_has_no_index() -> None:
    voxels = np.ones((1, 2, 2, 2), np.uint8)
    builder = index_builder(record_of(voxels, (1, 2, 2, 2), "scalar"), "map.nii")
    builder.update(voxels, (0, 0, 0, 0))
    assert builder.tables() == builder.statistics() == {}


def test_the_stored_index_of_a_cohort_is_that_of_its_voxels(cohort: zp.Cohort) -> None:
    for subject in cohort:
        seg = subject.seg
        voxels = seg.data.transpose(0, 3, 2, 1)
        expected = label_table(voxels, (1, *seg.source.chunk_shape[::-1]))
        names = ("values", "row_start", "chunk_id", "count")
        stored = LabelTable(*(zarr.open_array(seg.folder / "index" / name, mode="r")[:] for name in names))
        assert entries(stored) == entries(expected)


def test_the_stored_sums_of_a_map_are_those_of_its_voxels(tmp_path: Path, rng: np.random.Generator) -> None:
    (tmp_path / "source").mkdir()
    weights = rng.random((7, 6, 5)).astype(np.float32)
    nib.Nifti1Image(weights, np.eye(4)).to_filename(tmp_path / "source" / "where.nii")
    zp.convert(tmp_path / "source", tmp_path / "store", chunk=4, sampling_patterns=["where"])
    sums = zarr.open_array(tmp_path / "store" / "where" / "image" / "index" / "sum", mode="r")[:]
    expected = [part.sum(dtype=np.float64) for _, part in chunks_of(weights.T, (4, 4, 4))]
    np.testing.assert_allclose(sums, expected)


@pytest.mark.parametrize(
    ("weight", "why"),
    [
        (-1e-9, "map.nii holds negative weights; a sampling map must be at least 0"),
        (np.nan, "map.nii holds NaN or infinite weights; a sampling map must be finite"),
        (np.inf, "map.nii holds NaN or infinite weights; a sampling map must be finite"),
    ],
)
def test_negative_and_infinite_weights_and_nan_are_refused(weight: float, why: str) -> None:
    with pytest.raises(SamplingError, match=why):
        check_weights(np.array([0, 1, weight]), "map.nii")


def test_a_sampling_map_of_several_channels_is_refused() -> None:
    with pytest.raises(SamplingError, match=r"map.nii: a sampling map has one channel, not 2"):
        index_builder(record_of(np.zeros((2, 2, 2, 2)), (1, 2, 2, 2), "sampling"), "map.nii")


@given(shape=st.tuples(*[st.integers(1, 7)] * 3), chunk=st.tuples(*[st.integers(1, 4)] * 3))
def test_the_chunks_of_a_grid_cover_each_voxel_once_in_stored_order(
    shape: tuple[int, int, int], chunk: tuple[int, int, int]
) -> None:
    grid = ChunkGrid(shape, chunk)
    covered = np.zeros(shape, int)
    for number, box in enumerate(grid.boxes()):
        covered[box.to_slices()] += 1
        assert box == grid.box(number)
    assert (covered == 1).all()
    starts = [box.index[::-1] for box in grid.boxes()]
    assert starts == sorted(starts)
    assert len(grid) == len(starts)


def test_a_sum_table_leaves_out_chunks_without_mass() -> None:
    table = sum_table(np.array([0.0, 2.0, 0.0, 3.0]))
    assert isinstance(table, MassTable)
    assert table.chunk_id.tolist() == [1, 3]
    assert table.mass.tolist() == [2, 3]
