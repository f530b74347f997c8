"""Patch requests -> a Dask graph over just the chunks that cover them -> voxels.

Patches that are read together, of one image or of several, are one graph; chunks that they share are
decoded once. Voxels go straight into the memory that they are asked for in.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from zpatch.chunks.gather import GatherPlan, gather, writes_directly
from zpatch.chunks.mapped_shards import ShardedArray
from zpatch.chunks.scaling import UNSCALED, Scaling
from zpatch.geometry.boxes import PatchLocation, Triple
from zpatch.runtime import buffer_pool
from zpatch.runtime.tasks import Scheduler, is_cluster, run_graph, thread_count

FALLBACK_CHUNK_VOXELS = 64
DERIVED_BLOCK_VOXELS = 64

Voxels = NDArray[Any]
Shape = tuple[int, int, int, int]
Graph = dict[Any, Any]


class VoxelSource(Protocol):
    """Anything that voxels can be read from; shapes are (C, I, J, K)."""

    @property
    def shape(self) -> Shape:
        """Extent."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the unscaled voxels, in native byte order."""

    @property
    def chunk_shape(self) -> Triple:
        """Extent along I, J, K of what is best read at once."""

    def graph(
        self, boxes: Sequence[PatchLocation], outs: Sequence[Voxels], scaling: Scaling, parts: int
    ) -> Graph:
        """Tasks that write the values of some boxes inside into ``outs``, under the keys 0, 1, ...

        There are about ``parts`` of them, and under other keys what they need.
        """

    def dask(self, block_voxels: int | None = None) -> Any:
        """A lazy dask array of the whole, (C, I, J, K), in blocks of about so many voxels a side."""


@dataclass(frozen=True, slots=True)
class Request:
    """Boxes to be read from one source: ``outs[n]`` (C, I, J, K) takes the values of ``boxes[n]``."""

    source: VoxelSource
    boxes: Sequence[PatchLocation]
    outs: Sequence[Voxels]
    scaling: Scaling = UNSCALED


def fulfil(requests: Sequence[Request], scheduler: Scheduler = "sync") -> None:
    """Read all that is requested, in one Dask graph.

    ``scheduler`` is ``sync`` (this thread), ``threads`` (dask's pool), or a ``distributed.Client``, whose
    workers must see the same files; what they read is copied here.
    """
    if is_cluster(scheduler):
        _fulfil_on_cluster(requests, scheduler)
        return
    graph: Graph = {}
    ends = []
    writing = _Writing()
    parts = thread_count(scheduler)
    derived = [request for request in requests if isinstance(request.source, DaskSource)]
    others = [request for request in requests if not isinstance(request.source, DaskSource)]
    graphs = [r.source.graph(r.boxes, r.outs, r.scaling, parts) for r in others]
    for number, tasks in enumerate([*graphs, _derived_graph(derived)]):
        for key, task in tasks.items():
            if isinstance(key, int):
                key = ("zpatch", number, key)
                ends.append(key)
                task = (partial(writing, task[0]), *task[1:])
            graph[key] = task
    try:
        run_graph(graph, ends, scheduler)
    except BaseException:
        writing.stop()
        raise


