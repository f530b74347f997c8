"""An index of the labels or weights in each chunk of a map, to draw voxels without reading the whole map."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zpatch.chunks.layout import chunk_counts
from zpatch.digests import FileSeal, Json
from zpatch.errors import DamageError, SamplingError, SourceError
from zpatch.geometry.boxes import PatchLocation, Triple, padded_to_4d
from zpatch.records.image_record import ImageRecord
from zpatch.records.names import INDEX
from zpatch.store.store import read_small_array
from zpatch.store.value_counts import byte_counts

MAX_LABELS = 2**20  # an index of so many takes about 700 MiB to build

Masses = NDArray[Any]


@dataclass(frozen=True, slots=True)
class ChunkGrid:
    """The spatial chunks of a map, numbered in C order of (z, y, x); shapes are (I, J, K)."""

    spatial_shape: Triple
    chunk_shape: Triple

    @property
    def counts(self) -> Triple:
        """Number of chunks along I, J, K."""
        i, j, k = chunk_counts(self.spatial_shape, self.chunk_shape)
        return i, j, k

    def __len__(self) -> int:
        i, j, k = self.counts
        return i * j * k

    def origins(self, chunks: NDArray[np.int64]) -> NDArray[np.int64]:
        """First voxels (n, 3) of the chunks of these numbers."""
        k, j, i = np.unravel_index(chunks, self.counts[::-1])
        return np.asarray(np.stack([i, j, k], axis=1) * np.array(self.chunk_shape))

    def box(self, chunk: int) -> PatchLocation:
        """The voxels of a chunk, clipped to the map."""
        i, j, k = self.origins(np.array([chunk]))[0].tolist()
        return PatchLocation((i, j, k), self.chunk_shape).clipped(self.spatial_shape)

    def boxes(self) -> Iterator[PatchLocation]:
        """All chunks in order."""
        return (self.box(chunk) for chunk in range(len(self)))


@dataclass(frozen=True, slots=True, eq=False)
class MassTable:
    """The mass of one class (voxels) or one map (weights) in each chunk that has any."""

    chunk_id: NDArray[np.int64]
    mass: NDArray[np.float64]

    def select(self, keep: NDArray[np.bool_]) -> MassTable:
        """The table of the chunks where ``keep`` is true."""
        return MassTable(self.chunk_id[keep], self.mass[keep])


@dataclass(frozen=True, slots=True, eq=False)
class LabelTable:
    """A label index: for each value (or channel), the chunks that hold it and its voxels in each of them.

    A compressed sparse row table: row ``r`` is value ``values[r]``, in the entries ``row_start[r]`` to
    ``row_start[r + 1]`` of ``chunk_id`` and ``count``. Chunks are numbered in C order of the stored array,
    the channel axis included.
    """

    values: NDArray[np.int64]
    row_start: NDArray[np.int64]
    chunk_id: NDArray[np.int64]
    count: NDArray[np.int64]

    def is_sound(self) -> bool:
        """Whether rows and columns fit each other, as in any table that was built here."""
        columns = (self.values, self.row_start, self.chunk_id, self.count)
        if not all(column.ndim == 1 and column.dtype == np.int64 for column in columns):
            return False
        starts, entries = self.row_start, len(self.chunk_id)
        return (
            len(starts) == len(self.values) + 1
            and starts[0] == 0
            and int(starts[-1]) == entries == len(self.count)
            and bool((np.diff(starts) > 0).all() and (self.chunk_id >= 0).all() and (self.count > 0).all())
        )

    def voxel_counts(self) -> dict[int, int]:
        """How many voxels each value has in the whole map."""
        if not self.count.size:
            return {}
        totals = np.add.reduceat(self.count, self.row_start[:-1])
        return dict(zip(self.values.tolist(), totals.tolist(), strict=True))

    def table(self, values: list[int], spatial_chunks: int) -> MassTable:
        """The number of voxels in each chunk that have any of these values."""
        rows = [slice(*self.row_start[r : r + 2]) for r in np.flatnonzero(np.isin(self.values, values))]
        chunks = [self.chunk_id[row] % spatial_chunks for row in rows]
        counts = [self.count[row] for row in rows]
        if not rows:
            return MassTable(np.zeros(0, np.int64), np.zeros(0))
        chunk_id, inverse = np.unique(np.concatenate(chunks), return_inverse=True)
        masses = np.bincount(inverse, np.concatenate(counts).astype(np.float64))
        return MassTable(chunk_id, masses.astype(np.float64))


class IndexBuilder:
    """Builds the index of an image from its chunks, in any order; the base class builds an empty index."""

    def __init__(self, record: ImageRecord, where: str) -> None:
        self._record = record
        self._where = where
        self._chunks = padded_to_4d(record.chunks)
        self._grid = chunk_counts(record.shape_czyx, self._chunks)

    def update(self, voxels: NDArray[Any], first: tuple[int, int, int, int]) -> None:
        """Add voxels (c, z, y, x) of whole chunks; the first voxel is at ``first`` (c, z, y, x)."""
        corner = np.floor_divide(first, self._chunks)
        for position in np.ndindex(chunk_counts(voxels.shape, self._chunks)):
            box = tuple(slice(p * c, (p + 1) * c) for p, c in zip(position, self._chunks, strict=True))
            chunk = np.ravel_multi_index(tuple(corner + position), self._grid)
            self._add_chunk(int(chunk), voxels[box])

    def _add_chunk(self, chunk: int, voxels: NDArray[Any]) -> None:
        """Add the voxels of one chunk."""

    def state(self) -> dict[str, NDArray[Any]]:
        """The index of the chunks so far, as small arrays that can be stored and merged."""
        return {}

    def merge(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Add the ``state`` of other chunks of the same image: the tables are those of a single pass."""

    def tables(self) -> dict[str, NDArray[Any]]:
        """The index as tables to store."""
        return {}

    def statistics(self) -> Json:
        """The statistics of the image that follow from its index."""
        return {}


