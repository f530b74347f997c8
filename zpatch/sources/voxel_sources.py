"""Three sources of voxels: sharded arrays, arrays in memory, Dask expressions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np

from zpatch.chunks.file_mark import FileMark
from zpatch.chunks.gather import gather, writes_directly
from zpatch.chunks.gather_plan import GatherPlan, memory_order
from zpatch.chunks.mapped_memory import read_mapped
from zpatch.chunks.scaling import Scaling
from zpatch.chunks.sharded_array import ShardedArray
from zpatch.geometry.boxes import PatchLocation, Triple, Voxels, reversed_axes, stored_corners
from zpatch.records.names import ROOT_DOCUMENT
from zpatch.runtime import buffer_pool
from zpatch.sources.group_read import read_boxes
from zpatch.sources.input_files import MappedView, inputs_of_graph, mark_of_map
from zpatch.sources.lazy_array import LazyArray
from zpatch.sources.voxel_source import (
    FALLBACK_CHUNK_VOXELS,
    Graph,
    ReadTasks,
    Request,
    Shape,
    VoxelSource,
    WrappedSource,
)
from zpatch.sources.zarr_images import evenly_spaced, metadata_mark, sampled_files
from zpatch.work_counts import Work, during

DERIVED_BLOCK_VOXELS = 64


@dataclass(frozen=True, slots=True, eq=False)
class _ArrayLike(VoxelSource):
    """The voxels of an array-like object with a ``shape`` (C, I, J, K) and a ``dtype``.

    ``channels`` are the numbers of those that are read; None for all.
    """

    array: Any
    channels: tuple[int, ...] | None = field(default=None, kw_only=True)

    @property
    def shape(self) -> Shape:
        """Extent (C, I, J, K)."""
        c, i, j, k = self.array.shape
        return c if self.channels is None else len(self.channels), i, j, k

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the unscaled voxels, in native byte order."""
        return self.array.dtype.newbyteorder("=")  # type: ignore[no-any-return]

    def selected(self, channels: Sequence[int]) -> VoxelSource:
        """The source of some channels, in this order. Chunks that hold no others are not read."""
        known = range(self.shape[0]) if self.channels is None else self.channels
        return dataclasses.replace(self, channels=tuple(known[number] for number in channels))


