"""Patch requests -> a Dask graph over just the chunks that cover them -> voxels.

Patches that are read together, of one image or of several, are one graph; chunks that they share are
decoded once. Voxels go straight into the memory that they are asked for in.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from zpatch.chunks.scaling import Scaling
from zpatch.geometry.boxes import PatchLocation
from zpatch.images.voxel_source import Graph, ReadTasks, Request, Shape, Voxels, VoxelSource, new_voxels
from zpatch.runtime.dask_graphs import Scheduler, is_cluster, run_graph, thread_count


def read_requests(requests: Sequence[Request], scheduler: Scheduler = "sync") -> None:
    """Read all that is requested, in one Dask graph.

    ``scheduler`` is ``sync`` (this thread), ``threads`` (dask's pool), or a ``distributed.Client``, whose
    workers must see the same files; what they read is copied here.
    """
    if is_cluster(scheduler):
        _read_on_cluster(requests, scheduler)
        return
    graph: Graph = {}
    writing = _Writing()
    for tasks in _tasks_of(requests, thread_count(scheduler)):
        graph |= tasks.needs
        for function, *arguments in tasks.writes:
            graph["zpatch", len(graph)] = (partial(writing, function), *arguments)
    ends = [key for key in graph if isinstance(key, tuple) and key[0] == "zpatch"]
    try:
        run_graph(graph, ends, scheduler)
    except BaseException:
        writing.stop()
        raise


def _tasks_of(requests: Sequence[Request], parts: int) -> Iterator[ReadTasks]:
    """Requests to sources of one class are made into tasks together."""
    of_class: dict[type[VoxelSource], list[Request]] = {}
    for request in requests:
        of_class.setdefault(type(request.source), []).append(request)
    for source_class, those in of_class.items():
        yield from source_class.tasks_together(those, parts)


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


def _read_on_cluster(requests: Sequence[Request], client: Any) -> None:
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
    read_requests([Request(source, boxes, outs, scaling)])
    return outs


def read_boxes(source: VoxelSource, boxes: Sequence[PatchLocation]) -> list[Voxels]:
    """The unscaled voxels (C, I, J, K) of some boxes, read in this thread."""
    outs = [new_voxels((source.shape[0], *box.size), source.dtype) for box in boxes]
    read_requests([Request(source, boxes, outs)])
    return outs