class _NoIndex(IndexBuilder):
    """The builder of an image that needs no index."""

    def update(self, voxels: NDArray[Any], first: tuple[int, int, int, int]) -> None:
        """Do nothing."""


class LabelIndexBuilder(IndexBuilder):
    """Counts each value in each chunk; in a map of several channels, the voxels of each that are not zero."""

    def __init__(self, record: ImageRecord, where: str) -> None:
        super().__init__(record, where)
        self._rows: dict[int, tuple[list[int], list[int]]] = {}
        self._slope, self._inter = int(record.slope), int(record.inter)  # labels are whole numbers

    def update(self, voxels: NDArray[Any], first: tuple[int, int, int, int]) -> None:
        """Add voxels of whole chunks; bytes in rows of chunks, so that memory is read in order."""
        if self._grid[0] > 1 or voxels.dtype.itemsize > 1:
            super().update(voxels, first)
            return
        labels = np.arange(256, dtype=np.uint8).view(voxels.dtype).tolist()  # of each byte
        _, depth, height, width = self._chunks
        for z, y in itertools.product(range(0, voxels.shape[1], depth), range(0, voxels.shape[2], height)):
            counts = byte_counts(voxels[:, z : z + depth, y : y + height], width)
            corner = np.floor_divide((0, first[1] + z, first[2] + y, first[3]), self._chunks)
            chunk = int(np.ravel_multi_index(tuple(corner), self._grid))
            for number, byte in np.argwhere(counts).tolist():
                value = labels[byte] * self._slope + self._inter
                self._add(value, [chunk + number], [int(counts[number, byte])])

    def _add_chunk(self, chunk: int, voxels: NDArray[Any]) -> None:
        if self._grid[0] > 1:
            spatial_chunks = self._grid[1] * self._grid[2] * self._grid[3]
            if present := int(np.count_nonzero(voxels)):
                self._add(chunk // spatial_chunks, [chunk], [present])
            return
        for value, count in zip(*_value_counts(voxels), strict=True):
            self._add(value * self._slope + self._inter, [chunk], [count])

    def _add(self, value: int, new_chunks: list[int], new_counts: list[int]) -> None:
        if not -(2**63) <= value < 2**63:
            raise SourceError(f"{self._where}: the label value {value} does not fit 64 bits; relabel it")
        if len(self._rows) >= MAX_LABELS and value not in self._rows:
            raise SourceError(
                f"{self._where}: it has over {MAX_LABELS} different values; say label_patterns= if this is "
                f"no label map"
            )
        chunks, counts = self._rows.setdefault(value, ([], []))
        chunks += new_chunks
        counts += new_counts

    def state(self) -> dict[str, NDArray[Any]]:
        """The columns of the table so far."""
        return self.tables()

    def merge(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Add the table of other chunks."""
        chunks, counts = state["chunk_id"].tolist(), state["count"].tolist()
        for value, (a, b) in zip(
            state["values"].tolist(), itertools.pairwise(state["row_start"].tolist()), strict=True
        ):
            self._add(value, chunks[a:b], counts[a:b])

    def table(self) -> LabelTable:
        """The index of all chunks, whatever the order in which they were added."""
        values = sorted(self._rows)
        columns = [self._rows[value] for value in values]
        starts = np.cumsum([0, *(len(chunks) for chunks, _ in columns)])
        ids = np.array([c for chunks, _ in columns for c in chunks], dtype=np.int64)
        counts = np.array([c for _, counts in columns for c in counts], dtype=np.int64)
        order = np.lexsort((ids, np.repeat(np.arange(len(values)), np.diff(starts))))
        return LabelTable(
            np.array(values, dtype=np.int64), starts.astype(np.int64), ids[order], counts[order]
        )

    def tables(self) -> dict[str, NDArray[Any]]:
        """The columns of the table."""
        table = self.table()
        return {
            "values": table.values,
            "row_start": table.row_start,
            "chunk_id": table.chunk_id,
            "count": table.count,
        }

    def statistics(self) -> Json:
        """How many voxels each value has."""
        counts = self.table().voxel_counts()
        return {"labels": {str(value): count for value, count in counts.items()}}


def _value_counts(voxels: NDArray[Any]) -> tuple[list[int], list[int]]:
    if voxels.dtype.itemsize == 2 and voxels.min() >= 0:
        counts = np.bincount(voxels.reshape(-1))
        values = np.flatnonzero(counts)
        return values.tolist(), counts[values].tolist()
    values, counts = np.unique(voxels, return_counts=True)
    return values.tolist(), counts.tolist()


class WeightIndexBuilder(IndexBuilder):
    """Sums the weights of each chunk."""

    def __init__(self, record: ImageRecord, where: str) -> None:
        super().__init__(record, where)
        if self._grid[0] > 1:
            raise SamplingError(f"{where}: a sampling map has one channel, not {self._grid[0]}")
        self._sums: dict[int, float] = {}

    def _add_chunk(self, chunk: int, voxels: NDArray[Any]) -> None:
        weights = voxels * np.float64(self._record.slope) + self._record.inter
        check_weights(weights, self._where)
        self._sums[chunk] = float(weights.sum())

    def state(self) -> dict[str, NDArray[Any]]:
        """The numbers of the chunks so far, and the sum of each."""
        return {
            "chunk_id": np.array([*self._sums], dtype=np.int64),
            "sum": np.array([*self._sums.values()], dtype=np.float64),
        }

    def merge(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Add the sums of other chunks."""
        self._sums.update(zip(state["chunk_id"].tolist(), state["sum"].tolist(), strict=True))

    def tables(self) -> dict[str, NDArray[Any]]:
        """The sum of each chunk, in order."""
        sums = np.zeros(math.prod(self._grid))
        sums[[*self._sums]] = [*self._sums.values()]
        return {"sum": sums}


_BUILDERS: dict[str, type[IndexBuilder]] = {
    "scalar": _NoIndex,
    "label": LabelIndexBuilder,
    "sampling": WeightIndexBuilder,
}


def index_builder(record: ImageRecord, where: str) -> IndexBuilder:
    """The index builder for the kind of an image; ``where`` names its file in errors."""
    return _BUILDERS[record.kind](record, where)


def sum_table(sums: NDArray[np.float64]) -> MassTable:
    """The table of a weight index; ``sums`` has the sum of each chunk, in order."""
    chunk_id = np.flatnonzero(sums)
    return MassTable(chunk_id, sums[chunk_id])


def sum_masses(
    grid: ChunkGrid,
    read: Callable[[Sequence[PatchLocation]], Sequence[Masses]],
    masses_of: Callable[[Masses], Masses],
) -> MassTable:
    """Build a table by reading a map once, chunk by chunk; ``masses_of`` gives the mass of each voxel."""
    return sum_table(np.array([masses_of(read([box])[0]).sum(dtype=np.float64) for box in grid.boxes()]))


def check_weights(weights: NDArray[Any], where: str) -> None:
    """Raise ``SamplingError`` unless all weights are finite and at least 0."""
    if not np.isfinite(weights).all():
        raise SamplingError(f"{where} holds NaN or infinite weights; a sampling map must be finite")
    if (weights < 0).any():
        raise SamplingError(f"{where} holds negative weights; a sampling map must be at least 0")


def read_label_table(folder: Path, files: Mapping[str, FileSeal]) -> LabelTable:
    """The label index of a stored image."""
    values, row_start, chunk_id, count = (
        read_small_array(folder, f"{INDEX}/{name}", files)
        for name in ("values", "row_start", "chunk_id", "count")
    )
    table = LabelTable(values, row_start, chunk_id, count)
    if not table.is_sound():
        raise DamageError(f"damaged store: {folder / INDEX} is no label index; convert the image again")
    return table


def read_weight_sums(folder: Path, files: Mapping[str, FileSeal]) -> NDArray[np.float64]:
    """The weight index of a stored sampling map: the sum of weights of each chunk, in order."""
    return read_small_array(folder, f"{INDEX}/sum", files)
