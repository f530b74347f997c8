"""A volume in a file: what its header says, and its voxels streamed slab by slab."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zpatch.errors import SourceError
from zpatch.geometry.affines import Affine
from zpatch.geometry.boxes import padded_to_4d
from zpatch.runtime import buffer_pool
from zpatch.volume_files.voxel_parts import VoxelPart, VoxelStream

Warn = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Slab:
    """Consecutive planes of a volume that fill a row of shards.

    ``voxels`` is (c, z, y, x); ``shard`` is the index of that row among the shards along c and z.
    """

    shard: tuple[int, int]
    voxels: NDArray[Any]


@dataclass(frozen=True, slots=True)
class VolumeFile:
    """The checked contents of the header of a NIfTI, NRRD or MetaImage file.

    Voxels are in ``parts``, one after another. ``raw_header`` is a NIfTI header and all that follows it up to
    the first voxel, extensions included; for NRRD and MetaImage it is made. ``dims`` are the sides (I, J, K,
    ...): three of space, then all further ones. The ``components`` first of ``dims[3]`` are stored together
    in the file, as its axis ``component_axis`` (0 is the fastest); 1 if channels are stored one after
    another. ``shape`` is that of the array to store: ``(z, y, x)`` or, where the file has more than three
    axes or RGB voxels, ``(c, z, y, x)`` with all further axes in one. ``dtype`` is the type in the file,
    ``channel_dtype`` the little-endian type of one channel. ``affine`` maps (I, J, K) to ``spatial_unit``,
    with the axes of RAS; ``affine_source`` is where it is from: ``sform``, ``qform`` or, if only voxel sizes
    are known, ``pixdim``. ``slope`` and ``inter`` turn stored voxels into values. ``warnings`` say what is
    odd, a line each.
    """

    path: Path
    parts: tuple[VoxelPart, ...]
    raw_header: bytes
    dims: tuple[int, ...]
    dtype: np.dtype[Any]
    affine: Affine
    affine_source: str
    has_time: bool
    spatial_unit: str | None
    warnings: tuple[str, ...]
    slope: float = 1.0
    inter: float = 0.0
    components: int = 1
    component_axis: int = 0

    @property
    def files(self) -> tuple[Path, ...]:
        """The file of the header, and all other files of voxels."""
        return tuple(dict.fromkeys([self.path, *(part.path for part in self.parts)]))

    @property
    def compressed(self) -> bool:
        """Whether the voxels are compressed."""
        return any(part.compression for part in self.parts)

    @property
    def colours(self) -> int:
        """The number of colour channels of a voxel: 3 (RGB) or 4 (RGBA); 1 where voxels are numbers."""
        return len(self.dtype.names) if self.dtype.names else 1

    @property
    def interleaved(self) -> int:
        """The number of channels that are stored together in the file, so that they are read together."""
        return self.components * self.colours

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the stored array."""
        nx, ny, nz = (*self.dims[:3], 1, 1)[:3]
        channels = math.prod(self.dims[3:]) * self.colours
        return (channels, nz, ny, nx) if len(self.dims) > 3 or self.colours > 1 else (nz, ny, nx)

    @property
    def axes(self) -> str:
        """Names of the stored axes."""
        return ("" if len(self.shape) == 3 else "t" if self.has_time else "c") + "zyx"

    @property
    def channel_dtype(self) -> np.dtype[Any]:
        """Little-endian type of one stored value."""
        return np.dtype(np.uint8 if self.colours > 1 else self.dtype.newbyteorder("<"))

    @property
    def voxel_bytes(self) -> int:
        """Bytes of all voxels, uncompressed."""
        return math.prod(self.dims) * self.dtype.itemsize

    def mapped(self) -> NDArray[Any]:
        """All voxels (c, z, y, x), mapped from the file, in its byte order.

        Raises SourceError for voxels that are compressed, in several files, colours, or not evenly spaced.
        """
        part, *others = self.parts
        channels, nz, ny, nx = padded_to_4d(self.shape)
        if others or self.compressed or self.colours > 1 or 1 < self.components < channels:
            which = "voxels of one file" if others else "plain, uncompressed voxels"
            raise SourceError(
                f"{self.path}: only {which} can be mapped; convert it first with "
                f"'zpatch convert {self.path.parent} STORE'"
            )
        shape = self._file_order(channels, (nz, ny, nx))
        voxels = np.memmap(part.path, mode="r", dtype=self.dtype, offset=part.start, shape=shape)
        return self._stored_order(voxels)

    def slabs(
        self,
        shard_extent: tuple[int, int],
        warn: Warn = lambda text: None,
        *,
        backwards: bool = False,
    ) -> Iterator[Slab]:
        """Stream the voxels in file order, one row of shards at a time.

        ``shard_extent`` is how many channels and planes a shard holds. With ``backwards`` rows are counted
        from the last plane, for a volume whose slowest axis is to be flipped.

        Compressed data are read to their end, where their checksum is compared: do not trust any slab before
        the iterator is exhausted. ``warn`` is called with the text of each warning.
        """
        channels, nz, ny, nx = padded_to_4d(self.shape)
        together, depth = shard_extent
        rows = rows_of(nz, depth, backwards=backwards)
        most = min(together, channels) // self.colours * min(depth, nz) * ny * nx
        with VoxelStream(self.parts) as stream:
            for c, (row, planes) in itertools.product(range(0, channels, together), rows):
                shape = self._file_order(min(together, channels - c), (planes, ny, nx))
                flat = self._read_voxels(stream, math.prod(shape) // self.colours, most)
                yield Slab((c // together, row), self._stored_order(flat.reshape(shape)))
            for text in stream.finish():
                warn(text)

    def _file_order(self, channels: int, sides: tuple[int, int, int]) -> tuple[int, ...]:
        """The shape in the file, slowest axis first, of some channels of a box of (z, y, x)."""
        within = list(sides)
        within.insert(3 - self.component_axis, self.interleaved)
        return channels // self.interleaved, *within

    def _stored_order(self, voxels: NDArray[Any]) -> NDArray[Any]:
        """Voxels (c, z, y, x) from an array in the order of the file."""
        moved = np.moveaxis(voxels, 4 - self.component_axis, 1)
        return moved.reshape(-1, *moved.shape[2:])

    def _read_voxels(self, stream: VoxelStream, count: int, most: int) -> NDArray[Any]:
        """The next voxels, in memory for ``most``: that of an earlier slab, if it is no longer in use."""
        raw = buffer_pool.empty((most,), self.dtype)[:count]
        stream.fill(raw.view(np.uint8).data.cast("B"))
        if self.colours > 1:
            return raw.view(np.uint8)
        if not raw.dtype.isnative:
            raw = raw.byteswap(inplace=True).view(self.channel_dtype)
        return raw


def rows_of(planes: int, depth: int, *, backwards: bool) -> list[tuple[int, int]]:
    """Number and planes of each row of shards, in the order of the file."""
    rows = [(start // depth, min(depth, planes - start)) for start in range(0, planes, depth)]
    return rows[::-1] if backwards else rows
