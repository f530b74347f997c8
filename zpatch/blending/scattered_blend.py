"""Blending patches at any locations: weights are summed beside the voxels, and divided out at the end.

The volume is cut into tiles of one shape, each made when a patch first touches it. A tile is one tensor
(C + 1, i, j, k): the sums of weighted voxels, and as the last channel the sums of the weights.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from zpatch.blending.blend import accumulation_dtype
from zpatch.blending.reduction import Final, Finaliser, fitting_fill
from zpatch.blending.sinks import VolumeSink
from zpatch.blending.tile_spill import SpilledTiles
from zpatch.chunks.layout import CHUNK_VOXELS
from zpatch.errors import IncompleteCoverageError, ModelError
from zpatch.geometry.boxes import PatchLocation, Triple
from zpatch.tiling import windows
from zpatch.tiling.axis_tiles import AxisScale

TILE_VOXELS = 64**3
PATCHES_IN_FLOAT32 = 256

Slices = tuple[slice, slice, slice]


class ScatteredBlend:
    """Blends patches at any locations, in any order.

    Where patches overlap, the order in which they arrive changes the last bits; in ``crop`` mode the last
    patch that keeps a voxel wins. A tile that more than 256 patches touch is summed in float64.

    For an output of another shape the network makes ``patch_shape`` of ``patch_size``, as for ``Tiling``.
    ``tiles`` take at most ``max_bytes`` of memory, and one tile more; the others are in a scratch file in
    ``scratch_folder``, which changes no bit of the result.
    """

    def __init__(
        self,
        spatial_shape: Triple,
        mode: str,
        patch_overlap: Triple,
        sink: VolumeSink,
        finalise: Finaliser,
        *,
        output_shape: Triple | None = None,
        patch_size: Triple | None = None,
        patch_shape: Triple | None = None,
        fill: float | None = None,
        max_bytes: int | None = None,
        scratch_folder: Path | None = None,
        tile_voxels: int = TILE_VOXELS,
    ) -> None:
        windows.check_overlap_mode(mode)
        self.channels: int | None = None
        self.tiles = SpilledTiles(max_bytes, scratch_folder)
        self._shape = output_shape or spatial_shape
        self._tile_shape = tile_shape(self._shape, tile_voxels)
        sizes = spatial_shape, self._shape, patch_size or spatial_shape, patch_shape or (None,) * 3
        self._scales = list(map(AxisScale.of, *sizes))
        self._overlap = [scale.overlap(o) for scale, o in zip(self._scales, patch_overlap, strict=True)]
        self._mode = mode
        self._sink = sink
        self._finalise = finalise
        self._fill = fill
        self._dtype: torch.dtype | None = None
        self._patches: Counter[Triple] = Counter()
        self._is_covered = False

    def size_of(self, location: PatchLocation) -> Triple:
        """Extent of a patch in the output."""
        return self._box(location).size

    def add(self, patch: torch.Tensor, location: PatchLocation) -> None:
        """Take in the part of a patch (C, I, J, K) that is in the volume."""
        dtype = self._summed_dtype(patch)
        self._is_covered = False
        box = self._box(location)
        kept = self._kept(box)
        if min(kept.size) < 1:
            return
        part = self._weighted(patch, box, kept, dtype)
        for place, in_tile, in_part in self._pieces(kept):
            tile = self._pop(place)
            if self._mode == "crop":
                tile[:, *in_tile] = part[:, *in_part]
            else:
                self._patches[place] += 1
                if self._patches[place] == PATCHES_IN_FLOAT32 + 1:
                    tile = tile.to(torch.promote_types(dtype, torch.float64))
                tile[:, *in_tile].add_(part[:, *in_part])
            self.tiles.put(place, tile)

    def check_complete(self) -> None:
        """Raise IncompleteCoverageError where no patch covers a voxel, unless there is a fill."""
        if self._dtype is None:
            raise IncompleteCoverageError("no patch was added, so there is nothing to blend")
        if self._is_covered or self._fill is not None:
            return
        count, first = 0, self._shape
        for place in self._places():
            missing = self._missing(place)
            if missing.any():
                count += int(missing.sum())
                inside = np.unravel_index(missing.argmax(), missing.shape)
                i, j, k = (a + int(b) for a, b in zip(self._corner(place), inside, strict=True))
                first = min(first, (i, j, k))
        if count:
            box = self._missing_box(first)
            raise IncompleteCoverageError(
                f"no patch covers {count} voxels, the first ones from {box.index_ini} to {box.index_fin}; "
                f"add patches that cover them, or give fill="
            )
        self._is_covered = True

    def finish(self) -> None:
        """Divide by the weights, and hand on every voxel once: tile by tile, I slowest."""
        self.check_complete()
        for place in self._places():
            final, count = self._final(place)
            self._sink.put(self._corner(place), final, not_finite=count)
        self.close()

    def close(self) -> None:
        """Drop all tiles, and the scratch file."""
        self.tiles.close()

    def _summed_dtype(self, patch: torch.Tensor) -> torch.dtype:
        """The type in which patches are summed: that of the first one."""
        dtype = accumulation_dtype(patch.dtype, self._mode)
        if self._dtype is None:
            if self._fill is not None:
                one_voxel = self._finalise(torch.zeros((len(patch), 1, 1, 1), dtype=dtype))
                self._fill = fitting_fill(self._fill, one_voxel.voxels.dtype)
            self._dtype, self.channels = dtype, len(patch)
        if dtype != self._dtype:
            raise ModelError(
                f"a patch is of {patch.dtype}, where earlier patches were summed in {self._dtype}; "
                f"make all patches of one type"
            )
        return dtype

    def _box(self, location: PatchLocation) -> PatchLocation:
        """The box of a patch in the output."""
        axes = zip(self._scales, location.index_ini, location.index_fin, strict=True)
        ends = [scale.place(np.array(positions)).tolist() for scale, *positions in axes]
        low, high = zip(*ends, strict=True)
        return PatchLocation.between(low, high)

    def _kept(self, box: PatchLocation) -> PatchLocation:
        """The part of a patch's box that is in the volume and, in crop mode, is not cut off."""
        inside = box.clipped(self._shape)
        low, high = list(inside.index_ini), list(inside.index_fin)
        if self._mode == "crop":
            for axis, (a, b) in enumerate(zip(box.index_ini, box.index_fin, strict=True)):
                first, stop = windows.kept_by_crop(a, b, self._overlap[axis], 0, self._shape[axis])
                low[axis], high[axis] = max(low[axis], first), min(high[axis], stop)
        return PatchLocation.between(low, high)

    def _weighted(
        self, patch: torch.Tensor, box: PatchLocation, kept: PatchLocation, dtype: torch.dtype
    ) -> torch.Tensor:
        """Weighted voxels and, as the last channel, their weights, in the part of a patch that is kept.

        They are rounded here, and once more when added, so that tiles of any shape give the same bits.
        """
        ends = zip(kept.index_ini, kept.index_fin, box.index, strict=True)
        spans = [slice(a - origin, b - origin) for a, b, origin in ends]
        voxels = patch[:, *spans].cpu()
        part = torch.empty((len(voxels) + 1, *kept.size), dtype=dtype)
        if self._mode == "crop":
            part[:-1] = voxels
            part[-1] = 1
            return part
        i, j, k = (
            torch.from_numpy(windows.window(self._mode, n)[span]).to(dtype)
            for n, span in zip(box.size, spans, strict=True)
        )
        part[-1] = i[:, None, None] * j[:, None] * k
        torch.mul(voxels, part[-1], out=part[:-1])
        return part

    def _final(self, place: Triple) -> Final:
        """The final voxels of a tile."""
        tile = self._pop(place)
        missing = tile[-1] == 0
        voxels = tile[:-1]
        if self._mode != "crop":
            voxels = (voxels / (tile[-1] + missing)).to(self._dtype)
        final, count = self._finalise(voxels)
        if self._fill is not None:
            final = torch.where(missing, torch.tensor(self._fill, dtype=final.dtype), final)
        return Final(final, count)

    def _pop(self, place: Triple) -> torch.Tensor:
        assert self.channels is not None
        assert self._dtype is not None
        return self.tiles.pop(place, (self.channels + 1, *self._tile_size(place)), self._dtype)

    def _missing(self, place: Triple) -> NDArray[np.bool_]:
        """Which voxels of a tile no patch covers."""
        weights = self.tiles.last_channel(place)
        return np.ones(self._tile_size(place), dtype=bool) if weights is None else (weights == 0).numpy()

    def _missing_box(self, first: Sequence[int]) -> PatchLocation:
        """The box of missing voxels that starts with ``first``, grown along K, then J, then I."""
        low, high = list(first), [v + 1 for v in first]
        for axis in (2, 1, 0):
            others = tuple(other for other in range(3) if other != axis)
            length, side = self._shape[axis], self._tile_shape[axis]
            for start in range(low[axis] // side * side, length, side):
                slab_low, slab_high = low.copy(), high.copy()
                slab_low[axis], slab_high[axis] = max(start, low[axis]), min(start + side, length)
                line = np.ones(slab_high[axis] - slab_low[axis], dtype=bool)
                for place, in_tile, _ in self._pieces(PatchLocation.between(slab_low, slab_high)):
                    line &= self._missing(place)[in_tile].all(axis=others)
                if not line.all():
                    high[axis] = slab_low[axis] + int(line.argmin())
                    break
                high[axis] = slab_high[axis]
        return PatchLocation.between(low, high)

    def _pieces(self, box: PatchLocation) -> Iterator[tuple[Triple, Slices, Slices]]:
        """Each tile that a box touches, and the voxels in both, as slices of the tile and of the box."""
        axes = []
        for a, b, side in zip(box.index_ini, box.index_fin, self._tile_shape, strict=True):
            tiles = range(a // side, -(-b // side))
            ends = [(t, max(a, t * side), min(b, (t + 1) * side)) for t in tiles]
            axes.append([(t, slice(u - t * side, v - t * side), slice(u - a, v - a)) for t, u, v in ends])
        for (i, u, x), (j, v, y), (k, w, z) in itertools.product(*axes):
            yield (i, j, k), (u, v, w), (x, y, z)

    def _places(self) -> Iterator[Triple]:
        """All tiles, I slowest."""
        i, j, k = (range(-(-n // side)) for n, side in zip(self._shape, self._tile_shape, strict=True))
        return itertools.product(i, j, k)

    def _corner(self, place: Triple) -> Triple:
        i, j, k = (t * side for t, side in zip(place, self._tile_shape, strict=True))
        return i, j, k

    def _tile_size(self, place: Triple) -> Triple:
        axes = zip(self._corner(place), self._tile_shape, self._shape, strict=True)
        i, j, k = (min(side, n - first) for first, side, n in axes)
        return i, j, k


def tile_shape(spatial_shape: Triple, voxels: int = TILE_VOXELS) -> Triple:
    """Extent of a tile: a cube of that many voxels, or wider where the volume is thin.

    Longer sides are whole chunks, so that few shards of an output are incomplete while tiles are handed on
    slab by slab.

    >>> tile_shape((512, 512, 512)), tile_shape((40000, 30000, 1))
    ((64, 64, 64), (512, 512, 1))
    """
    sides = [0, 0, 0]
    for axes_left, axis in zip((3, 2, 1), np.argsort(spatial_shape, kind="stable").tolist(), strict=True):
        side = max(1, round(voxels ** (1 / axes_left)))
        sides[axis] = min(spatial_shape[axis], side // CHUNK_VOXELS * CHUNK_VOXELS or side)
        voxels //= sides[axis]
    i, j, k = sides
    return i, j, k
