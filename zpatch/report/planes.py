"""Planes of stored images, as pictures show them: which planes, in which orientation, read in little memory.

Pictures of images with a sform or qform, which say how a patient lies, follow the radiological convention:
the patient's right is on the left of axial and coronal planes, and sagittal planes face left. Of all other
images columns, rows and planes are I, J and K in stored order. Planes follow the voxel axes and are not
resampled to world axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from zpatch.chunks.gather import read_region
from zpatch.chunks.sharded_array import ShardedArray
from zpatch.errors import MemoryLimitError
from zpatch.geometry.affines import spacing_mm
from zpatch.geometry.boxes import AXIS_NAMES, PatchLocation, Triple, Voxels, padded_to_4d
from zpatch.geometry.orientation import AS_STORED, orientation_to
from zpatch.records.image_record import ImageRecord
from zpatch.store.store import sharded_array

TILE_SIDE = 1024  # voxels of a plane that are read at once, along each side
MAX_BLOCK_SIDE = 2048  # voxels of a plane that are averaged to one pixel, along each side
MIN_VOLUME = 1e-6  # of the box that the unit vectors of the axes span
CHANNELS_SHOWN = 3

Size = tuple[int, int]

# Picture axes point to the patient's left, back and feet. For each plane: its name, its normal, the axis
# across the picture and the axis down the picture.
_DIRECTIONS = "LPI"
_OPPOSITE = {"L": "R", "P": "A", "I": "S"}
_PLANES = (("axial", 2, 0, 1), ("coronal", 1, 0, 2), ("sagittal", 0, 1, 2))


@dataclass(frozen=True, slots=True)
class View:
    """One of the three viewing directions of a volume.

    ``normal`` is the voxel axis (0, 1, 2 for I, J, K) along the line of sight. ``across`` and ``down`` are
    the axes along a picture's width and height, reversed where ``flips`` (across, down) is true. ``edges``
    are the letters at the left, right, top and bottom edge of a picture; empty strings for none.
    """

    name: str
    normal: int
    across: int
    down: int
    flips: tuple[bool, bool]
    edges: tuple[str, str, str, str]

    def size(self, spatial_shape: Triple) -> Size:
        """Height and width of a plane in voxels."""
        return spatial_shape[self.down], spatial_shape[self.across]

    def size_mm(self, record: ImageRecord) -> tuple[float, float]:
        """Height and width of a plane in mm; an axis without a usable voxel size counts 1 mm a voxel."""
        spacing = [s if _is_size(s) else 1.0 for s in spacing_mm(record.affine_array)]
        height, width = self.size(record.spatial_shape)
        return height * spacing[self.down], width * spacing[self.across]

    def pixels(self, record: ImageRecord, longest: int) -> Size:
        """Height and width of a picture, at most ``longest`` pixels and no more pixels than voxels."""
        extents_mm = self.size_mm(record)
        wanted = [math.ceil(longest * extent / max(extents_mm)) for extent in extents_mm]
        height, width = (
            max(1, min(n, w)) for n, w in zip(self.size(record.spatial_shape), wanted, strict=True)
        )
        return height, width


def views_of(record: ImageRecord) -> list[View]:
    """The three views of an image; for a flat image, only the view along its normal."""
    placed = is_placed(record)
    turned = orientation_to(record.affine_array, _DIRECTIONS) if placed else AS_STORED
    views = []
    for name, *axes in _PLANES:
        normal, across, down = (turned.axes.index(axis) for axis in axes)
        if placed:
            right, bottom = (_DIRECTIONS[axis] for axis in axes[1:])
            edges = (_OPPOSITE[right], right, _OPPOSITE[bottom], bottom)
        else:
            name = f"{AXIS_NAMES[across]}{AXIS_NAMES[down]}"
            edges = ("", AXIS_NAMES[across], "", AXIS_NAMES[down])
        views.append(View(name, normal, across, down, (turned.flips[across], turned.flips[down]), edges))
    return [view for view in views if min(view.size(record.spatial_shape)) > 1] or views[:1]


def is_placed(record: ImageRecord) -> bool:
    """Whether the affine of an image says which voxels are a patient's left, front and head."""
    return record.affine_source in ("sform", "qform") and _is_regular(record)


def _is_regular(record: ImageRecord) -> bool:
    sizes = spacing_mm(record.affine_array)
    return all(map(_is_size, sizes)) and abs(np.linalg.det(record.affine_array[:3, :3] / sizes)) > MIN_VOLUME


def _is_size(spacing: float) -> bool:
    """Whether a voxel size in mm is plausible: headers may hold 0, infinity or NaN."""
    return 1e-9 < spacing < 1e9


@dataclass(frozen=True, slots=True)
class Part:
    """Channels of an image that are one picture, and its title; empty for a single picture."""

    title: str
    channels: range


