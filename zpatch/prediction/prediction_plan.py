"""What a prediction will do, before it does anything: patches, shards, regions, and their memory.

A region is a box of shards that one task fills: it runs every patch that adds to them. One region is
the whole volume; more are made to share the work out, along the swept axis, or to fit a memory limit, across
it. Patches that add to two regions are run for each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from zpatch.blending.tiling import Tiling, sweep_order
from zpatch.digests import Json
from zpatch.geometry.boxes import Bools, Integers, Triple
from zpatch.geometry.patch_grid import PatchGrid
from zpatch.images.image import Image
from zpatch.images.subject import Subject
from zpatch.runtime.byte_sizes import format_bytes
from zpatch.store.image_record import ImageRecord

BATCHES_AHEAD = 2  # of the network, while a shard waits for the one before it to be written
FLIPPED_OUTPUTS = 1  # more than those of a batch, while they are summed over all its flips: the sums

Ranges = tuple[range, range, range]


@dataclass(frozen=True, slots=True)
class Head:
    """One output of a network, as its first patch showed it.

    ``channels`` are summed, ``sum_bytes`` each; ``patch_shape`` is what the network makes of a patch.
    ``kept_channels`` of ``kept_dtype`` are what is kept of a voxel once it is reduced.
    """

    name: str
    channels: int
    sum_bytes: int
    patch_shape: Triple
    kept_channels: int
    kept_dtype: str

    def shape_for(self, spatial_shape: Triple, patch_size: Triple) -> Triple:
        """The extent of the output for a whole volume: as the network scales a patch, rounded."""
        scaled = zip(spatial_shape, self.patch_shape, patch_size, strict=True)
        i, j, k = (max(1, math.floor(n * q / p + 0.5)) for n, q, p in scaled)
        return i, j, k


def outputs_bytes(heads: Sequence[Head], batch_size: int, *, tta: bool = False) -> int:
    """What a network gives for a batch, as it is and as it is summed; with ``tta`` also while it is made."""
    buffers = 2 + (FLIPPED_OUTPUTS if tta else 0)
    return buffers * batch_size * sum(h.channels * h.sum_bytes * math.prod(h.patch_shape) for h in heads)


@dataclass(frozen=True, slots=True, eq=False)
class PlannedHead:
    """An output of one subject: the record of its image, and the tiles in which it becomes final."""

    head: Head
    record: ImageRecord
    tiling: Tiling

    @property
    def shard_bytes(self) -> int:
        """Size of a shard in memory."""
        return math.prod(self.tiling.shard_shape) * self.voxel_bytes

    @property
    def voxel_bytes(self) -> int:
        """Size of a voxel of the output in memory."""
        return self.head.kept_channels * np.dtype(self.head.kept_dtype).itemsize


@dataclass(frozen=True, slots=True)
class Region:
    """Shards that one task fills: for each head a box of their numbers; and the patches that it runs."""

    shards: tuple[Ranges, ...]
    patches: Ranges

    def wanted(self, heads: Sequence[PlannedHead]) -> list[Bools]:
        """Which of the shards of each head are the region's."""
        found = [np.zeros(head.tiling.shard_counts, dtype=bool) for head in heads]
        for shards, box in zip(found, self.shards, strict=True):
            shards[tuple(slice(numbers.start, numbers.stop) for numbers in box)] = True
        return found


