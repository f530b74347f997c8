"""The contract of anything that voxels can be read from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from zpatch.chunks.file_mark import FileMark
from zpatch.chunks.scaling import UNSCALED, Scaling
from zpatch.geometry.boxes import PatchLocation, Triple, Voxels, reversed_axes
from zpatch.runtime import buffer_pool
from zpatch.work_counts import Work

FALLBACK_CHUNK_VOXELS = 64
Shape = tuple[int, int, int, int]
Graph = dict[Any, Any]


@dataclass(frozen=True, slots=True)
class ReadTasks:
    """Dask tasks of a read: ``writes`` fill the caller's memory; ``needs`` are the tasks they depend on.

    Their time counts for a ``stage``, but for what they count themselves.
    """

    writes: Sequence[tuple[Any, ...]]
    needs: Graph = field(default_factory=dict)
    stage: Work = Work.DECODING


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
        """Extent along I, J, K of the blocks that are best read as a whole."""

    def tasks(
        self, boxes: Sequence[PatchLocation], outs: Sequence[Voxels], scaling: Scaling, parts: int
    ) -> ReadTasks:
        """About ``parts`` tasks that write the values of boxes inside the source into ``outs``."""

    @classmethod
    def tasks_together(cls, requests: Sequence[Request], parts: int) -> list[ReadTasks]:
        """The tasks of requests to sources of this class; a class may let requests share work."""
        return [each.source.tasks(each.boxes, each.outs, each.scaling, parts) for each in requests]

    def selected(self, channels: Sequence[int]) -> VoxelSource:
        """A source of some channels, in this order."""

    def bytes_below(self, size: Triple) -> int:
        """The most memory that reading a box of some size takes besides the box: what it is made from."""
        return 0

    def filling(self) -> VoxelSource:
        """The source with 0 in place of what is damaged, where it can tell; else itself, which raises."""
        return self

    def damaged(self) -> dict[str, str]:
        """What was read as 0 in this process because it is damaged: a key for each part, and its error."""
        return {}

    def marks(self) -> tuple[FileMark, ...]:
        """The marks of the files that tell whether the voxels are still there; may read metadata files."""
        return ()

    def sampled_files(self) -> list[Path]:
        """Files of chunks at a few evenly spaced places, whether they exist or not."""
        return []

    def dask(self, block_voxels: int | None = None) -> Any:
        """A lazy dask array of all voxels, (C, I, J, K), in blocks of about ``block_voxels`` a side."""


class WrappedSource(VoxelSource):
    """A source that reads from another source, ``source``, and has its shape, type and chunks."""

    def __init__(self, source: VoxelSource) -> None:
        self.source = source

    @property
    def shape(self) -> Shape:
        """Extent (C, I, J, K)."""
        return self.source.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the unscaled voxels."""
        return self.source.dtype

    @property
    def chunk_shape(self) -> Triple:
        """Extent of the source's chunks."""
        return self.source.chunk_shape

    def tasks(
        self, boxes: Sequence[PatchLocation], outs: Sequence[Voxels], scaling: Scaling, parts: int
    ) -> ReadTasks:
        """The source's own tasks."""
        return self.source.tasks(boxes, outs, scaling, parts)

    def selected(self, channels: Sequence[int]) -> VoxelSource:
        """The source's own source of some channels."""
        return self.source.selected(channels)

    def bytes_below(self, size: Triple) -> int:
        """The source's own."""
        return self.source.bytes_below(size)

    def damaged(self) -> dict[str, str]:
        """The source's own."""
        return self.source.damaged()

    def marks(self) -> tuple[FileMark, ...]:
        """The source's own marks."""
        return self.source.marks()

    def sampled_files(self) -> list[Path]:
        """The source's own files."""
        return self.source.sampled_files()

    def dask(self, block_voxels: int | None = None) -> Any:
        """The source's own dask array."""
        return self.source.dask(block_voxels)


@dataclass(frozen=True, slots=True)
class Request:
    """Boxes to read from one source: the values of ``boxes[n]`` are written to ``outs[n]``, (C, I, J, K)."""

    source: VoxelSource
    boxes: Sequence[PatchLocation]
    outs: Sequence[Voxels]
    scaling: Scaling = UNSCALED


def new_voxels(shape: Sequence[int], dtype: Any, *, contiguous: bool = False) -> Voxels:
    """Memory for a box (C, I, J, K): with the strides of stored voxels (c, z, y, x), or ``contiguous``."""
    c, i, j, k = shape
    if contiguous:
        return buffer_pool.empty((c, i, j, k), dtype)
    return reversed_axes(buffer_pool.empty((c, k, j, i), dtype))
