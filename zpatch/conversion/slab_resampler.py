"""Slabs of a file -> slabs of another voxel size, with no more of the file in memory than they need."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from zpatch.chunks.scaling import UNSCALED, Scaling
from zpatch.conversion.conversion_options import ConvertOptions
from zpatch.geometry.boxes import PatchLocation, Voxels, padded_to_4d, reversed_axes
from zpatch.geometry.orientation import Orientation
from zpatch.geometry.voxel_grid import Spacing, VoxelGrid, checked_spacing
from zpatch.records.image_record import ImageRecord, Kind, Resampled
from zpatch.resampling.interpolation import Interpolation
from zpatch.resampling.resampler import ResampledBox, Resampler
from zpatch.volume_files.formats import read_header
from zpatch.volume_files.nifti_writer import header_of
from zpatch.volume_files.volume_file import Slab, VolumeFile, rows_of


@dataclass(frozen=True, slots=True, eq=False)
class SlabResampler:
    """Resamples the volumes of a file from its ``native`` grid to ``grid``; both have the axes of the file.

    ``wanted`` is the spacing along I, J, K of the store, whose axes may be in another order. Axes that the
    store has reversed (``flips``) are reversed before they are resampled, so that the store has the voxels of
    the volume that is first turned and then resampled. ``scaling`` is applied to the voxels of the file.
    """

    native: VoxelGrid
    grid: VoxelGrid
    flips: tuple[bool, bool, bool]
    resampler: Resampler
    wanted: tuple[float, float, float]
    scaling: Scaling = UNSCALED

    @classmethod
    def of(cls, file: VolumeFile, turn: Orientation, kind: Kind, options: ConvertOptions) -> Self | None:
        """The resampling that some options ask for; None for none.

        Raises OptionError for an affine that is singular, and for complex voxels.
        """
        if options.spacing is None:
            return None
        k, j, i = padded_to_4d(file.shape)[1:]
        native = VoxelGrid((i, j, k), file.affine)
        wanted = _wanted(options.spacing, native, turn)
        of_file = tuple(wanted[target] for target in turn.axes)
        is_label = kind == "label"
        mode, antialias = ("nearest", False) if is_label else (options.interpolation, options.antialias)
        interpolation = Interpolation(mode, antialias, of_labels=is_label)
        interpolation.dtype_of(file.channel_dtype)
        scaling = UNSCALED if is_label else Scaling(file.slope, file.inter)
        flip = Orientation(flips=turn.flips)
        flipped = VoxelGrid(native.shape, flip.affine(native.affine, native.shape))
        new = flipped.with_spacing(of_file)
        resampler = Resampler(native.shape, flipped.spacing_matrix(of_file), interpolation)
        grid = VoxelGrid(new.shape, flip.affine(new.affine, new.shape))
        return cls(native, grid, turn.flips, resampler, wanted, scaling)

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the stored array, for that of the file; ([c,] z, y, x)."""
        return *shape[:-3], *self.grid.shape[::-1]

    def dtype_of(self, file: VolumeFile) -> np.dtype[Any]:
        """The type of the stored voxels. Colours stay bytes."""
        if file.colours > 1:
            return file.channel_dtype
        return self.resampler.interpolation.dtype_of(self.scaling.dtype_of(file.channel_dtype))

    def source_bytes(self, depth: int, itemsize: int) -> int:
        """Bytes of a channel of the file that are held for a slab of ``depth`` planes."""
        i, j, _ = self.resampler.shape
        held = 2 * self._held_planes(depth) + self._source_depth(depth)  # twice: as read, and in one piece
        return held * i * j * itemsize

    def slabs(
        self, file: VolumeFile, extent: tuple[int, int], source: Iterable[Slab], *, backwards: bool
    ) -> Iterator[Slab]:
        """The slabs of the new grid, as ``VolumeFile.slabs`` gives those of the file; it is read to its end.

        ``source`` are the slabs of the file, of the same channels; ``extent`` is how many channels and planes
        a shard holds.
        """
        channels, *_ = padded_to_4d(file.shape)
        together, depth = extent
        read = iter(source)
        for first in range(0, channels, together):
            window = _Window(read, self.resampler.shape[2])
            start = 0
            for row, planes in rows_of(self.grid.shape[2], depth, backwards=backwards):
                planned = self._box(start, planes)
                low, high = planned.needed.index[2], planned.needed.index_fin[2]
                length = self.resampler.shape[2]
                voxels = window.planes(*((length - high, length - low) if self.flips[2] else (low, high)))
                yield Slab((first // together, row), self._resampled(planned, voxels, planes, file))
                start += planes
            window.skip()
        for _ in read:  # a file that is compressed is checked at its end
            raise AssertionError("the file has more slabs than channels")

    def source_extent(self, extent: tuple[int, int]) -> tuple[int, int]:
        """How many channels and planes of the file are read at a time, for those of a shard."""
        return extent[0], self._source_depth(extent[1])

    def described(self, path: Path) -> Resampled:
        """How the image of a file is resampled, for its record."""
        native = bytes(header_of(read_header(path).raw_header).binaryblock)
        how = self.resampler.interpolation
        return Resampled(
            self.wanted,
            how.mode,
            how.antialias,
            self.native.shape,
            tuple(map(tuple, self.native.affine.tolist())),
            base64.b64encode(native).decode(),
        )

    def _box(self, start: int, planes: int) -> ResampledBox:
        """The box of some planes of the file, with reversed axes."""
        i, j, k = self.grid.shape
        first = k - start - planes if self.flips[2] else start
        return self.resampler.box(PatchLocation((0, 0, first), (i, j, planes)))

    def _flipped(self, voxels: Voxels) -> Voxels:
        """Voxels (c, z, y, x) with reversed axes, or back."""
        return np.flip(voxels, tuple(3 - axis for axis in range(3) if self.flips[axis]))

    def _resampled(self, planned: ResampledBox, voxels: Voxels, planes: int, file: VolumeFile) -> Voxels:
        """Some planes (c, z, y, x) of the new grid, from the planes of the file under them."""
        x, y, _ = planned.needed.to_slices()
        needed = np.ascontiguousarray(self._flipped(voxels)[:, :, y, x])
        i, j, _ = self.grid.shape
        dtype = self.resampler.interpolation.dtype_of(self.scaling.dtype_of(needed.dtype))
        out = np.empty((len(needed), planes, j, i), dtype)
        planned.write(reversed_axes(needed), reversed_axes(out), self.scaling)
        return self._flipped(np.clip(np.rint(out), 0, 255).astype(np.uint8) if file.colours > 1 else out)

    def _source_depth(self, depth: int) -> int:
        planes = round(depth * float(self.resampler.matrix[2, 2]))
        return min(max(1, planes), self.resampler.shape[2])

    def _held_planes(self, depth: int) -> int:
        """The most planes of the file that a slab needs at once."""
        total = self.grid.shape[2]
        starts = range(0, total, depth)
        boxes = [self._box(start, min(depth, total - start)).needed for start in starts]
        return max(box.size[2] for box in boxes)


class _Window:
    """The planes of a channel group of a file as they pass: only those that are still needed are held."""

    def __init__(self, slabs: Iterator[Slab], length: int) -> None:
        self._slabs = slabs
        self._length = length
        self._held: list[tuple[int, Voxels]] = []
        self._read = 0

    def planes(self, start: int, stop: int) -> Voxels:
        """The planes from ``start`` to ``stop``; those before ``start`` are let go."""
        self._held = [(first, of) for first, of in self._held if first + of.shape[1] > start]
        while self._read < stop:
            self._next()
            self._held = [(first, of) for first, of in self._held if first + of.shape[1] > start]
        parts = [of[:, max(start - first, 0) : max(stop - first, 0)] for first, of in self._held]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def skip(self) -> None:
        """Read the planes that are left, and let go of them."""
        self._held = []
        while self._read < self._length:
            self._next()
            self._held = []

    def _next(self) -> None:
        slab = next(self._slabs)
        self._held.append((self._read, slab.voxels))
        self._read += slab.voxels.shape[1]


def _wanted(spacing: Spacing, native: VoxelGrid, turn: Orientation) -> tuple[float, float, float]:
    """A wanted spacing along the axes of the store; where it is None, that of the file's axis."""
    kept = [native.spacing[turn.axes.index(axis)] for axis in range(3)]
    return checked_spacing(spacing, kept)


def is_resampled_as(record: ImageRecord, options: ConvertOptions) -> bool:
    """Whether a stored image was resampled as some options ask for."""
    found = record.resampled
    if options.spacing is None or found is None:
        return (options.spacing is None) == (found is None)
    i, j, k = found.shape
    wanted = _wanted(options.spacing, VoxelGrid((i, j, k), np.array(found.affine)), record.orientation)
    if not np.allclose(found.spacing, wanted, rtol=1e-6, atol=0):
        return False
    return record.kind == "label" or (found.interpolation, found.antialias) == (
        (options.interpolation, options.antialias)
    )
