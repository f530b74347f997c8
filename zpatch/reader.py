"""Patch requests -> a Dask graph over just the chunks that cover them -> voxels.

Patches that are read together share their chunks: each chunk is decoded once, into a scratch block that
stays in the processor's cache, and its overlap is copied into every patch that wants it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from zpatch.errors import OptionError
from zpatch.geometry import PatchLocation, Triple
from zpatch.grid import covering_chunks
from zpatch.scheduling import Scheduler, run_graph, thread_count
from zpatch.shards import MappedShard, ShardedArray, open_shard

PADDING_MODES = ("constant", "edge", "reflect", "symmetric", "wrap")
FALLBACK_CHUNK_VOXELS = 64

Voxels = NDArray[Any]
Shape = tuple[int, int, int, int]


class VoxelSource(Protocol):
    """Anything that voxels can be read from; shapes are (C, I, J, K)."""

    @property
    def shape(self) -> Shape:
        """Extent."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the unscaled voxels."""

    @property
    def chunk_shape(self) -> Triple:
        """Extent along I, J, K of what is best read at once."""

    def read(self, boxes: Sequence[PatchLocation], scheduler: Scheduler) -> list[Voxels]:
        """The voxels (C, I, J, K) of some boxes inside, each in memory of its own."""

    def dask(self) -> Any:
        """A lazy dask array of the whole, (C, I, J, K)."""


@dataclass(frozen=True, slots=True)
class ShardSource:
    """The voxels of a stored image."""

    array: ShardedArray

    @property
    def shape(self) -> Shape:
        """Extent (C, I, J, K)."""
        c, z, y, x = self.array.shape
        return c, x, y, z

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the stored voxels."""
        return self.array.dtype

    @property
    def chunk_shape(self) -> Triple:
        """Extent of a chunk."""
        _, z, y, x = self.array.chunks
        return x, y, z

    def read(self, boxes: Sequence[PatchLocation], scheduler: Scheduler = "sync") -> list[Voxels]:
        """Read a group of boxes, each chunk that they touch decoded once."""
        channels = self.array.shape[0]
        first = [(0, *box.index[::-1]) for box in boxes]
        stop = [(channels, *box.index_fin[::-1]) for box in boxes]
        return [out.transpose(0, 3, 2, 1) for out in read_regions(self.array, first, stop, scheduler)]

    def dask(self) -> Any:
        """A dask array with one block for each shard's region."""
        import dask.array as da

        c, z, y, x = self.array.shards
        blocks = tuple(min(n, s) for n, s in zip(self.shape, (c, x, y, z), strict=True))
        return da.from_array(_BoxView(self), chunks=blocks, asarray=True, fancy=False, name=False)


def read_regions(
    array: ShardedArray,
    first: Sequence[Shape],
    stop: Sequence[Shape],
    scheduler: Scheduler = "sync",
) -> list[Voxels]:
    """The stored voxels (c, z, y, x) of some regions, given by first voxel and stop."""
    outs = [np.empty(np.subtract(b, a), dtype=array.dtype) for a, b in zip(first, stop, strict=True)]
    low, high = (np.array(ends, dtype=np.int64).reshape(-1, 4) for ends in (first, stop))
    parts = _CopyPlan.of(array, low, high).split(thread_count(scheduler))
    graph: dict[str, Any] = {
        f"decode-{n}": (_decode_and_copy, array, part, outs) for n, part in enumerate(parts)
    }
    graph["patches"] = (_gathered, outs, list(graph))
    run_graph(graph, "patches", scheduler)
    return outs


