"""The plan of a prediction, before anything is written: patches, shards, regions, and their memory.

A region is a box of shards that one task fills: it runs every patch that adds to them. One region is the
whole volume. There are more regions along the swept axis if several tasks share the work, and across it if
memory is limited. Patches that add to two regions are run for each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from zpatch.chunks.layout import chunk_counts
from zpatch.digests import Json
from zpatch.geometry.boxes import Bools, Integers, Triple
from zpatch.geometry.patch_grid import PatchGrid
from zpatch.geometry.voxel_grid import format_spacing
from zpatch.images.image import Image
from zpatch.images.subject import Subject
from zpatch.records.image_record import ImageRecord
from zpatch.runtime.byte_sizes import format_bytes
from zpatch.sampling.patch_views import PatchView
from zpatch.sources.input_files import InputSeal
from zpatch.tiling.volume_tiles import Tiling, sweep_order

BATCHES_AHEAD = 2  # through the network, while a shard waits until the one before it is written
OUTPUT_BUFFERS = 2  # of a batch: as the network returns it, and as it is summed
HALVING_BUFFERS = 8  # of the voxels that are halved at a time: as they are read, padded, sorted, in float64
FLIPPED_OUTPUTS = 1  # more of them with test-time augmentation: the sums over flips

Ranges = tuple[range, range, range]


@dataclass(frozen=True, slots=True)
class Head:
    """One output of a network, known from the first patch.

    ``channels`` are summed, with ``sum_bytes`` each; ``patch_shape`` is the output's extent for one patch.
    A reduced voxel has ``kept_channels`` of ``kept_dtype``. Sums are floats, or integers that are classes.
    """

    name: str
    channels: int
    sum_bytes: int
    patch_shape: Triple
    kept_channels: int
    kept_dtype: str
    is_float: bool = True

    def shape_for(self, spatial_shape: Triple, patch_size: Triple) -> Triple:
        """The extent of the output for a whole volume, scaled as the network scales a patch, and rounded.

        >>> head = Head("seg", 2, 4, patch_shape=(8, 8, 8), kept_channels=1, kept_dtype="|u1")
        >>> head.shape_for((101, 40, 1), patch_size=(16, 16, 16))
        (51, 20, 1)
        """
        scaled = zip(spatial_shape, self.patch_shape, patch_size, strict=True)
        i, j, k = (max(1, math.floor(n * q / p + 0.5)) for n, q, p in scaled)
        return i, j, k


@dataclass(frozen=True, slots=True)
class NetworkCost:
    """What a network takes for one batch.

    Attributes:
        bytes: The memory that it holds at most while it runs, beside the batch and what it keeps.
        seconds: The time that it takes; in one thread, if several jobs share the processors.
    """

    bytes: int
    seconds: float


@dataclass(frozen=True, slots=True, eq=False)
class PlannedHead:
    """An output for one subject: ``record`` describes its image, ``tiling`` the tiles that become final."""

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

    @property
    def bytes_out(self) -> int:
        """Size of the image and of its coarser levels before they are compressed."""
        levels = sum(math.prod(level.shape) for level in self.record.levels)
        return self.record.voxel_bytes + levels * np.dtype(self.record.dtype).itemsize

    @property
    def shards_out(self) -> int:
        """Number of shards of the image and of its coarser levels."""
        levels = (math.prod(chunk_counts(level.shape, level.shards)) for level in self.record.levels)
        return math.prod(self.tiling.shard_counts) + sum(levels)

    @property
    def level_bytes(self) -> int:
        """The most memory that is held while a shard of a coarser level is made."""
        shards = [math.prod(level.shards) for level in self.record.levels]
        fine = 8 * math.prod(self.record.chunks)
        return (max(shards) + HALVING_BUFFERS * fine) * np.dtype(self.record.dtype).itemsize if shards else 0


@dataclass(frozen=True, slots=True)
class Region:
    """The work of one task: a box of ``shards`` of each head, and a box of ``patches``, both by number."""

    shards: tuple[Ranges, ...]
    patches: Ranges

    def wanted(self, heads: Sequence[PlannedHead]) -> list[Bools]:
        """Which shards of each head belong to the region, over the positions of shards."""
        found = [np.zeros(head.tiling.shard_counts, dtype=bool) for head in heads]
        for shards, box in zip(found, self.shards, strict=True):
            shards[tuple(slice(numbers.start, numbers.stop) for numbers in box)] = True
        return found


@dataclass(frozen=True, slots=True, eq=False)
class PredictionPlan:
    """The plan of a prediction for one subject.

    ``views`` are read at the patches of ``grid``, ``batch_size`` at a time, and all ``regions`` together
    fill the shards of ``heads``. ``native`` is the image whose own grid the output is on. ``skipped`` marks
    patches wholly outside the mask, over the positions of the grid. ``cost`` is the network's, if it was
    measured. ``region_bytes`` is the most memory that a region holds beside what the process holds before it,
    with the network's if that is known; ``jobs`` regions are run at a time. With ``tta`` the network is run
    on all flips of a batch. ``identities`` are those of the images whose statistics were computed for the
    plan; empty if none were. ``seals`` are those of the images when the plan was made.
    """

    subject: Subject
    views: tuple[PatchView, ...]
    native: Image
    grid: PatchGrid
    batch_size: int
    heads: tuple[PlannedHead, ...]
    regions: tuple[Region, ...]
    skipped: Bools | None
    region_bytes: int
    jobs: int = 1
    tta: bool = False
    cost: NetworkCost | None = None
    identities: tuple[str, ...] = ()
    seals: tuple[InputSeal, ...] = ()

    @property
    def images(self) -> list[Image]:
        """The images that are read."""
        return [view.image for view in self.views]

    def grid_of(self, view: PatchView) -> PatchGrid:
        """The boxes that are read of a view, by the positions of the patches."""
        return self.grid.around_the_same_centres(view.factors, view.image.spatial_shape)

    @property
    def swept_axis(self) -> int:
        """The slowest axis of the order in which patches are run: the longest, so that memory is small."""
        return self.heads[0].tiling.swept_axis

    @property
    def peak_bytes(self) -> int:
        """The most memory that all jobs together hold; see ``region_bytes``.

        Coarser levels are made after all regions of a subject, while other jobs run those of the next one.
        """
        of_levels = max(head.level_bytes for head in self.heads)
        regions = self.jobs * self.region_bytes
        return max(regions, of_levels) if self.jobs == 1 else regions + of_levels

    @property
    def network_bytes(self) -> int:
        """The part of ``region_bytes`` that the network holds while it runs; 0 if that is not known."""
        return 0 if self.cost is None else self.cost.bytes

    def network_seconds(self, patches: int) -> float:
        """The time that the network takes for some patches, in one process; 0 if its cost is not known."""
        return 0.0 if self.cost is None else self.cost.seconds * math.ceil(patches / self.batch_size)

    @property
    def outputs_bytes(self) -> int:
        """Size of the network's outputs for a batch, in all buffers."""
        buffers = OUTPUT_BUFFERS + (FLIPPED_OUTPUTS if self.tta else 0)
        heads = [planned.head for planned in self.heads]
        patch_bytes = sum(h.channels * h.sum_bytes * math.prod(h.patch_shape) for h in heads)
        return buffers * self.batch_size * patch_bytes

    @property
    def patches(self) -> int:
        """Number of patches to run, each counted once."""
        return len(self.grid) - (0 if self.skipped is None else int(self.skipped.sum()))

    @property
    def patches_run(self) -> int:
        """Patches that all regions together run, in whole batches."""
        return sum(self.count_run(self.needed(region.wanted(self.heads))) for region in self.regions)

    @property
    def redone_patches(self) -> int:
        """The most patches that are run again after a task was killed: those of its unfinished shards.

        A shard may still be in flight until the next one is complete.
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
            for image in self._stored_images
        )

    @property
    def chunks_in(self) -> int:
        """Chunks of the images that are read."""
        return sum(
            math.prod(-(-n // c) for n, c in zip(image.spatial_shape, image.source.chunk_shape, strict=True))
            for image in self._stored_images
        )

    @property
    def _stored_images(self) -> list[Image]:
        """The images that are read, on their own grids."""
        return [image.root[0] for image in self.images]

    @property
    def bytes_out(self) -> int:
        """Size of the output before it is compressed."""
        return sum(head.bytes_out for head in self.heads)

    @property
    def shards_out(self) -> int:
        """Number of shards."""
        return sum(head.shards_out for head in self.heads)

    @property
    def levels(self) -> int:
        """Number of coarser levels of the output that has most."""
        return max(len(head.record.levels) for head in self.heads)

    def needed(self, wanted: Sequence[Bools]) -> Bools:
        """Which patches are run to fill some shards of each head, over the positions of the grid."""
        found = np.zeros(self.grid.counts, dtype=bool)
        for head, shards in zip(self.heads, wanted, strict=True):
            found |= head.tiling.patches_for(shards)
        return found & self._is_run

    def batches(self, needed: Bools) -> Iterator[list[Triple]]:
        """Positions of the patches of each batch with any needed patch, in sweep order.

        The content of a batch depends on the grid and the mask alone, so that a network gives a patch the
        same output in whichever region it is run.
        """
        order = sweep_order(self.swept_axis)
        positions = np.argwhere(self._is_run.transpose(order))[:, np.argsort(order)]
        for first in self._starts_of_batches(needed).tolist():
            yield [(i, j, k) for i, j, k in positions[first : first + self.batch_size].tolist()]

    def count_run(self, needed: Bools) -> int:
        """Number of patches in all batches with any needed patch."""
        return int(np.minimum(self.batch_size, self.patches - self._starts_of_batches(needed)).sum())

    def _starts_of_batches(self, needed: Bools) -> Integers:
        """Numbers, in sweep order, of the patches that begin a batch with any needed patch."""
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
            "native_shape": list(self.native.spatial_shape),
            "patches": self.patches,
            "patches_skipped": len(self.grid) - self.patches,
            "patches_run_twice": self.patches_run - self.patches,
            "regions": len(self.regions),
            "chunks_in": self.chunks_in,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "shards_out": self.shards_out,
            "levels": self.levels,
            "peak_bytes": self.peak_bytes,
            "patches_redone_at_most": self.redone_patches,
        }

    def __str__(self) -> str:
        twice = self.patches_run - self.patches
        masked = len(self.grid) - self.patches
        channels = sum(image.num_channels for image in self.images)
        fed = f" of {channels} channels" if channels > 1 else ""
        parts = [part for image in self.images if (part := image.opened.in_words)]
        fed += f" ({'; '.join(parts)})" if parts else ""
        model, native = self.images[0].grid, self.native.grid
        of_native = f"{' x '.join(map(str, native.shape))} of {format_spacing(native.spacing)} mm"
        placed = "" if model.is_same(native) else f" of {format_spacing(model.spacing)} mm (from {of_native})"
        notes = f", {masked} more are masked out" if masked else ""
        notes += f", {twice} runs more where regions meet" if twice else ""
        plural = "" if self.levels == 1 else "s"
        levels = f" with {self.levels} coarser level{plural}" if self.levels else ""
        return (
            f"{self.subject.name}: {' x '.join(map(str, self.grid.spatial_shape))} voxels{placed}{fed} in "
            f"{self.patches} patches{notes}; {self.chunks_in} chunks of {format_bytes(self.bytes_in)} in, "
            f"{self.shards_out} shards of {format_bytes(self.bytes_out)} out{levels}; "
            f"at most {format_bytes(self.peak_bytes)} of memory; "
            f"up to {self.redone_patches} patches again after a kill"
        )
