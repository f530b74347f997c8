"""A box of another source as a source of its own; where it reaches over the border, it is padded."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from zpatch.chunks.scaling import UNSCALED, Scaling
from zpatch.geometry.boxes import PatchLocation, Triple, Voxels
from zpatch.geometry.padding import PaddedBox
from zpatch.sources.voxel_source import ReadTasks, Shape, VoxelSource, WrappedSource, new_voxels
from zpatch.sources.voxel_sources import dask_view
from zpatch.work_counts import Work, during

_numbers = itertools.count()  # of the reads of this process


@dataclass(frozen=True, eq=False)
class WindowSource(WrappedSource):
    """The voxels of a source from ``first`` on, which may be below 0; shapes are (C, I, J, K).

    Beyond the border they are padded by ``padding_mode``, as numpy.pad; ``fill`` is the value if that is
    constant. ``scaling`` is applied to the voxels of the source, and not to the fill.
    """

    source: VoxelSource
    first: Triple
    spatial_shape: Triple
    padding_mode: str = "constant"
    fill: float = 0
    scaling: Scaling = UNSCALED

    @property
    def shape(self) -> Shape:
        """Extent (C, I, J, K) of the window."""
        return self.source.shape[0], *self.spatial_shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the voxels."""
        return self.scaling.dtype_of(self.source.dtype)

    def tasks(
        self, boxes: Sequence[PatchLocation], outs: Sequence[Voxels], scaling: Scaling, parts: int
    ) -> ReadTasks:
        """The source's tasks, and a task for each box that is padded."""
        channels, i, j, k = self.source.shape
        read, into, pads = [], [], []
        for box, out in zip(boxes, outs, strict=True):
            moved = self._in_source(box)
            if moved.lies_within((i, j, k)):
                read.append(moved)
                into.append(out)
                continue
            padded = PaddedBox.of(moved, (i, j, k), self.padding_mode)
            shape = channels, *padded.inner.size
            inner = new_voxels(shape, out.dtype, contiguous=out.flags.c_contiguous)
            read.append(padded.inner)
            into.append(inner)
            pads.append(partial(_pad, padded, inner, self._filled(scaling), out))
        reads = self.source.tasks(read, into, self.scaling.followed_by(scaling), parts)
        if not pads:
            return reads
        key = "window", next(_numbers)  # all tasks of a group are in one graph
        needs = {**reads.needs, **{(key, n): task for n, task in enumerate(reads.writes)}}
        done = [(key, n) for n in range(len(reads.writes))]
        return ReadTasks([(pad, done) for pad in pads], needs)

    def _in_source(self, box: PatchLocation) -> PatchLocation:
        i, j, k = (start + first for start, first in zip(box.index, self.first, strict=True))
        return PatchLocation((i, j, k), box.size)

    def _filled(self, scaling: Scaling) -> float:
        return float(scaling.apply(np.full((1, 1, 1, 1), self.fill, dtype=np.float64)).item())

    def bytes_below(self, size: Triple) -> int:
        """A box without its padding, and what the source takes."""
        voxels = self.source.shape[0] * math.prod(size)
        return voxels * self.dtype.itemsize + self.source.bytes_below(size)

    def selected(self, channels: Sequence[int]) -> VoxelSource:
        """The window of some channels."""
        return dataclasses.replace(self, source=self.source.selected(channels))

    def dask(self, block_voxels: int | None = None) -> Any:
        """A dask array in blocks of about ``block_voxels`` a side, or 128."""
        return dask_view(self, [self.shape[0], *(block_voxels or 128,) * 3])


def _pad(padded: PaddedBox, inner: Voxels, fill: float, out: Voxels, _reads: Any) -> None:
    with during(Work.PADDING):
        padded.fill_in(inner, fill, out)