@dataclass(frozen=True, slots=True, eq=False)
class _CopyPlan:
    """What goes where: row ``n`` copies a part of a chunk into a part of ``box[n]``.

    Rows of one chunk follow each other. The chunk is number ``within[n]`` of shard number ``shard[n]``.
    ``parts`` is (rows, 4, 4): for c, z, y and x, where it starts and stops in the chunk, then in the box.
    """

    shard: NDArray[np.int64]
    within: NDArray[np.int64]
    box: NDArray[np.int64]
    parts: NDArray[np.int64]

    @classmethod
    def of(cls, array: ShardedArray, first: NDArray[np.int64], stop: NDArray[np.int64]) -> _CopyPlan:
        chunk, box = covering_chunks(first, stop, array.shape, array.chunks)
        position = np.stack(np.unravel_index(chunk, array.chunk_grid), axis=1).reshape(-1, 4)
        shard, within = np.divmod(position, array.chunks_per_shard)
        origin = position * np.array(array.chunks)
        low = np.maximum(origin, first[box])
        high = np.minimum(origin + array.chunks, stop[box])
        parts = np.stack([low - origin, high - origin, low - first[box], high - first[box]], axis=2)
        return cls(
            np.ravel_multi_index(tuple(shard.T), array.shard_grid),
            np.ravel_multi_index(tuple(within.T), array.chunks_per_shard),
            box,
            parts,
        )

    def split(self, parts: int) -> list[_CopyPlan]:
        """The rows in about equal parts, no chunk in two of them."""
        rows = len(self.box)
        if parts == 1 or not rows:
            return [self]
        borders = np.flatnonzero(np.diff(self.within) | np.diff(self.shard)) + 1
        wanted = np.linspace(0, rows, parts + 1)[1:-1]
        edges = np.append(borders, rows)
        cuts = np.unique(edges[np.searchsorted(edges, [*wanted, rows])]).tolist()
        return [
            _CopyPlan(self.shard[a:b], self.within[a:b], self.box[a:b], self.parts[a:b])
            for a, b in itertools.pairwise([0, *cuts])
        ]


def _decode_and_copy(array: ShardedArray, plan: _CopyPlan, outs: list[Voxels]) -> None:
    scratch = np.empty(array.chunks, dtype=array.dtype)
    grid, codec = array.shard_grid, array.codec
    open_shards: dict[int, MappedShard] = {}
    decoded = shard_at_hand = -1
    rows = zip(plan.shard.tolist(), plan.within.tolist(), plan.box.tolist(), plan.parts.tolist(), strict=True)
    for shard, within, box, (c, z, y, x) in rows:
        if within != decoded or shard != shard_at_hand:
            if shard not in open_shards:
                place = tuple(int(n) for n in np.unravel_index(shard, grid))
                open_shards[shard] = open_shard(array, place)
            open_shards[shard].decode(within, codec, scratch)
            decoded, shard_at_hand = within, shard
        outs[box][c[2] : c[3], z[2] : z[3], y[2] : y[3], x[2] : x[3]] = scratch[
            c[0] : c[1], z[0] : z[1], y[0] : y[1], x[0] : x[1]
        ]


def _gathered(outs: list[Voxels], _parts: list[None]) -> list[Voxels]:
    return outs


@dataclass(frozen=True, slots=True, eq=False)
class ArraySource:
    """The voxels of an array in memory or mapped from a file, (C, I, J, K)."""

    array: Voxels

    @property
    def shape(self) -> Shape:
        """Extent (C, I, J, K)."""
        c, i, j, k = self.array.shape
        return c, i, j, k

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the voxels."""
        return np.dtype(self.array.dtype.newbyteorder("="))

    @property
    def chunk_shape(self) -> Triple:
        """A cube of a usual chunk's size."""
        return (FALLBACK_CHUNK_VOXELS,) * 3

    def read(self, boxes: Sequence[PatchLocation], scheduler: Scheduler = "sync") -> list[Voxels]:
        """Copy the boxes, in (z, y, x) memory order as all sources do."""
        return [_in_stored_order(self.array[(slice(None), *box.to_slices())]) for box in boxes]

    def dask(self) -> Any:
        """A dask array in blocks of 128 voxels."""
        import dask.array as da

        chunks = (self.shape[0], *(min(128, n) for n in self.shape[1:]))
        return da.from_array(_BoxView(self), chunks=chunks, asarray=True, fancy=False, name=False)