@dataclass(frozen=True, slots=True, eq=False)
class PredictionPlan:
    """What a prediction will do to one subject.

    ``swept_axis`` is the longest, so that the front is small. ``skipped`` are patches that lie wholly outside
    the mask. ``region_bytes`` is what a region holds at most, without the network's own; with ``tta`` that is
    run on all flips of a batch.
    """

    subject: Subject
    images: tuple[Image, ...]
    grid: PatchGrid
    swept_axis: int
    batch_size: int
    heads: tuple[PlannedHead, ...]
    regions: tuple[Region, ...]
    skipped: Bools | None
    region_bytes: int
    jobs: int = 1
    tta: bool = False

    @property
    def peak_bytes(self) -> int:
        """What all jobs together hold at most, without the network's own."""
        return self.jobs * self.region_bytes

    @property
    def outputs_bytes(self) -> int:
        """What the network gives for a batch, as it is and as it is summed."""
        return outputs_bytes([planned.head for planned in self.heads], self.batch_size, tta=self.tta)

    @property
    def patches(self) -> int:
        """Patches to be run, each counted once."""
        return len(self.grid) - (0 if self.skipped is None else int(self.skipped.sum()))

    @property
    def patches_run(self) -> int:
        """Patches that all regions run together, in whole batches."""
        return sum(self.count_run(self.needed(region.wanted(self.heads))) for region in self.regions)

    @property
    def redone_patches(self) -> int:
        """Patches that are run again at most when a task was killed: those about its front.

        A shard may still be being written until the next one is complete.
        """
        rows = 0
        for head in self.heads:
            axis = head.tiling.axes[self.swept_axis]
            tiles = [axis.tiles_of(shard) for shard in range(axis.shards)]
            for shard, next_one in zip(tiles, [*tiles[1:], tiles[-1]], strict=True):
                last, first = next_one[-1].contributors[-1], shard[0].contributors[0]
                rows = max(rows, last - first + 1)
        of_row = math.prod(n for a, n in enumerate(self.grid.counts) if a != self.swept_axis)
        return min(self.patches, rows * of_row + (1 + BATCHES_AHEAD) * self.batch_size)

    @property
    def bytes_in(self) -> int:
        """Size of the images that are read, as stored."""
        return sum(
            image.record.stored_bytes
            if image.record
            else math.prod(image.shape) * image.source.dtype.itemsize
            for image in self.images
        )

    @property
    def chunks_in(self) -> int:
        """Chunks of the images that are read."""
        return sum(
            math.prod(-(-n // c) for n, c in zip(image.spatial_shape, image.source.chunk_shape, strict=True))
            for image in self.images
        )

    @property
    def bytes_out(self) -> int:
        """Size of the output before it is compressed."""
        return sum(head.record.voxel_bytes for head in self.heads)

    @property
    def shards_out(self) -> int:
        """Number of shards."""
        return sum(math.prod(head.tiling.shard_counts) for head in self.heads)

    def needed(self, wanted: Sequence[Bools]) -> Bools:
        """The patches that are run for some shards of each head, over the positions of the grid."""
        found = np.zeros(self.grid.counts, dtype=bool)
        for head, shards in zip(self.heads, wanted, strict=True):
            found |= head.tiling.patches_for(shards)
        return found & self._is_run

    def batches(self, needed: Bools) -> Iterator[list[Triple]]:
        """Positions of the patches of each batch in sweep order, of the batches with any that is needed.

        What is in a batch depends on the grid and the mask alone, so that a network gives a patch the same
        output in whichever region it is run.
        """
        order = sweep_order(self.swept_axis)
        positions = np.argwhere(self._is_run.transpose(order))[:, np.argsort(order)]
        for first in self._starts_of_batches(needed).tolist():
            yield [(i, j, k) for i, j, k in positions[first : first + self.batch_size].tolist()]

    def count_run(self, needed: Bools) -> int:
        """Number of patches in all batches with any that is needed."""
        return int(np.minimum(self.batch_size, self.patches - self._starts_of_batches(needed)).sum())

    def _starts_of_batches(self, needed: Bools) -> Integers:
        """Which of the patches that are run, in sweep order, begin a batch with any that is needed."""
        order = sweep_order(self.swept_axis)
        is_needed = needed.transpose(order)[self._is_run.transpose(order)]
        starts = np.arange(0, len(is_needed), self.batch_size)
        return starts[np.logical_or.reduceat(is_needed, starts)] if starts.size else starts

    @property
    def _is_run(self) -> Bools:
        return np.ones(self.grid.counts, dtype=bool) if self.skipped is None else ~self.skipped

    def to_json(self) -> Json:
        """The plan's figures as plain JSON."""
        return {
            "subject": self.subject.name,
            "shape": list(self.grid.spatial_shape),
            "patches": self.patches,
            "patches_skipped": len(self.grid) - self.patches,
            "patches_run_twice": self.patches_run - self.patches,
            "regions": len(self.regions),
            "chunks_in": self.chunks_in,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "shards_out": self.shards_out,
            "peak_bytes": self.peak_bytes,
            "patches_redone_at_most": self.redone_patches,
        }

    def __str__(self) -> str:
        twice = self.patches_run - self.patches
        masked = len(self.grid) - self.patches
        notes = f", {masked} more are masked out" if masked else ""
        notes += f", {twice} runs more where regions meet" if twice else ""
        return (
            f"{self.subject.name}: {' x '.join(map(str, self.grid.spatial_shape))} voxels in "
            f"{self.patches} patches{notes}; {self.chunks_in} chunks of {format_bytes(self.bytes_in)} in, "
            f"{self.shards_out} shards of {format_bytes(self.bytes_out)} out; "
            f"at most {format_bytes(self.peak_bytes)} of memory; "
            f"up to {self.redone_patches} patches again after a kill"
        )