def parts_of(record: ImageRecord) -> list[Part]:
    """The channels that are shown.

    RGB channels are one picture. A time series shows its first, middle and last volume; other images show
    their first three channels, one by one. A label map shows all channels at once.
    """
    channels = record.shape_czyx[0]
    if channels == 1:
        return [Part("", range(1))]
    if record.axes[0] == "t":
        volumes = sorted({0, channels // 2, channels - 1})
        return [Part(f"time point {n + 1} of {channels}", range(n, n + 1)) for n in volumes]
    if record.kind == "label":
        return [Part("", range(channels))]
    if is_coloured(record):
        count = channels // record.colours
        return [Part("" if count == 1 else f"colours 1 of {count}", range(3))]
    shown = range(min(channels, CHANNELS_SHOWN))
    return [Part(f"channel {n + 1} of {channels}", range(n, n + 1)) for n in shown]


def is_coloured(record: ImageRecord) -> bool:
    """Whether the first three channels of an image are red, green and blue."""
    channels = record.shape_czyx[0]
    return channels >= 3 and (record.colours in (3, 4) or (channels == 3 and record.dtype == "|u1"))


@dataclass(frozen=True, slots=True)
class Plane:
    """One plane of a stored image.

    ``folder`` and ``record`` are the image's folder and its record in the manifest. ``at`` is the index of
    the plane along the normal of ``view``; ``channels`` is the range of channels that are read.
    """

    folder: Path
    record: ImageRecord
    view: View
    at: int
    channels: range

    def means(self, size: Size, shade: Callable[[Voxels], Voxels]) -> Voxels:
        """Pixels (C, height, width), each the mean of ``shade(voxels)`` over its part of the plane.

        Raises MemoryLimitError where a pixel covers more than 2048 voxels along a side.
        """
        values = self._blocks(size, shade, _block_means)
        for axis, pixels in enumerate(size, start=1):
            values = _area_means(values, pixels, axis)
        return self._turned(values)

    def nearest(self, size: Size) -> Voxels:
        """Pixels (C, height, width), each the voxel nearest to its centre. Errors as in ``means``."""
        values = self._blocks(size, lambda voxels: voxels, _block_middles)
        for axis, pixels in enumerate(size, start=1):
            number = values.shape[axis]
            values = values.take(((np.arange(pixels) + 0.5) * number / pixels).astype(int), axis)
        return self._turned(values)

    def _turned(self, values: Voxels) -> Voxels:
        across, down = self.view.flips
        return np.flip(values, tuple(axis for axis, flip in ((1, down), (2, across)) if flip))

    def _blocks(
        self, size: Size, shade: Callable[[Voxels], Voxels], shrink: Callable[[Voxels, Size], Voxels]
    ) -> Voxels:
        """The plane (C, rows, columns) with whole blocks of voxels shrunk to one, but at least ``size``.

        It is read tile by tile, from the coarsest pyramid level with at least ``size`` voxels.
        """
        array, at = self._level(size)
        _, nz, ny, nx = array.shape
        rows, columns = self.view.size((nx, ny, nz))
        block = max(1, rows // size[0]), max(1, columns // size[1])
        if max(block) > MAX_BLOCK_SIDE:
            raise MemoryLimitError(
                f"{array}: a plane of {rows} x {columns} voxels is too large for a picture; "
                f"convert it with --pyramid"
            )
        bands = [
            np.concatenate([shrink(shade(self._read(array, at, part)), block) for part in band], axis=2)
            for band in _tiles((rows, columns), block)
        ]
        return np.concatenate(bands, axis=1)

    def _level(self, size: Size) -> tuple[ShardedArray, int]:
        """The coarsest level whose plane has at least ``size`` voxels, and the index of the plane in it."""
        found = 0
        for number, level in enumerate(self.record.levels, start=1):
            _, nz, ny, nx = padded_to_4d(level.shape)
            if all(n >= s for n, s in zip(self.view.size((nx, ny, nz)), size, strict=True)):
                found = number
        array = sharded_array(self.folder, self.record, found)
        return array, min(self.at >> found, array.shape[3 - self.view.normal] - 1)

    def _read(self, array: ShardedArray, at: int, part: tuple[slice, slice]) -> Voxels:
        """Voxels (C, rows, columns) of a part of the plane."""
        places = {self.view.normal: slice(at, at + 1), self.view.down: part[0], self.view.across: part[1]}
        i, j, k = (places[axis] for axis in range(3))
        box = PatchLocation.between((i.start, j.start, k.start), (i.stop, j.stop, k.stop))
        voxels = read_region(array, *array.box(box, self.channels)).squeeze(3 - self.view.normal)
        return voxels if self.view.down > self.view.across else voxels.swapaxes(1, 2)


def _tiles(size: Size, block: Size) -> Iterator[list[tuple[slice, slice]]]:
    """The tiles of a plane, row by row. Tiles are whole blocks, except at the ends of the plane."""
    rows, columns = (
        [slice(a, min(a + max(1, TILE_SIDE // b) * b, n)) for a in range(0, n, max(1, TILE_SIDE // b) * b)]
        for n, b in zip(size, block, strict=True)
    )
    for row in rows:
        yield [(row, column) for column in columns]


def _block_means(values: Voxels, block: Size) -> Voxels:
    for axis, side in enumerate(block, start=1):
        starts = np.arange(0, values.shape[axis], side)
        counts = np.diff(np.append(starts, values.shape[axis]))
        values = np.add.reduceat(values, starts, axis)
        values = values / (counts[:, None] if axis == 1 else counts)
    return values


def _block_middles(values: Voxels, block: Size) -> Voxels:
    for axis, side in enumerate(block, start=1):
        number = values.shape[axis]
        starts = np.arange(0, number, side)
        values = values.take(np.minimum(starts + side // 2, number - 1), axis)
    return values


def _area_means(values: Voxels, pixels: int, axis: int) -> Voxels:
    """Area interpolation to ``pixels`` samples along an axis: each is the mean over its share of the line."""
    number = values.shape[axis]
    if number == pixels:
        return values
    lines = np.moveaxis(values, axis, -1)
    sums = np.concatenate([np.zeros_like(lines[..., :1]), np.cumsum(lines, axis=-1)], axis=-1)
    edges = np.linspace(0, number, pixels + 1)
    below = np.minimum(edges.astype(int), number - 1)
    at_edges = sums[..., below] + (edges - below) * lines[..., below]
    return np.moveaxis(np.diff(at_edges, axis=-1) * (pixels / number), -1, axis)
