"""A function of each voxel of one or several sources, computed for the boxes that are read."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from zpatch.chunks.file_mark import FileMark
from zpatch.chunks.scaling import Scaling
from zpatch.geometry.boxes import PatchLocation, Triple, Voxels
from zpatch.sources.voxel_source import Graph, ReadTasks, Shape, VoxelSource, WrappedSource, new_voxels
from zpatch.sources.voxel_sources import dask_view

_numbers = itertools.count()  # of the reads of this process


class VoxelInput(NamedTuple):
    """A source, and the scaling that is applied to its voxels."""

    source: VoxelSource
    scaling: Scaling

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the values that the function gets."""
        return self.scaling.dtype_of(self.source.dtype)


@dataclass(frozen=True, eq=False)
class VoxelwiseSource(WrappedSource):
    """``function(*voxels)`` of boxes of the ``inputs``, arrays (C, I, J, K) of one spatial shape.

    It gives an array of ``channels`` channels, of type ``made``, whose voxels depend on those at their place
    only.
    """

    inputs: tuple[VoxelInput, ...]
    function: Callable[..., Voxels]
    channels: int
    made: np.dtype[Any]

    @property
    def source(self) -> VoxelSource:  # type: ignore[override]
        """The first source, whose chunks these voxels have."""
        return self.inputs[0].source

    @property
    def shape(self) -> Shape:
        """Extent (C, I, J, K)."""
        return self.channels, *self.source.shape[1:]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the results."""
        return self.made

    def tasks(
        self, boxes: Sequence[PatchLocation], outs: Sequence[Voxels], scaling: Scaling, parts: int
    ) -> ReadTasks:
        """The tasks of all sources for these boxes, and one to write each box."""
        key = "voxelwise", next(_numbers)  # all tasks of a group are in one graph
        needs: Graph = {}
        done: list[Any] = []
        memory: list[list[Voxels]] = []
        for number, (source, before) in enumerate(self.inputs):
            voxels = [
                new_voxels(
                    (source.shape[0], *box.size), self.inputs[number].dtype, contiguous=out.flags.c_contiguous
                )
                for box, out in zip(boxes, outs, strict=True)
            ]
            reads = source.tasks(boxes, voxels, before, parts)
            tasks: Graph = {(key, number, n): task for n, task in enumerate(reads.writes)}
            needs |= {**reads.needs, **tasks}
            done += list(tasks)
            memory.append(voxels)
        writes = [
            (partial(_write, self.function, of_box, scaling, out), done)
            for out, *of_box in zip(outs, *memory, strict=True)
        ]
        return ReadTasks(writes, needs)

    def bytes_below(self, size: Triple) -> int:
        """The boxes of all sources and the result, and what the sources take."""
        voxels = [one.source.shape[0] * one.dtype.itemsize for one in self.inputs]
        held = math.prod(size) * (sum(voxels) + self.channels * self.made.itemsize)
        return held + sum(one.source.bytes_below(size) for one in self.inputs)

    def selected(self, channels: Sequence[int]) -> VoxelSource:
        """The same, of which some channels are kept."""
        chosen = partial(_some_channels, self.function, list(channels))
        return replace(self, function=chosen, channels=len(channels))

    def marks(self) -> tuple[FileMark, ...]:
        """Those of all sources."""
        return tuple(dict.fromkeys(mark for one in self.inputs for mark in one.source.marks()))

    def sampled_files(self) -> list[Path]:
        """Those of all sources."""
        return [file for one in self.inputs for file in one.source.sampled_files()]

    def dask(self, block_voxels: int | None = None) -> Any:
        """A dask array in blocks of about ``block_voxels`` a side, or 128."""
        return dask_view(self, [self.channels, *(block_voxels or 128,) * 3])


def _write(
    function: Callable[..., Voxels], voxels: Sequence[Voxels], scaling: Scaling, out: Voxels, _reads: Any
) -> None:
    scaling.write(function(*voxels), out)


def _some_channels(function: Callable[..., Voxels], channels: list[int], *voxels: Voxels) -> Voxels:
    return function(*voxels)[channels]