class _Writing:
    """Tasks that write to memory of the caller: once stopped, none begins any more and none is still at it.

    Where one of several threads fails, dask does not wait for the others.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = 0
        self._stopped = False

    def __call__(self, task: Callable[..., None], *arguments: Any) -> None:
        with self._changed:
            if self._stopped:
                return
            self._running += 1
        try:
            task(*arguments)
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.wait_for(lambda: not self._running)


def _fulfil_on_cluster(requests: Sequence[Request], client: Any) -> None:
    graph: Graph = {}
    places: dict[Any, list[Voxels]] = {}
    workers = max(1, sum(client.nthreads().values()))
    name = f"zpatch-read-{uuid.uuid4().hex}"  # a scheduler takes two tasks of one key for the same
    for number, request in enumerate(requests):
        step = -(-len(request.boxes) // workers) or 1
        for first in range(0, len(request.boxes), step):
            some = slice(first, first + step)
            outs = list(request.outs[some])
            layouts = [(out.shape, out.dtype) for out in outs]
            key = (name, number, first)
            graph[key] = (partial(_read_far, request.source, request.boxes[some], layouts, request.scaling),)
            places[key] = outs
    for outs, voxels in zip(places.values(), client.get(graph, list(places)), strict=True):
        for out, values in zip(outs, voxels, strict=True):
            out[...] = values


def _read_far(
    source: VoxelSource,
    boxes: Sequence[PatchLocation],
    layouts: Sequence[tuple[Shape, np.dtype[Any]]],
    scaling: Scaling,
) -> list[Voxels]:
    outs = [new_voxels(shape, dtype) for shape, dtype in layouts]
    fulfil([Request(source, boxes, outs, scaling)])
    return outs


def new_voxels(shape: Sequence[int], dtype: Any) -> Voxels:
    """Memory for a box (C, I, J, K), in the order (c, z, y, x) of stored voxels."""
    c, i, j, k = shape
    return buffer_pool.empty((c, k, j, i), dtype).transpose(0, 3, 2, 1)


def read_boxes(source: VoxelSource, boxes: Sequence[PatchLocation]) -> list[Voxels]:
    """The unscaled voxels (C, I, J, K) of some boxes, read in this thread."""
    outs = [new_voxels((source.shape[0], *box.size), source.dtype) for box in boxes]
    fulfil([Request(source, boxes, outs)])
    return outs


@dataclass(frozen=True, slots=True)
class ShardSource:
    """The voxels of an array in chunks; ``axes`` names its four stored axes, of c, z, y and x."""

    array: ShardedArray
    axes: str = "czyx"

    @property
    def _order(self) -> list[int]:
        """Which stored axis is C, I, J and K."""
        return [self.axes.index(name) for name in "cxyz"]

    @property
    def shape(self) -> Shape:
        """Extent (C, I, J, K)."""
        c, i, j, k = (self.array.shape[axis] for axis in self._order)
        return c, i, j, k

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the stored voxels."""
        return self.array.dtype.newbyteorder("=")

    @property
    def chunk_shape(self) -> Triple:
        """Extent of a chunk."""
        _, i, j, k = (self.array.chunks[axis] for axis in self._order)
        return i, j, k

    def graph(
        self, boxes: Sequence[PatchLocation], outs: Sequence[Voxels], scaling: Scaling, parts: int
    ) -> Graph:
        """One task for each part of the chunks, near equal in bytes; each chunk is in one of them."""
        stored, channels = ["cxyz".index(name) for name in self.axes], self.shape[0]
        low = np.array([(0, *box.index) for box in boxes], dtype=np.int64).reshape(-1, 4)
        high = np.array([(channels, *box.index_fin) for box in boxes], dtype=np.int64).reshape(-1, 4)
        views = [out.transpose(stored) for out in outs]
        plans = GatherPlan.of(self.array, low[:, stored], high[:, stored]).split(parts)
        if all(writes_directly(self.array, out.dtype, scaling) for out in outs):
            return {n: (partial(gather, self.array, plan, views, scaling),) for n, plan in enumerate(plans)}
        raw = [buffer_pool.empty(view.shape, self.array.dtype) for view in views]
        graph: Graph = {(id(raw), n): (partial(gather, self.array, p, raw),) for n, p in enumerate(plans)}
        graph[0] = (partial(_cast, raw, views, scaling), list(graph))
        return graph

    def dask(self, block_voxels: int | None = None) -> Any:
        """A dask array with one block for each shard's region, or for whole chunks of about a size.

        All channels are in one block: they are read together.
        """
        blocks = [self.shape[0], *(self.array.shards[axis] for axis in self._order[1:])]
        if block_voxels is not None:
            blocks[1:] = [max(1, block_voxels // n) * n for n in self.chunk_shape]
        return _dask_view(self, blocks)


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

    def graph(
        self, boxes: Sequence[PatchLocation], outs: Sequence[Voxels], scaling: Scaling, parts: int
    ) -> Graph:
        """One task for each part of the boxes."""
        return {n: (partial(self._copy, boxes[n::parts], outs[n::parts], scaling),) for n in range(parts)}

    def _copy(self, boxes: Sequence[PatchLocation], outs: Sequence[Voxels], scaling: Scaling) -> None:
        for box, out in zip(boxes, outs, strict=True):
            scaling.write(self.array[(slice(None), *box.to_slices())], out)

    def dask(self, block_voxels: int | None = None) -> Any:
        """A dask array in blocks of 128 voxels."""
        return _dask_view(self, [self.shape[0], *(block_voxels or 128,) * 3])


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

    def graph(
        self, boxes: Sequence[PatchLocation], outs: Sequence[Voxels], scaling: Scaling, parts: int
    ) -> Graph:
        """The expression's own tasks, cut down to the boxes, and one to write each."""
        return _derived_graph([Request(self, boxes, outs, scaling)])

    def dask(self, block_voxels: int | None = None) -> Any:
        """The expression itself."""
        return self.array


def _cast(raw: Sequence[Voxels], outs: Sequence[Voxels], scaling: Scaling, _parts: Any) -> None:
    for voxels, out in zip(raw, outs, strict=True):
        scaling.write(voxels, out)


def _derived_graph(requests: Sequence[Request]) -> Graph:
    """The tasks of some expressions, optimised together, so that what they share is computed once."""
    from dask.highlevelgraph import HighLevelGraph

    parts = [
        (request.source.dask()[(slice(None), *box.to_slices())], out, request.scaling)
        for request in requests
        for box, out in zip(request.boxes, request.outs, strict=True)
    ]
    if not parts:
        return {}
    keys = [part.__dask_keys__() for part, _, _ in parts]
    merged = HighLevelGraph.merge(*(part.__dask_graph__() for part, _, _ in parts))
    graph: Graph = dict(parts[0][0].__dask_optimize__(merged, keys))
    for number, ((part, out, scaling), blocks) in enumerate(zip(parts, keys, strict=True)):
        finish, extra = part.__dask_postcompute__()
        graph[number] = (partial(_put, finish, extra, out, scaling), blocks)
    return graph


def _put(finish: Callable[..., Any], extra: Any, out: Voxels, scaling: Scaling, blocks: Any) -> None:
    scaling.write(np.asarray(finish(blocks, *extra)), out)


def _dask_view(source: VoxelSource, blocks: Sequence[int]) -> Any:
    import dask.array as da

    chunks = tuple(min(n, b) for n, b in zip(source.shape, blocks, strict=True))
    return da.from_array(_BoxView(source), chunks=chunks, asarray=True, fancy=False, name=False)


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
        voxels = read_boxes(self.source, [PatchLocation((i, j, k), (p, q, r))])[0]
        lows[0] = 0
        picked = voxels[np.ix_(*(np.array(r) - low for r, low in zip(ranges, lows, strict=True)))]
        dropped = tuple(axis for axis, k in enumerate(key) if not isinstance(k, slice))
        return np.asarray(picked.squeeze(dropped))
