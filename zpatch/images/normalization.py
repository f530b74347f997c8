"""Intensities on one scale, from statistics of the store, or computed in one pass over the voxels."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from zpatch.chunks.mapped_shards import close_shards, release_pages
from zpatch.chunks.scaling import UNSCALED, Scaling
from zpatch.digests import Json
from zpatch.errors import DamageError, OptionError
from zpatch.geometry.boxes import PatchLocation, Triple, reversed_axes
from zpatch.images.image import Image
from zpatch.runtime.dask_graphs import thread_count
from zpatch.sources.group_read import read_boxes
from zpatch.sources.input_files import map_of
from zpatch.sources.voxel_sources import ArraySource, LazySource
from zpatch.store.voxel_statistics import VoxelStatistics

MODES = ("zscore", "clip")
BOX_VOXELS = 2**20  # of a pass: read and counted at a time by one thread
PASS_BYTES = 2**26  # of the boxes that all threads read at a time
PASS_THREADS = 8


class Normalize:
    """Normalise images as they are read: ``normalize(image)`` is a lazy image of the normalised values.

    ``zscore`` gives (value - mean) / std; ``clip`` clips values to the percentiles 0.5 and 99.5, and scales
    these to 0 and 1. Statistics are those of the image in its store, or the ``statistics`` of a whole cohort,
    as in ``Normalize(statistics=cohort.statistics["ct"])``. With ``foreground`` they are those of the voxels
    that are not stored as zero. An image whose values are all equal becomes 0. With ``compute``, an image
    without statistics is read once, when it is given: see ``computed_statistics``.

    Raises OptionError for an unknown mode, and for an image without these statistics.

    >>> import numpy as np
    >>> from zpatch.images.image import ScalarImage
    >>> normalize = Normalize("zscore", statistics={"mean": 10.0, "std": 2.0})
    >>> normalize(ScalarImage(np.full((1, 1, 1), 14, np.int16))).data.tolist()
    [[[[2.0]]]]
    """

    def __init__(
        self,
        mode: str = "zscore",
        *,
        statistics: Mapping[str, Any] | None = None,
        foreground: bool = False,
        compute: bool = False,
    ) -> None:
        if mode not in MODES:
            raise OptionError(f"mode must be one of {', '.join(MODES)}, not {mode!r}", option="mode")
        self.mode = mode
        self.statistics = statistics
        self.foreground = foreground
        self.compute = compute

    def __call__(self, image: Image) -> Image:
        """The image, normalised where it is read; float32, or float64 for voxels of 32 bits and more."""
        statistics = self.statistics
        if statistics is None:
            is_lacking = self.compute and lacks_statistics(image)
            statistics = computed_statistics(image) if is_lacking else image.statistics
        if self.foreground:
            statistics = statistics.get("foreground") or {}
        if self.mode == "zscore":
            mean, std = self._of(statistics, image, "mean"), self._of(statistics, image, "std")
            return image.rescaled(1 / std, -mean / std) if std > 0 else image.rescaled(0, 0)
        low, high = (self._of(statistics, image, key) for key in ("percentile_0_5", "percentile_99_5"))
        if not high > low:
            return image.rescaled(0, 0)
        return image.rescaled(1 / (high - low), -low / (high - low), low, high)

    def _of(self, statistics: Mapping[str, Any], image: Image, key: str) -> Any:
        if statistics.get(key) is None:
            lacking = "its foreground has" if self.foreground else "there is"
            raise OptionError(
                f"{image!r} cannot be normalised: {lacking} no {key!r} in its statistics; only scalar images "
                f"of a store have them; say compute=True to compute those of other images, or give them, as "
                f"in Normalize(statistics=...)"
            )
        return statistics[key]

    def __repr__(self) -> str:
        whose = "each image's own" if self.statistics is None else "given"
        return f"Normalize({self.mode!r}, {whose} statistics{', foreground' * self.foreground})"


def lacks_statistics(image: Image) -> bool:
    """Whether an image has no statistics of intensities, so that its voxels must be read to compute them."""
    return "mean" not in image.statistics


def computed_statistics(image: Image, progress: Callable[[int], None] = lambda voxels: None) -> Json:
    """The statistics of an image's values, all channels together, in one pass over its voxels.

    They are those that ``zpatch convert`` stores: exact for integers; floats that are NaN or infinite are
    left out, and percentiles of floats are within 0.5 %. Each chunk is decoded once, in a few threads, each
    of which holds about a million voxels, or one chunk if that is larger. The same voxels give the same
    numbers, to the last bit, on any number of threads. They are kept with the image; ``progress`` is called
    with numbers of voxels. Raises DamageError if the image's files change meanwhile.

    >>> from zpatch.images.image import ScalarImage
    >>> found = computed_statistics(ScalarImage(np.arange(1000, dtype=np.int16).reshape(10, 10, 10)))
    >>> found["mean"], found["percentile_0_5"], found["percentile_99_5"]
    (499.5, 4.995, 994.005)
    """
    return image.remembered("statistics", lambda: _computed(image, progress))


def _computed(image: Image, progress: Callable[[int], None]) -> Json:
    is_in_files, scaling = image.opened.is_in_files, image.scaling
    before = image.identity() if is_in_files else None
    counted = scaling if scaling.is_bounded else UNSCALED  # other scalings are applied to the result
    whole = VoxelStatistics(counted.dtype_of(image.source.dtype))
    boxes = list(pass_boxes(image.shape, image.source.chunk_shape))
    largest = max((math.prod(box.size) for box in boxes), default=1)
    box_bytes = largest * image.num_channels * image.source.dtype.itemsize
    is_alone = isinstance(image.source, LazySource)  # its library may not be used by several threads
    threads = 1 if is_alone else min(PASS_THREADS, thread_count("threads"), max(1, PASS_BYTES // box_bytes))
    waiting: collections.deque[Future[VoxelStatistics]] = collections.deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="zpatch-statistics") as pool:
        try:
            for number in range(len(boxes) + threads):
                if number < len(boxes):
                    waiting.append(pool.submit(_of_box, image, boxes[number], counted))
                if number >= threads and waiting:
                    whole.merge(waiting.popleft().result().state())
                    progress(math.prod(boxes[number - threads].size) * image.num_channels)
        finally:
            pool.shutdown(cancel_futures=True)
            _release_files(image)
    if is_in_files and image.identity() != before:
        raise DamageError(
            f"{image!r} was changed while its statistics were computed; run the same command again"
        )
    return whole.result() if scaling.is_bounded else whole.result(scaling.slope, scaling.inter)


def _release_files(image: Image) -> None:
    """Take what was read of files, as large as the volume, out of the process's memory, which is limited."""
    if image.opened.path is not None:
        close_shards(image.opened.path)
    if isinstance(image.source, ArraySource) and (mapped := map_of(image.source.array)) is not None:
        release_pages(mapped)