@dataclass(frozen=True, slots=True)
class ShardSource(_ArrayLike):
    """The voxels of an array in chunks; ``axes`` names its stored axes: c, z, y and x in any order."""

    array: ShardedArray
    axes: str = "czyx"

    @property
    def _order(self) -> list[int]:
        """The number of the stored axis for each of C, I, J and K."""
        return [self.axes.index(name) for name in "cxyz"]

    @property
    def shape(self) -> Shape:
        """Extent (C, I, J, K)."""
        c, i, j, k = (self.array.shape[axis] for axis in self._order)
        return c if self.channels is None else len(self.channels), i, j, k

    @property
    def chunk_shape(self) -> Triple:
        """Extent of a chunk."""
        _, i, j, k = (self.array.chunks[axis] for axis in self._order)
        return i, j, k

    def tasks(
        self, boxes: Sequence[PatchLocation], outs: Sequence[Voxels], scaling: Scaling, parts: int
    ) -> ReadTasks:
        """One task for each of about equal parts of the chunks; no chunk is in two of them."""
        order = ["czyx".index(name) for name in self.axes]
        runs = list(runs_of(self.channels or range(self.shape[0])))
        corners = [stored_corners(boxes, channels) for channels, _ in runs]
        first, stop = (np.concatenate(corner)[:, order] for corner in zip(*corners, strict=True))
        views = [reversed_axes(out[at]).transpose(order) for _, at in runs for out in outs]
        plans = GatherPlan.of(self.array, first, stop, memory_order(views)).split(parts)
        if all(writes_directly(self.array, out.dtype, scaling) for out in outs):
            return ReadTasks([(partial(gather, self.array, plan, views, scaling),) for plan in plans])
        raw = [buffer_pool.empty(view.shape, self.array.dtype) for view in views]
        reads: Graph = {(id(raw), n): (partial(gather, self.array, p, raw),) for n, p in enumerate(plans)}
        return ReadTasks([(partial(_cast, raw, views, scaling), list(reads))], reads)

    def marks(self) -> tuple[FileMark, ...]:
        """The mark of the array's metadata; for an image of a store, it is made now."""
        if self.array.fill is not None:
            return () if self.array.metadata is None else (self.array.metadata,)
        marks = [FileMark.of_metadata(f / ROOT_DOCUMENT) for f in (self.array.path, self.array.path.parent)]
        return tuple(mark for mark in marks if mark is not None)

    def sampled_files(self) -> list[Path]:
        """The files of up to 16 shards."""
        return [self.array.shard_file(place) for place in evenly_spaced(self.array.shard_grid)]

    def dask(self, block_voxels: int | None = None) -> Any:
        """A dask array with one block for each shard, or for chunks of about ``block_voxels`` a side.

        All channels are in one block, because they are read together.
        """
        blocks = [self.shape[0], *(self.array.shards[axis] for axis in self._order[1:])]
        if block_voxels is not None:
            blocks[1:] = [max(1, block_voxels // n) * n for n in self.chunk_shape]
        return dask_view(self, blocks)


@dataclass(frozen=True, slots=True, eq=False)
class ArraySource(_ArrayLike):
    """The voxels of an array (C, I, J, K) in memory, or mapped from a file, which then has a ``mark``.

    To another process a mapped array is sent as the place of its voxels in the file, which is mapped there.
    """

    array: Voxels
    mark: FileMark | None = None

    @classmethod
    def of(cls, array: Voxels) -> Self:
        """The source of an array, which may be a view of a memory map."""
        return cls(array, mark_of_map(array))

    def __reduce__(self) -> tuple[Any, ...]:
        if self.mark is None:
            return _array_source, (self.array, self.channels)
        return _mapped_source, (MappedView.of(self.array, self.mark), self.channels)

    def marks(self) -> tuple[FileMark, ...]:
        """The mark of the file that the array is mapped from."""
        return () if self.mark is None else (self.mark,)

    @property
    def chunk_shape(self) -> Triple:
        """A cube of the size of a usual chunk."""
        return (FALLBACK_CHUNK_VOXELS,) * 3

    def tasks(
        self, boxes: Sequence[PatchLocation], outs: Sequence[Voxels], scaling: Scaling, parts: int
    ) -> ReadTasks:
        """One task for each part of the boxes."""
        shares = [(boxes[n::parts], outs[n::parts]) for n in range(parts)]
        return ReadTasks([(partial(self._copy, *share, scaling),) for share in shares])

    def _copy(self, boxes: Sequence[PatchLocation], outs: Sequence[Voxels], scaling: Scaling) -> None:
        for box, out in zip(boxes, outs, strict=True):
            for channels, at in runs_of(self.channels or range(self.shape[0])):
                with during(Work.FETCHING):
                    voxels = self.array[(slice(channels.start, channels.stop), *box.to_slices())]
                    if self.mark is not None and isinstance(self.array, np.ndarray):
                        voxels = read_mapped(voxels, self.mark.path)
                scaling.write(voxels, out[at])

    def dask(self, block_voxels: int | None = None) -> Any:
        """A dask array in blocks of 128 voxels a side."""
        return dask_view(self, [self.shape[0], *(block_voxels or 128,) * 3])


@dataclass(frozen=True, slots=True, eq=False)
class LazySource(ArraySource):
    """The voxels of an array of another library, which reads each box when it is needed.

    ``mark`` is that of its file, as far as it is known. Its library may be unable to send it to a process.
    """

    array: Any

    @classmethod
    def of(cls, array: Any) -> Self:
        """The source of an array that is sliced as those of numpy are."""
        lazy = LazyArray(array)
        return cls(lazy, None if lazy.file is None else FileMark.of_voxels(lazy.file))

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(LazySource, channels=self.channels), (self.array, self.mark)

    @property
    def chunk_shape(self) -> Triple:
        """Extent of the array's chunks, or a cube of the size of a usual chunk."""
        i, j, k = self.array.chunk_shape or (FALLBACK_CHUNK_VOXELS,) * 3
        return i, j, k


@dataclass(frozen=True, slots=True, eq=False)
class DaskSource(_ArrayLike):
    """The voxels of any Dask expression (C, I, J, K), computed when a box is read.

    ``files`` are the marks of the files that it is computed from, as far as they are known. They are checked
    after each read, as zarr reads an array that is not there as its fill value. ``chunk_files`` are some
    files of its Zarr arrays; ``sources`` are the sources of zpatch that it is computed from.
    """

    array: Any
    files: tuple[FileMark, ...] = ()
    chunk_files: tuple[Path, ...] = ()
    sources: tuple[VoxelSource, ...] = ()

    @classmethod
    def of(cls, array: Any) -> Self:
        """The source of an expression, with the files that are found in its graph."""
        zarrays, maps, sources = inputs_of_graph(array)
        marks = [*map(metadata_mark, zarrays), *map(mark_of_map, maps)]
        files = tuple(dict.fromkeys(mark for mark in marks if mark is not None))
        chunk_files = tuple(file for each in zarrays for file in sampled_files(each))
        return cls(array, files, chunk_files, tuple(sources))

    def marks(self) -> tuple[FileMark, ...]:
        """Those of the files, and of the sources."""
        return (*self.files, *(mark for source in self.sources for mark in source.marks()))

    def sampled_files(self) -> list[Path]:
        """Those of the Zarr arrays, and of the sources."""
        return [*self.chunk_files, *(file for source in self.sources for file in source.sampled_files())]

    @property
    def chunk_shape(self) -> Triple:
        """Extent of the largest block."""
        _, i, j, k = self.array.chunksize
        return i, j, k

    def tasks(
        self, boxes: Sequence[PatchLocation], outs: Sequence[Voxels], scaling: Scaling, parts: int
    ) -> ReadTasks:
        """The tasks of the expression for these boxes only, and one task to write each box."""
        return _derived_tasks([Request(self, boxes, outs, scaling)])

    @classmethod
    def tasks_together(cls, requests: Sequence[Request], parts: int) -> list[ReadTasks]:
        """The tasks of several expressions, optimised together: shared blocks are computed once."""
        return [_derived_tasks(requests)]

    def selected(self, channels: Sequence[int]) -> VoxelSource:
        """The source of the expression for some channels."""
        return DaskSource.of(self.array[list(channels)])

    def dask(self, block_voxels: int | None = None) -> Any:
        """The expression itself."""
        return self.array


def runs_of(channels: Sequence[int]) -> Iterator[tuple[range, slice]]:
    """Runs of channels that follow each other, each with its place among ``channels``.

    >>> list(runs_of([2, 3, 4, 0, 0]))
    [(range(2, 5), slice(0, 3, None)), (range(0, 1), slice(3, 4, None)), (range(0, 1), slice(4, 5, None))]
    """
    begin = 0
    for stop in range(1, len(channels) + 1):
        if stop == len(channels) or channels[stop] != channels[stop - 1] + 1:
            yield range(channels[begin], channels[stop - 1] + 1), slice(begin, stop)
            begin = stop


def _array_source(array: Voxels, channels: tuple[int, ...] | None) -> ArraySource:
    return ArraySource(array, channels=channels)


def _mapped_source(view: MappedView, channels: tuple[int, ...] | None) -> ArraySource:
    return ArraySource(view.open(), view.mark, channels=channels)


def _cast(raw: Sequence[Voxels], outs: Sequence[Voxels], scaling: Scaling, _parts: Any) -> None:
    for voxels, out in zip(raw, outs, strict=True):
        scaling.write(voxels, out)


def _derived_tasks(requests: Sequence[Request]) -> ReadTasks:
    from dask.highlevelgraph import HighLevelGraph

    parts = [
        (
            request.source.dask()[(slice(None), *box.to_slices())],
            out,
            request.scaling,
            getattr(request.source, "files", ()),
        )
        for request in requests
        for box, out in zip(request.boxes, request.outs, strict=True)
    ]
    if not parts:
        return ReadTasks([])
    keys = [part.__dask_keys__() for part, *_ in parts]
    merged = HighLevelGraph.merge(*(part.__dask_graph__() for part, *_ in parts))
    writes = []
    for (part, *target), blocks in zip(parts, keys, strict=True):
        writes.append((partial(_put, *part.__dask_postcompute__(), *target), blocks))
    return ReadTasks(writes, dict(parts[0][0].__dask_optimize__(merged, keys)), Work.FETCHING)


def _put(
    finish: Callable[..., Any],
    extra: Any,
    out: Voxels,
    scaling: Scaling,
    files: Sequence[FileMark],
    blocks: Any,
) -> None:
    for file in files:
        file.check("a dask array")
    scaling.write(np.asarray(finish(blocks, *extra)), out)


def dask_view(source: VoxelSource, blocks: Sequence[int]) -> Any:
    """A dask array of a source, in blocks of some extent (C, I, J, K)."""
    import dask.array as da

    chunks = tuple(min(n, b) for n, b in zip(source.shape, blocks, strict=True))
    return da.from_array(_BoxView(source), chunks=chunks, asarray=True, fancy=False, name=False)


class _BoxView(WrappedSource):
    """A source as ``dask.array.from_array`` takes it: with ``ndim``, and slicing as in numpy."""

    @property
    def ndim(self) -> int:
        return 4

    def __getitem__(self, key: tuple[slice | int, ...]) -> Voxels:
        whole = tuple(slice(k, k + 1) if isinstance(k, int | np.integer) else k for k in key)
        ranges = [range(n)[s] for s, n in zip(whole, self.shape, strict=True)]
        if not all(ranges):
            return np.empty([len(r) for r in ranges], dtype=self.dtype)
        lows = [min(r[0], r[-1]) for r in ranges]
        stops = [max(r[0], r[-1]) + 1 for r in ranges]
        voxels = read_boxes(self.source, [PatchLocation.between(lows[1:], stops[1:])])[0]
        lows[0] = 0
        picked = voxels[np.ix_(*(np.array(r) - low for r, low in zip(ranges, lows, strict=True)))]
        dropped = tuple(axis for axis, k in enumerate(key) if not isinstance(k, slice))
        return np.asarray(picked.squeeze(dropped))
