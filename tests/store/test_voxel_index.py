"""The index of a map: its counts and sums are numpy's, and voxels drawn through it follow the exact law."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import scipy.stats
import zarr
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import zpatch as zp
from zpatch.errors import SamplingError
from zpatch.geometry.boxes import PatchLocation
from zpatch.sampling.centre_draws import AllowedMass, ReadChunks, draw_centres
from zpatch.store.image_record import ImageRecord, Kind
from zpatch.store.voxel_index import (
    ChunkGrid,
    LabelIndexBuilder,
    LabelTable,
    MassTable,
    check_weights,
    index_builder,
    sum_masses,
    sum_table,
)

EYE = tuple(map(tuple, np.eye(4).tolist()))
DRAWS = 20_000


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
    """The index of voxels (c, z, y, x) that came chunk by chunk, last one first."""
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
def test_the_index_of_several_channels_counts_what_is_not_zero_in_each(
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


def test_values_are_those_after_slope_and_intercept() -> None:
    voxels = np.array([0, 1, 1, 2], np.uint8).reshape(1, 1, 1, 4)
    builder = index_builder(record_of(voxels, (1, 1, 1, 4), "label", slope=10, inter=-5), "map.nii")
    builder.update(voxels, (0, 0, 0, 0))
    assert builder.statistics() == {"labels": {"-5": 1, "5": 2, "15": 1}}


def test_some_values_together_are_a_table_of_the_chunks_that_hold_any(rng: np.random.Generator) -> None:
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
def test_an_index_merged_from_states_is_that_of_one_pass_in_any_order(
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


def test_a_table_lists_chunks_in_their_order_whenever_they_came(rng: np.random.Generator) -> None:
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
def test_weights_that_are_no_weights_are_refused(weight: float, why: str) -> None:
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


def draws(
    masses: NDArray[Any], chunk: int, allowed: PatchLocation, *, count: int = DRAWS, seed: int = 0
) -> NDArray[np.int64] | None:
    """Centres drawn from masses (I, J, K) through an index of its chunks."""
    reach, read = reach_of(masses, chunk, allowed)
    return draw_centres([(reach, count)], read, np.random.default_rng(seed))[0]


def reach_of(masses: NDArray[Any], chunk: int, allowed: PatchLocation) -> tuple[AllowedMass, ReadChunks]:
    """What is drawn from, and how its chunks are read."""
    grid = ChunkGrid(masses.shape, (chunk, chunk, chunk))  # type: ignore[arg-type]

    def read(boxes: Sequence[PatchLocation]) -> list[NDArray[Any]]:
        return [masses[None, *box.to_slices()] for box in boxes]

    return AllowedMass(sum_masses(grid, read, channel), grid, allowed, channel), read


def channel(voxels: NDArray[Any]) -> NDArray[Any]:
    """The only channel of voxels (1, I, J, K)."""
    return np.asarray(voxels[0])


def follow(found: NDArray[np.int64] | None, masses: NDArray[Any], allowed: PatchLocation) -> bool:
    """Whether draws follow the masses inside a box, by a chi-square test; elsewhere there is none."""
    assert found is not None
    law = np.zeros(masses.shape)
    law[allowed.to_slices()] = masses[allowed.to_slices()]
    law /= law.sum()
    seen = np.bincount(np.ravel_multi_index(tuple(found.T), law.shape), minlength=law.size).reshape(law.shape)
    assert not seen[law == 0].any()
    if (law > 0).sum() == 1:
        return True
    return bool(scipy.stats.chisquare(seen[law > 0], law[law > 0] * len(found)).pvalue > 1e-3)


WHOLE = PatchLocation((0, 0, 0), (7, 8, 9))
BOXES = [
    WHOLE,
    PatchLocation((1, 1, 1), (5, 6, 7)),  # whole chunks inside: draws are rejected
    PatchLocation((2, 3, 1), (2, 3, 2)),  # no whole chunk inside: the part inside is counted
    PatchLocation((0, 0, 5), (7, 1, 1)),
    PatchLocation((3, 4, 5), (1, 1, 1)),
]


@pytest.mark.parametrize("allowed", BOXES, ids=str)
@pytest.mark.parametrize("chunk", [1, 2, 3, 16])
@pytest.mark.parametrize("kind", ["weights", "counts", "members"])
def test_centres_are_drawn_by_their_masses(
    rng: np.random.Generator, allowed: PatchLocation, chunk: int, kind: str
) -> None:
    masses = rng.integers(1, 5, WHOLE.size).astype(np.uint8)
    masses[rng.random(WHOLE.size) < 0.3] = 0
    masses[3, 4, 5] = 1
    if kind == "weights":
        masses = masses * rng.uniform(0.2, 1, WHOLE.size).astype(np.float32)
    if kind == "members":
        masses = masses > 0
    assert follow(draws(masses, chunk, allowed), masses, allowed)


def test_chunks_of_very_unequal_mass_are_drawn_by_their_masses() -> None:
    masses = np.zeros(WHOLE.size)
    masses[0], masses[3, 2, 2], masses[3, 2, 3] = 1e9, 3, 1  # almost all of it lies outside the box
    allowed = PatchLocation((1, 1, 1), (5, 6, 7))
    assert follow(draws(masses, 2, allowed), masses, allowed)


def test_a_volume_of_many_chunks_of_which_one_has_mass_is_drawn_from() -> None:
    masses = np.zeros((20, 20, 20), bool)
    masses[10, 11, 12] = True
    allowed = PatchLocation((5, 5, 5), (10, 10, 10))
    found = draws(masses, 2, allowed, count=10)
    assert found is not None
    assert found.tolist() == [[10, 11, 12]] * 10


@pytest.mark.parametrize("chunk", [2, 3, 16])
@pytest.mark.parametrize("outside", [(0, 0, 0), (6, 7, 8), (0, 4, 4), (2, 4, 4), (3, 4, 8)])
def test_where_no_allowed_voxel_has_any_mass_there_is_no_draw(
    chunk: int, outside: tuple[int, int, int]
) -> None:
    masses = np.zeros(WHOLE.size)
    masses[outside] = 1
    assert draws(masses, chunk, PatchLocation((3, 3, 3), (2, 2, 2)), count=5) is None


def test_no_draws_are_no_centres() -> None:
    found = draws(np.ones(WHOLE.size), 2, WHOLE, count=0)
    assert found is not None
    assert found.shape == (0, 3)


def test_the_same_generator_gives_the_same_centres(rng: np.random.Generator) -> None:
    masses = rng.random(WHOLE.size)
    one, same, other = (draws(masses, 3, WHOLE, count=50, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)  # type: ignore[arg-type]


def often_rejected() -> tuple[NDArray[Any], PatchLocation]:
    """Masses of which an eighth lies inside a box, a part of it in whole chunks of 2: some hundreds of draws
    have one that is rejected 32 times."""
    masses, allowed = np.full((10, 10, 10), 7.0), PatchLocation((1, 1, 1), (8, 8, 8))
    masses[allowed.to_slices()] = 1
    return masses, allowed


def test_what_was_drawn_before_does_not_change_a_draw() -> None:
    masses, allowed = often_rejected()
    reach, read = reach_of(masses, 2, allowed)

    def drawn(count: int, seed: int) -> NDArray[np.int64] | None:
        return draw_centres([(reach, count)], read, np.random.default_rng(seed))[0]

    few, many = drawn(10, 1), drawn(DRAWS, 2)
    np.testing.assert_array_equal(drawn(DRAWS, 2), many)
    np.testing.assert_array_equal(drawn(10, 1), few)
    np.testing.assert_array_equal(draws(masses, 2, allowed, seed=2), many)
    assert follow(many, masses, allowed)


def test_the_mass_inside_is_counted_once_for_all_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    masses, allowed = often_rejected()
    reach, read = reach_of(masses, 2, allowed)
    counted = []
    count = AllowedMass._count
    monkeypatch.setattr(AllowedMass, "_count", lambda self, read: counted.append(self) or count(self, read))
    for seed in range(3):
        draw_centres([(reach, 1000), (reach, 1000)], read, np.random.default_rng(seed))
    assert counted == [reach]


def test_a_chunk_that_draws_share_is_read_once(rng: np.random.Generator) -> None:
    masses = rng.random((8, 8, 8))
    grid = ChunkGrid((8, 8, 8), (4, 4, 4))
    read: list[PatchLocation] = []

    def read_chunks(boxes: Sequence[PatchLocation]) -> list[NDArray[Any]]:
        read.extend(boxes)
        return [masses[None, *box.to_slices()] for box in boxes]

    table = sum_table(np.array([masses[box.to_slices()].sum() for box in grid.boxes()]))
    reach = AllowedMass(table, grid, PatchLocation((0, 0, 0), (8, 8, 8)), channel)
    draw_centres([(reach, 500), (reach, 500)], read_chunks, rng)
    assert len(read) == 8


def test_a_sum_table_leaves_out_chunks_without_mass() -> None:
    table = sum_table(np.array([0.0, 2.0, 0.0, 3.0]))
    assert isinstance(table, MassTable)
    assert table.chunk_id.tolist() == [1, 3]
    assert table.mass.tolist() == [2, 3]