def _of_box(image: Image, box: PatchLocation, scaling: Scaling) -> VoxelStatistics:
    [voxels] = read_boxes(image.source, [box])
    found = VoxelStatistics(scaling.dtype_of(voxels.dtype))
    i, j, k = box.index_ini
    found.update(reversed_axes(voxels if scaling == UNSCALED else scaling.apply(voxels)), (k, j, i))
    return found


def pass_boxes(shape: tuple[int, ...], chunk_shape: Triple) -> Iterator[PatchLocation]:
    """Boxes of whole chunks that cover an image: about a million voxels, or one chunk, each."""
    channels, *spatial_shape = shape
    size = [min(n, c) for n, c in zip(spatial_shape, chunk_shape, strict=True)]
    for axis, length in enumerate(spatial_shape):
        chunks = max(1, BOX_VOXELS // max(1, math.prod(size) * channels))
        size[axis] = min(length, chunks * size[axis])
    counts = [-(-n // s) for n, s in zip(spatial_shape, size, strict=True)] if all(spatial_shape) else [0]
    for position in np.ndindex(*counts):
        first = [n * s for n, s in zip(position, size, strict=True)]
        stop = [min(f + s, n) for f, s, n in zip(first, size, spatial_shape, strict=True)]
        yield PatchLocation.between(first, stop)
