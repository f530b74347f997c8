"""One axis of an output cut into tiles, and what each patch of the axis adds to each of them.

A tile ends where a patch begins or ceases to have weight, and at the borders of shards::

    patches   [=====A=====]
                      [=====B=====]
                                [=====C=====]
    shards     |         |         |         |
    tiles     | A   |A,B| B |B,C  | C       |
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from zpatch.geometry.boxes import Integers
from zpatch.tiling import windows
from zpatch.tiling.output_cells import AxisCell, OutputAxis, cells_of_tiles

MIN_TILE_VOXELS = 16

Weights = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class AxisScale:
    """Positions on one axis of a volume -> positions on the same axis of its output.

    Positions are scaled by the two lengths. Both ends of a patch are rounded alike, so patches that abut
    still abut. The length of the output is rounded as well, which is a large error on a short axis; beyond
    the ends of the volume the scale is therefore that of a patch, where it is known.

    >>> AxisScale.of(3, 2, 16, 8).place(np.array([-6, 0, 3, 10])).tolist()
    [-3, 0, 2, 6]

    Attributes:
        axis_length: Voxels of the volume.
        output_length: Voxels of the output.
        patch_length: Voxels of a patch.
        made_length: Voxels that the network makes of a patch, or None where they are not known.
    """

    axis_length: int
    output_length: int
    patch_length: int
    made_length: int | None

    @classmethod
    def of(
        cls, axis_length: int, output_length: int, patch_length: int, made_length: int | None = None
    ) -> AxisScale:
        """The scale of an axis.

        ``made_length`` is used if it is ``patch_length`` times or divided by an integer, and agrees with the
        two other lengths.
        """
        n, m, p, q = axis_length, output_length, patch_length, made_length
        fits = q and not (p % q and q % p) and abs(n * q - m * p) < p
        return cls(n, m, p, q if fits else None)

    def place(self, positions: Integers) -> Integers:
        """Positions in the output of some positions, which may be beyond the ends of the volume."""
        factor = self.output_length / self.axis_length
        if self.made_length is None:
            return _rounded(positions * factor)
        inside = np.clip(positions, 0, self.axis_length)
        beyond = (positions - inside) * self.made_length / self.patch_length
        return _rounded(inside * factor) + _rounded(beyond)

    def overlap(self, voxels: int) -> int:
        """The least overlap of patches in the output, wherever they are."""
        scaled = voxels * self.output_length // self.axis_length
        if self.made_length is None:
            return scaled
        return min(scaled, voxels * self.made_length // self.patch_length)


def _rounded(positions: NDArray[np.floating[Any]]) -> Integers:
    return np.asarray(np.floor(positions + 0.5), dtype=np.int64)


@dataclass(frozen=True, slots=True)
class AxisTile:
    """A tile on one axis, where it is ``[first, stop)``.

    ``shards`` are the numbers of the shards that are made from it: one, if the output has its voxels.
    ``contributors`` are the numbers of the patches that have weight in it, ascending.
    """

    number: int
    first: int
    stop: int
    shards: range
    contributors: tuple[int, ...]

    @property
    def length(self) -> int:
        """Voxels of the tile."""
        return self.stop - self.first


@dataclass(frozen=True, slots=True, eq=False)
class AxisShare:
    """What a patch adds to a tile, on one axis.

    ``rank`` is the number of the patch among the tile's contributors. Voxels ``in_patch`` are added to voxels
    ``in_tile``, with their ``weights``.
    """

    tile: AxisTile
    rank: int
    in_patch: slice
    in_tile: slice
    weights: Weights


@dataclass(frozen=True, slots=True, eq=False)
class AxisPatch:
    """A patch on one axis of the output, where it covers ``[start, stop)``.

    ``shares`` are what it adds to each tile, ascending: none where rounding left it no voxel of the output.
    """

    start: int
    stop: int
    shares: tuple[AxisShare, ...]

    def share_of(self, tile: int) -> AxisShare:
        """What it adds to the tile of that number, of which it must be a contributor."""
        return self.shares[tile - self.shares[0].tile.number]


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class AxisTiles:
    """One axis of a grid cut into tiles, and the ``cells`` of the output; both ascend as the patches do.

    Borders of patches closer than ``MIN_TILE_VOXELS`` to another edge make no edge of their own.
    """

    tiles: tuple[AxisTile, ...]
    patches: tuple[AxisPatch, ...]
    cells: tuple[AxisCell, ...]

    @classmethod
    def cut(
        cls,
        mode: str,
        starts: Integers,
        overlap: int,
        scale: AxisScale,
        shard_length: int | None = None,
        output: OutputAxis | None = None,
    ) -> AxisTiles:
        """The tiles of the blended extent, for patches that begin at ``starts`` in the volume.

        ``overlap`` is that of the patches in the volume. The output has the voxels that are blended, in
        shards of ``shard_length``, or it is one shard; or it is resampled from them, as ``output`` says.
        Plans of a cohort share the tiles of axes that are alike: a hundred thousand of them fit in memory.
        """
        if output is not None:
            return cls._cut(mode, starts, overlap, scale, shard_length, output)
        key = mode, tuple(starts.tolist()), overlap, scale, shard_length
        if (tiles := _IN_USE.get(key)) is None:
            tiles = _IN_USE[key] = cls._cut(mode, starts, overlap, scale, shard_length, None)
        return tiles

    @classmethod
    def _cut(
        cls,
        mode: str,
        starts: Integers,
        overlap: int,
        scale: AxisScale,
        shard_length: int | None,
        output: OutputAxis | None,
    ) -> AxisTiles:
        length = scale.output_length
        begins, ends = scale.place(np.stack([starts, starts + scale.patch_length]))
        weights = windows.partition_of_unity(mode, begins, ends, scale.overlap(overlap))
        spans = [_Span.of(int(a), w, length) for a, w in zip(begins, weights, strict=True)]
        borders = {end for span in spans if len(span.weights) for end in (span.first, span.stop)}
        edges = _edges(sorted(borders), length, shard_length or length)
        cells = output.cells(edges) if output else cells_of_tiles(edges, shard_length or length)
        hit = [span.tiles(edges) for span in spans]
        contributors: list[list[int]] = [[] for _ in edges[1:]]
        for patch, numbers in enumerate(hit):
            for number in numbers:
                contributors[number].append(patch)
        shards = _shards_of_tiles(cells, len(edges) - 1)
        tiles = tuple(
            AxisTile(number, a, b, of_tile, tuple(patches))
            for number, ((a, b), of_tile, patches) in enumerate(
                zip(itertools.pairwise(edges), shards, contributors, strict=True)
            )
        )
        patches = tuple(
            AxisPatch(int(a), int(b), tuple(span.share(patch, int(a), tiles[t]) for t in numbers))
            for patch, (a, b, span, numbers) in enumerate(zip(begins, ends, spans, hit, strict=True))
        )
        return cls(tiles, patches, cells)

    @property
    def shards(self) -> int:
        """How many shards there are."""
        return self.cells[-1].shard + 1

    @property
    def shard_lengths(self) -> list[int]:
        """The voxels of the output in each shard."""
        return [sum(cell.length for cell in self.cells_of(shard)) for shard in range(self.shards)]

    def cells_of(self, shard: int) -> tuple[AxisCell, ...]:
        """The cells of a shard."""
        first, stop = (bisect.bisect_left(self.cells, n, key=lambda c: c.shard) for n in (shard, shard + 1))
        return self.cells[first:stop]

    def tiles_of(self, first: int, last: int | None = None) -> tuple[AxisTile, ...]:
        """The tiles that a shard is made from, or all shards up to and including the ``last`` one."""
        cells = self.cells_of(first), self.cells_of(first if last is None else last)
        return self.tiles[cells[0][0].tiles.start : cells[1][-1].tiles.stop]

    def shards_hit(self) -> tuple[Integers, Integers]:
        """First shard of each patch, and the one after its last; both 0 where it adds nothing."""
        ends = [
            (patch.shares[0].tile.shards.start, patch.shares[-1].tile.shards.stop) if patch.shares else (0, 0)
            for patch in self.patches
        ]
        first, stop = np.array(ends, dtype=np.int64).T
        return first, stop


_IN_USE: WeakValueDictionary[Any, AxisTiles] = WeakValueDictionary()  # by all that they are cut from


@dataclass(frozen=True, slots=True, eq=False)
class _Span:
    """The voxels ``[first, stop)`` of the output in which a patch has weight."""

    first: int
    weights: Weights

    @classmethod
    def of(cls, start: int, weights: NDArray[np.float64], length: int) -> _Span:
        """The span of a patch whose ``weights`` begin at ``start``, within ``[0, length)``."""
        inside = np.flatnonzero(weights > 0)
        inside = inside[(inside >= -start) & (inside < length - start)]
        if not inside.size:
            return cls(0, weights[:0].astype(np.float32))
        first, last = inside[[0, -1]].tolist()
        return cls(start + first, weights[first : last + 1].astype(np.float32))

    @property
    def stop(self) -> int:
        return self.first + len(self.weights)

    def tiles(self, edges: Sequence[int]) -> range:
        """The numbers of the tiles between some edges that it touches."""
        if not len(self.weights):
            return range(0)
        return range(bisect.bisect_right(edges, self.first) - 1, bisect.bisect_left(edges, self.stop))

    def share(self, patch: int, start: int, tile: AxisTile) -> AxisShare:
        """What its patch, of that number and from ``start`` on, adds to a tile."""
        first, stop = max(self.first, tile.first), min(self.stop, tile.stop)
        return AxisShare(
            tile,
            tile.contributors.index(patch),
            slice(first - start, stop - start),
            slice(first - tile.first, stop - tile.first),
            self.weights[first - self.first : stop - self.first],
        )


def _shards_of_tiles(cells: Sequence[AxisCell], tiles: int) -> list[range]:
    """The shards that are made from each tile; where there are none, an empty range between the others."""
    starts = [cells[-1].shard + 1] * tiles
    stops = [0] * tiles
    for cell in cells:
        for tile in cell.tiles:
            starts[tile], stops[tile] = min(starts[tile], cell.shard), cell.shard + 1
    for tile in reversed(range(tiles - 1)):
        starts[tile] = min(starts[tile], starts[tile + 1])
    return [range(start, max(start, stop)) for start, stop in zip(starts, stops, strict=True)]


def _edges(borders: Sequence[int], length: int, shard_length: int) -> list[int]:
    """The ends of all shards, and those borders of patches, ascending, that leave no thin tile."""
    fixed = [*range(0, length, shard_length), length]
    kept = [0]
    for start, stop in itertools.pairwise(fixed):
        inner = borders[bisect.bisect_right(borders, start) : bisect.bisect_left(borders, stop)]
        for border in inner:
            if border - kept[-1] >= MIN_TILE_VOXELS and stop - border >= MIN_TILE_VOXELS:
                kept.append(border)
        kept.append(stop)
    return kept
