"""What a prediction will do, before it does anything: patches, write units, regions, and their memory.

A region is a box of write units that one task fills: it runs every patch that adds to them. One region is
the whole volume; more are made to share the work out, along the swept axis, or to fit a memory limit, across
it. Patches that add to two regions are run for each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from zpatch.blending.reduction import Reduction, check_reduction
from zpatch.blending.tiling import AxisTiles, Bools, Tiling, sweep_order
from zpatch.blending.windows import check_overlap_mode
from zpatch.errors import OptionError
from zpatch.geometry.boxes import (
    PatchLocation,
    Triple,
    patch_overlap_triple,
    patch_size_triple,
)
from zpatch.geometry.padding import check_padding_mode
from zpatch.geometry.patch_grid import PatchGrid
from zpatch.images.cohort import Subject
from zpatch.images.image import Image
from zpatch.images.normalization import Normalize
from zpatch.prediction.peak_memory import AxisLives, Held, Integers
from zpatch.runtime.byte_sizes import format_bytes, parse_bytes
from zpatch.store.image_record import ImageRecord, Json

WEIGHT_BYTES = 4  # of a voxel's summed weights
BATCHES_AHEAD = 2  # of the network, while a unit waits for the one before it to be written
FLIPPED_OUTPUTS = 1  # more than those of a batch, while they are summed over all its flips: the sums

Ranges = tuple[range, range, range]
MaskFunction = Callable[[Subject, PatchLocation], bool]


@dataclass(frozen=True, slots=True)
class PredictOptions:
    """What a user may choose; see ``predict``."""

    image: tuple[str, ...]
    patch_size: Triple
    patch_overlap: Triple
    overlap_mode: str = "hann"
    reduce: Reduction = None
    batch_size: int = 1
    padding_mode: str | None = None
    normalize: str | None = None
    mask: str | MaskFunction | None = None
    fill: float = 0
    max_memory: int | str | None = None
    jobs: int = 1
    scheduler: str | None = None

    @classmethod
    def of(
        cls,
        *,
        image: str | Sequence[str],
        patch_size: int | Sequence[int],
        patch_overlap: int | Sequence[int] = 0,
        **options: Any,
    ) -> Self:
        """Options in the forms that ``predict`` takes them in."""
        size = patch_size_triple(patch_size)
        return cls(
            image=(image,) if isinstance(image, str) else tuple(image),
            patch_size=size,
            patch_overlap=patch_overlap_triple(patch_overlap, size),
            **options,
        )

    def __post_init__(self) -> None:
        check_overlap_mode(self.overlap_mode)
        check_reduction(self.reduce)
        check_padding_mode(self.padding_mode)
        if self.normalize is not None:
            Normalize(self.normalize)
        if not self.image:
            raise OptionError("image= names no image to predict from")
        for name, count in (("batch_size", self.batch_size), ("jobs", self.jobs)):
            if count < 1:
                raise OptionError(f"{name} must be at least 1, not {count}")
        if self.max_memory is not None:
            parse_bytes(self.max_memory)


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
    def unit_bytes(self) -> int:
        """Size of a write unit in memory."""
        return math.prod(self.tiling.unit_shape) * self._voxel_bytes

    @property
    def _voxel_bytes(self) -> int:
        return self.head.kept_channels * np.dtype(self.head.kept_dtype).itemsize

    def held(self, units: Ranges, patches: Ranges, *, masked: bool = False) -> Iterator[Held]:
        """What is held of sums and of write units while patches sweep over some units.

        Where patches are ``masked`` out weights are summed too, and a unit may begin with its first patch.
        """
        sums = self.head.channels * self.head.sum_bytes + (WEIGHT_BYTES if masked else 0)
        tiles = [range(a.tiles_of(u[0]).start, a.tiles_of(u[-1]).stop) for a, u in self._along(units)]
        along = list(zip(self.tiling.axes, tiles, patches, strict=True))
        all_tiles = [_tile_lives(axis, list(some), run.start) for axis, some, run in along]
        alone = [
            _tile_lives(axis, [t for t in some if len(axis.touching[t]) == 1], run.start)
            for axis, some, run in along
        ]
        filled = [
            _unit_lives(axis, u, run.start, masked)
            for (axis, u), run in zip(self._along(units), patches, strict=True)
        ]
        for lives, voxel_bytes in ((all_tiles, sums), (alone, -sums), (filled, self._voxel_bytes)):
            a, b, c = (lives[axis] for axis in self.tiling.order)
            yield Held((a, b, c), voxel_bytes)

    def _along(self, units: Ranges) -> list[tuple[AxisTiles, range]]:
        return list(zip(self.tiling.axes, units, strict=True))


def _tile_lives(axis: AxisTiles, tiles: Sequence[int], first: int) -> AxisLives:
    births = np.array([axis.touching[t][0] for t in tiles], dtype=np.int64)
    deaths = np.array([axis.touching[t][-1] for t in tiles], dtype=np.int64)
    return AxisLives(births - first, deaths - first, np.diff(axis.edges)[list(tiles)])


def _unit_lives(axis: AxisTiles, units: range, first: int, masked: bool) -> AxisLives:
    tiles = [axis.tiles_of(unit) for unit in units]
    births = np.array([axis.touching[of[0]][0 if masked else -1] for of in tiles], dtype=np.int64)
    deaths = np.array([axis.touching[of[-1]][-1] for of in tiles], dtype=np.int64)
    sizes = np.array([axis.edges[of[-1] + 1] - axis.edges[of[0]] for of in tiles], dtype=np.int64)
    return AxisLives(births - first, deaths - first, sizes)


@dataclass(frozen=True, slots=True)
class Region:
    """Write units that one task fills: for each head a box of their numbers; and the patches that it runs."""

    units: tuple[Ranges, ...]
    patches: Ranges

    def wanted(self, heads: Sequence[PlannedHead]) -> list[Bools]:
        """Which of the units of each head are the region's."""
        found = [np.zeros(head.tiling.unit_counts, dtype=bool) for head in heads]
        for units, box in zip(found, self.units, strict=True):
            units[tuple(slice(numbers.start, numbers.stop) for numbers in box)] = True
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

        A unit may still be being written until the next one is complete.
        """
        rows = 0
        for head in self.heads:
            axis = head.tiling.axes[self.swept_axis]
            tiles = [axis.tiles_of(unit) for unit in range(axis.units)]
            for unit, next_one in zip(tiles, [*tiles[1:], tiles[-1]], strict=True):
                last, first = axis.touching[next_one[-1]][-1], axis.touching[unit[0]][0]
                rows = max(rows, int(last - first) + 1)
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
    def units_out(self) -> int:
        """Number of write units."""
        return sum(math.prod(head.tiling.unit_counts) for head in self.heads)

    def needed(self, wanted: Sequence[Bools]) -> Bools:
        """The patches that are run for some write units of each head, over the positions of the grid."""
        found = np.zeros(self.grid.counts, dtype=bool)
        for head, units in zip(self.heads, wanted, strict=True):
            found |= head.tiling.patches_for(units)
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
            "units_out": self.units_out,
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
            f"{self.units_out} write units of {format_bytes(self.bytes_out)} out; "
            f"at most {format_bytes(self.peak_bytes)} of memory; "
            f"up to {self.redone_patches} patches again after a kill"
        )
