"""Boxes of images -> one Dask graph over just the chunks that cover them -> voxels.

Boxes that are read as a group, of one image or of several, are one graph; a chunk that several of them touch
is decoded once. Voxels are written straight into the memory of their boxes.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar, overload

import numpy as np

from zpatch.chunks.scaling import UNSCALED, Scaling
from zpatch.errors import OptionError
from zpatch.geometry.boxes import PatchLocation, Voxels
from zpatch.geometry.padding import check_padding_mode
from zpatch.runtime.dask_graphs import Scheduler, is_cluster, run_graph, thread_count
from zpatch.sources.image_read import ImageRead, ReadableImage
from zpatch.sources.voxel_source import Graph, ReadTasks, Request, Shape, VoxelSource, new_voxels
from zpatch.work_counts import Work, during

T = TypeVar("T")


@overload
def read_group(
    images: Sequence[ReadableImage],
    locations: Sequence[PatchLocation],
    out: None = None,
    *,
    scaled: bool | Sequence[bool] = True,
    padding_mode: str | None = None,
    fill: float | Sequence[float] = 0,
    scheduler: Scheduler = "sync",
) -> list[list[Voxels]]: ...
@overload
def read_group(
    images: Sequence[ReadableImage],
    locations: Sequence[PatchLocation],
    out: T,
    *,
    scaled: bool | Sequence[bool] = True,
    padding_mode: str | None = None,
    fill: float | Sequence[float] = 0,
    scheduler: Scheduler = "sync",
) -> T: ...
def read_group(
    images: Sequence[ReadableImage],
    locations: Sequence[PatchLocation],
    out: Any = None,
    *,
    scaled: bool | Sequence[bool] = True,
    padding_mode: str | None = None,
    fill: float | Sequence[float] = 0,
    scheduler: Scheduler = "sync",
) -> Any:
    """Read the same boxes of several images as one group: each chunk is decoded once.

    Gives for each image a list with an array (C, I, J, K) for each location; or ``out``, if it is given.

    ``out`` is memory to read into: for each image an array (N, C, I, J, K), or N arrays (C, I, J, K), where N
    is the number of locations. Arrays may have any strides, and may be torch tensors on the CPU. Values are
    converted to their type, which is any float type (values are then rounded) or a type that has all values
    of ``image.dtype``.

    ``scaled=False`` gives the stored voxels, without slope and intercept. Boxes may reach over the border
    where ``padding_mode`` says how to fill them (constant, edge, reflect, symmetric or wrap, as in
    numpy.pad); ``fill`` is the value for constant. ``scaled`` and ``fill`` may be lists, with one value for
    each image. ``scheduler`` is "sync" (this thread), "threads" (dask's pool) or a ``distributed.Client``,
    whose workers must see the same files.

    Raises PatchLocationError for a box that reaches outside an image without a ``padding_mode``; OptionError
    for memory of a wrong number, shape or type, for a ``fill`` that the type does not have, and for an
    unknown ``padding_mode`` or ``scheduler``; DamageError for chunks that are missing or fail their checksum.

    >>> import zpatch as zp
    >>> volume = np.arange(1000, dtype=np.int16).reshape(10, 10, 10)
    >>> images = [zp.ScalarImage(volume), zp.LabelMap(volume % 2)]
    >>> locations = [zp.PatchLocation((0, 0, 0), (4, 4, 4)), zp.PatchLocation((5, 6, 6), (4, 4, 4))]
    >>> batch = np.empty((2, 1, 4, 4, 4), np.float32)
    >>> labels = np.empty((2, 1, 4, 4, 4), np.int16)
    >>> out = zp.read_group(images, locations, [batch, labels])
    >>> out[0] is batch, batch[1, 0, 0, 0].tolist(), labels[1, 0, 0, 0].tolist()
    (True, [566.0, 567.0, 568.0, 569.0], [0, 1, 0, 1])
    """
    check_padding_mode(padding_mode)
    memory = [None] * len(images) if out is None else _for_each(images, out, "out")
    options = _for_each(images, scaled, "scaled"), _for_each(images, fill, "fill")
    reads = [
        ImageRead(image, locations, is_scaled, padding_mode, value)
        for image, is_scaled, value in zip(images, *options, strict=True)
    ]
    found = read_together(reads, memory, scheduler)
    return found if out is None else out


def read_together(
    reads: Sequence[ImageRead], memory: Sequence[Any], scheduler: Scheduler = "sync"
) -> list[list[Voxels]]:
    """Read boxes of several images as one group, as ``read_group`` does; each image has its own boxes.

    ``memory`` has for each image that of its boxes, or None for new memory.
    """
    requests, found, padding = [], [], []
    for read, given in zip(reads, memory, strict=True):
        read.check_inside()
        outs = read.new_memory() if given is None else read.checked_memory(given)
        targets = [read.target(at, out) for at, out in zip(read.boxes, outs, strict=True)]
        requests.append(
            Request(read.image.source, [t.box for t in targets], [t.out for t in targets], read.scaling)
        )
        padding += [target.pad for target in targets if target.pad is not None]
        found.append(outs)
    read_requests(requests, scheduler)
    if padding:
        with during(Work.PADDING):
            for pad in padding:
                pad()
    return found


def _for_each(images: Sequence[ReadableImage], value: Any, option: str) -> Sequence[Any]:
    """The value of an option for each image; a value that is not a sequence is for all images."""
    if not isinstance(value, Sequence) and option != "out":
        return [value] * len(images)
    if len(value) != len(images):
        raise OptionError(f"{option} must have one entry for each of {len(images)} images, not {len(value)}")
    return value  # type: ignore[no-any-return]


def read_requests(requests: Sequence[Request], scheduler: Scheduler = "sync") -> None:
    """Read all requests in one Dask graph.

    ``scheduler`` is ``sync`` (this thread), ``threads`` (dask's pool), or a ``distributed.Client``, whose
    workers must see the same files; they send the voxels back.
    """
    if is_cluster(scheduler):
        _read_on_cluster(requests, scheduler)
        return
    graph: Graph = {}
    writing, stage = _Writing(), Work.DECODING
    for tasks in _tasks_of(requests, thread_count(scheduler)):
        graph |= tasks.needs
        stage = min(stage, tasks.stage)  # of expressions, if there are any
        for function, *arguments in tasks.writes:
            graph["zpatch", len(graph)] = (partial(writing, function), *arguments)
    ends = [key for key in graph if isinstance(key, tuple) and key[0] == "zpatch"]
    try:
        with during(stage):
            run_graph(graph, ends, scheduler)
    except BaseException:
        writing.stop()
        raise


def _tasks_of(requests: Sequence[Request], parts: int) -> Iterator[ReadTasks]:
    """The tasks of all requests, made together for sources of one class."""
    of_class: dict[type[VoxelSource], list[Request]] = {}
    for request in requests:
        of_class.setdefault(type(request.source), []).append(request)
    for source_class, alike in of_class.items():
        yield from source_class.tasks_together(alike, parts)


class _Writing:
    """Runs tasks that write to the caller's memory: after ``stop``, none is running and none will start.

    If a task fails in one of several threads, dask does not wait for the other threads.
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
    targets: dict[Any, list[Voxels]] = {}
    workers = max(1, sum(client.nthreads().values()))
    name = f"zpatch-read-{uuid.uuid4().hex}"  # a scheduler runs tasks of equal keys once
    for number, request in enumerate(requests):
        step = -(-len(request.boxes) // workers) or 1
        for first in range(0, len(request.boxes), step):
            some = slice(first, first + step)
            outs = list(request.outs[some])
            layouts = [(out.shape, out.dtype) for out in outs]
            key = (name, number, first)
            graph[key] = (
                partial(_read_on_worker, request.source, request.boxes[some], layouts, request.scaling),
            )
            targets[key] = outs
    for outs, voxels in zip(targets.values(), client.get(graph, list(targets)), strict=True):
        for out, values in zip(outs, voxels, strict=True):
            UNSCALED.write(values, out)


def _read_on_worker(
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