@dataclass(frozen=True, slots=True, eq=False)
class DaskSource:
    """The voxels of any Dask expression (C, I, J, K), computed where a patch needs them."""

    array: Any

    @property
    def shape(self) -> Shape:
        """Extent (C, I, J, K)."""
        c, i, j, k = self.array.shape
        return c, i, j, k

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the voxels."""
        dtype: np.dtype[Any] = self.array.dtype.newbyteorder("=")
        return dtype

    @property
    def chunk_shape(self) -> Triple:
        """Extent of the largest block."""
        _, i, j, k = self.array.chunksize
        return i, j, k

    def read(self, boxes: Sequence[PatchLocation], scheduler: Scheduler = "sync") -> list[Voxels]:
        """Compute the boxes in one graph, so that blocks they share are computed once."""
        import dask

        slices = [self.array[(slice(None), *box.to_slices())] for box in boxes]
        computed = dask.compute(*slices, scheduler=scheduler)  # type: ignore[attr-defined, no-untyped-call]
        return [_in_stored_order(np.asarray(voxels)) for voxels in computed]

    def dask(self) -> Any:
        """The expression itself."""
        return self.array


def _in_stored_order(voxels: Voxels) -> Voxels:
    """A copy (C, I, J, K) whose memory is (c, z, y, x), in native byte order."""
    native = voxels.dtype.newbyteorder("=")
    stored = voxels.transpose(0, 3, 2, 1).astype(native, order="C", copy=True)
    return np.asarray(stored.transpose(0, 3, 2, 1))


@dataclass(frozen=True, slots=True, eq=False)
class _BoxView:
    """A source as dask wants it: something with a shape that can be sliced."""

    source: VoxelSource

    @property
    def shape(self) -> Shape:
        return self.source.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.source.dtype

    @property
    def ndim(self) -> int:
        return 4

    def __getitem__(self, key: tuple[slice | int, ...]) -> Voxels:
        whole = tuple(slice(k, k + 1) if isinstance(k, int | np.integer) else k for k in key)
        ranges = [range(n)[s] for s, n in zip(whole, self.shape, strict=True)]
        if not all(ranges):
            return np.empty([len(r) for r in ranges], dtype=self.dtype)
        lows = [min(r[0], r[-1]) for r in ranges]
        i, j, k = lows[1:]
        p, q, r = (max(r[0], r[-1]) + 1 - low for r, low in zip(ranges[1:], lows[1:], strict=True))
        voxels = self.source.read([PatchLocation((i, j, k), (p, q, r))], "sync")[0]
        lows[0] = 0
        picked = voxels[np.ix_(*(np.array(r) - low for r, low in zip(ranges, lows, strict=True)))]
        dropped = tuple(axis for axis, k in enumerate(key) if not isinstance(k, slice))
        return np.asarray(picked.squeeze(dropped))


def scaled_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """What scaled voxels come in: float32, or float64 for sources of 32 bits and more."""
    if dtype.kind == "c":
        return np.dtype(np.complex64 if dtype.itemsize <= 8 else np.complex128)
    return np.dtype(np.float32 if dtype.itemsize < 4 else np.float64)


def apply_scaling(voxels: Voxels, slope: float, inter: float, dtype: DTypeLike) -> Voxels:
    """``slope * voxels + inter`` in a type, in a new array of the same memory order."""
    values = voxels.astype(dtype, order="K", copy=True)
    values *= slope
    values += inter
    return values


def check_padding_mode(mode: str | None) -> None:
    """Refuse a padding that does not exist."""
    if mode is not None and mode not in PADDING_MODES:
        raise OptionError(f"padding_mode must be one of {', '.join(PADDING_MODES)}, not {mode!r}")


@dataclass(frozen=True, slots=True, eq=False)
class PaddedBox:
    """A box that reaches over the border, as a box inside and where its voxels go.

    ``take[axis]`` are the positions in ``inner`` of the box's voxels along that axis; with ``constant``
    padding those outside are -1.
    """

    inner: PatchLocation
    take: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]

    @classmethod
    def of(cls, box: PatchLocation, spatial_shape: Triple, mode: str) -> PaddedBox:
        """Split a box by numpy.pad's rules for ``mode``."""
        firsts, sizes, takes = [], [], []
        for start, stop, n in zip(box.index, box.index_fin, spatial_shape, strict=True):
            source = _padded_axis(start, stop, n, mode)
            used = source[source >= 0]
            low, high = (int(used.min()), int(used.max()) + 1) if used.size else (0, 1)
            firsts.append(low)
            sizes.append(high - low)
            takes.append(np.where(source >= 0, source - low, -1))
        (i, j, k), (p, q, r), (x, y, z) = firsts, sizes, takes
        return cls(PatchLocation((i, j, k), (p, q, r)), (x, y, z))

    def fill_in(self, inner: Voxels, fill: float) -> Voxels:
        """The box's voxels (C, I, J, K) from those of its inner box."""
        i, j, k = self.take
        out = inner[:, :, :, k][:, :, j][:, i]
        for axis, positions in enumerate(self.take, start=1):
            if (positions < 0).any():
                np.moveaxis(out, axis, 0)[positions < 0] = fill
        return _in_stored_order(out)


def _padded_axis(start: int, stop: int, length: int, mode: str) -> NDArray[np.int64]:
    """Which voxel of an axis stands at each place from ``start`` to ``stop``; -1 for the fill value."""
    before, after = max(-start, 0), max(stop - length, 0)
    axis = np.arange(length)
    if mode == "constant":
        padded = np.pad(axis, (before, after), constant_values=-1)
    else:
        padded = np.pad(axis, (before, after), mode=mode)  # type: ignore[call-overload]
    return np.asarray(padded[start + before : stop + before])
