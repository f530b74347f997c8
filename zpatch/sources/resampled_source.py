"""The voxels of a source on another grid: the chunks under a box are read once, and resampled into it."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from zpatch.chunks.scaling import UNSCALED, Scaling
from zpatch.geometry.affines import Affine
from zpatch.geometry.boxes import PatchLocation, Triple, Voxels
from zpatch.resampling.interpolation import Interpolation
from zpatch.resampling.resampler import ResampledBox, Resampler
from zpatch.sources.voxel_source import ReadTasks, Shape, VoxelSource, WrappedSource, new_voxels
from zpatch.sources.voxel_sources import dask_view

_numbers = itertools.count()  # of the reads of this process


@dataclass(frozen=True, eq=False)
class ResampledSource(WrappedSource):
    """Voxels of another source, on a grid of ``spatial_shape``; shapes are (C, I, J, K).

    ``matrix`` is voxel of the grid to voxel of the source. ``scaling`` is applied before interpolation. A
    grid that only turns the source is read as fast as the source itself.
    """

    source: VoxelSource
    spatial_shape: Triple
    matrix: Affine
    interpolation: Interpolation
    scaling: Scaling = UNSCALED

    @cached_property
    def _resampler(self) -> Resampler:
        _, i, j, k = self.source.shape
        return Resampler((i, j, k), self.matrix, self.interpolation)

    @property
    def shape(self) -> Shape:
        """Extent (C, I, J, K) of the grid."""
        return self.source.shape[0], *self.spatial_shape

    @property
    def has_all_voxels(self) -> bool:
        """Whether these are the voxels of the source, each once, in another order."""
        (_, *extent), whole = self.source.shape, PatchLocation((0, 0, 0), self.spatial_shape)
        found = self._resampler.same_voxels(whole)
        return found is not None and list(found.size) == extent

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the results."""
        return self.interpolation.dtype_of(self.scaling.dtype_of(self.source.dtype))

    @property
    def chunk_shape(self) -> Triple:
        """About the extent of the source's chunks, on the grid."""
        _, *extent = self.source.shape
        chunks = np.minimum(self.source.chunk_shape, extent)
        sizes = np.abs(np.linalg.inv(self.matrix[:3, :3])) @ chunks
        i, j, k = np.clip(np.round(sizes), 1, self.spatial_shape).astype(int).tolist()
        return i, j, k

    def tasks(
        self, boxes: Sequence[PatchLocation], outs: Sequence[Voxels], scaling: Scaling, parts: int
    ) -> ReadTasks:
        """The source's tasks for the boxes that are needed, and one task for each box that is resampled."""
        turned = [self._resampler.turned(box, out) for box, out in zip(boxes, outs, strict=True)]
        if all(turned):
            found = [each for each in turned if each is not None]
            together = self.scaling.followed_by(scaling)
            return self.source.tasks([box for box, _ in found], [out for _, out in found], together, parts)
        before, after = self._scalings(scaling)
        planned = [self._resampler.box(box) for box in boxes]
        dtype, channels = self._read_dtype(before), self.shape[0]
        needed = [each.needed for each in planned]
        voxels = [new_voxels((channels, *box.size), dtype) for box in needed]
        reads = self.source.tasks(needed, voxels, before, parts)
        key = "resampled", next(_numbers)  # all tasks of a group are in one graph
        needs = {**reads.needs, **{(key, n): task for n, task in enumerate(reads.writes)}}
        read = [(key, n) for n in range(len(reads.writes))]
        writes = [
            (partial(_write, each, of_box, out, after), read)
            for each, of_box, out in zip(planned, voxels, outs, strict=True)
        ]
        return ReadTasks(writes, needs)

    def _scalings(self, scaling: Scaling) -> tuple[Scaling, Scaling]:
        """What is applied to the voxels that are read, and to the result.

        A slope and an intercept may be applied to the result, as the weights of a voxel sum to 1.
        """
        if self.scaling.is_bounded and not self.interpolation.keeps_values:
            return self.scaling, scaling
        return UNSCALED, self.scaling.followed_by(scaling)

    def _read_dtype(self, scaling: Scaling) -> np.dtype[Any]:
        dtype = scaling.dtype_of(self.source.dtype)
        if self.interpolation.keeps_values or dtype.kind in "iu" or dtype.itemsize in (4, 8):
            return dtype
        return self.interpolation.dtype_of(dtype)  # bool, float16

    def bytes_below(self, size: Triple) -> int:
        """The boxes of the source that a box is made from, and the box itself; none if it only turns them."""
        needed = self._resampler.needed_size(size)
        if self._resampler.only_turns:
            return self.source.bytes_below(needed)
        dtype = self._read_dtype(self._scalings(UNSCALED)[0])
        voxel_bytes, made = dtype.itemsize, math.prod(size) * self.dtype.itemsize
        if self._resampler.axes is None:  # points are interpolated in voxels that are filtered first
            voxel_bytes += dtype.itemsize if self.interpolation.keeps_values else self.dtype.itemsize
        read = math.prod(needed) * voxel_bytes
        return self.shape[0] * (read + made) + self.source.bytes_below(needed)

    def selected(self, channels: Sequence[int]) -> VoxelSource:
        """The source of some channels."""
        return dataclasses.replace(self, source=self.source.selected(channels))

    def filling(self) -> VoxelSource:
        """The same grid over the source with 0 in place of what is damaged."""
        source = self.source.filling()
        return self if source is self.source else dataclasses.replace(self, source=source)

    def described(self) -> str:
        """All that the voxels depend on, beside the source."""
        numbers = self.matrix.tolist(), self.interpolation, tuple(self.scaling)
        return repr((self.spatial_shape, *numbers))

    def dask(self, block_voxels: int | None = None) -> Any:
        """A dask array in blocks of about ``block_voxels`` a side, or 128."""
        return dask_view(self, [self.shape[0], *(block_voxels or 128,) * 3])


def _write(box: ResampledBox, voxels: Voxels, out: Voxels, scaling: Scaling, _reads: Any) -> None:
    box.write(voxels, out, scaling)
