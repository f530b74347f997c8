"""A volume cut into tiles that become final at once, as the patches of a grid are swept over it.

On one axis tiles lie between the borders of what the patches add to, and never across a shard::

    patches   [=====A=====]
                      [=====B=====]
                                [=====C=====]
    shards     |         |         |         |
    tiles     | A   |A,B| B |B,C  | C       |

A tile of the volume is the product of three such pieces, and awaits every patch that touches all three.
Patches are told in sweep order: the swept axis slowest, the others in their own order. Contributions to a
tile are summed in that order, so that the sum does not depend on the order in which they arrive.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zpatch.blending import windows
from zpatch.geometry.boxes import Triple
from zpatch.geometry.patch_grid import PatchGrid

MIN_TILE_VOXELS = 16

Bools = NDArray[np.bool_]
Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class AxisScale:
    """Positions on one axis of a volume, told on an axis of its output.

    They are scaled by the two lengths, and both ends of a patch are rounded alike, so that no gap and no
    overlap arises. The length of an output is rounded too, which says much where the axis is short: where it
    is known that the network makes ``made_length`` voxels of ``patch_length``, that is the scale of what lies
    beyond the volume.

    >>> AxisScale.of(3, 2, 16, 8).place(np.array([-6, 0, 3, 10])).tolist()
    [-3, 0, 2, 6]
    """

    axis_length: int
    output_length: int
    patch_length: int
    made_length: int | None

    @classmethod
    def of(
        cls, axis_length: int, output_length: int, patch_length: int, made_length: int | None = None
    ) -> AxisScale:
        """The scale of an axis; what the network makes counts if by a whole factor, and the output's."""
        n, m, p, q = axis_length, output_length, patch_length, made_length
        fits = q and not (p % q and q % p) and abs(n * q - m * p) < p
        return cls(n, m, p, q if fits else None)

    def place(self, positions: Integers) -> Integers:
        """Some positions, which may lie beyond the volume."""
        factor = self.output_length / self.axis_length
        if self.made_length is None:
            return _rounded(positions * factor)
        inside = np.clip(positions, 0, self.axis_length)
        beyond = (positions - inside) * self.made_length / self.patch_length
        return _rounded(inside * factor) + _rounded(beyond)

    def overlap(self, voxels: int) -> int:
        """The overlap of patches in the output, at least, wherever they lie."""
        scaled = voxels * self.output_length // self.axis_length
        if self.made_length is None:
            return scaled
        return min(scaled, voxels * self.made_length // self.patch_length)


def _rounded(positions: NDArray[np.floating[Any]]) -> Integers:
    return np.asarray(np.floor(positions + 0.5), dtype=np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class AxisTiles:
    """One axis of a grid cut into tiles.

    Tile ``t`` is ``[edges[t], edges[t + 1])``, lies in shard ``shard[t]``, and awaits the patches
    ``touching[t]``, in ascending order. Patch ``i`` covers ``[starts[i], stops[i])``, has non-zero weights
    ``weights[i]`` on ``[first[i], stop[i])`` only, and hits the tiles from ``first_tile[i]`` up to
    ``stop_tile[i]``. Borders of patches closer than 16 voxels to another edge are left out.
    """

    edges: Integers
    shard: Integers
    touching: tuple[Integers, ...]
    starts: Integers
    stops: Integers
    first: Integers
    stop: Integers
    first_tile: Integers
    stop_tile: Integers
    weights: tuple[NDArray[np.float32], ...]

    @classmethod
    def cut(
        cls,
        mode: str,
        starts: Integers,
        patch_length: int,
        overlap: int,
        axis_length: int,
        *,
        output_length: int | None = None,
        made_length: int | None = None,
        shard_length: int | None = None,
    ) -> AxisTiles:
        """Tiles of the volume's own extent ``[0, axis_length)``.

        With an ``output_length`` everything is told on an axis of that many voxels instead; of a patch the
        network makes ``made_length``.
        """
        length = axis_length if output_length is None else output_length
        scale = AxisScale.of(axis_length, length, patch_length, made_length)
        ends = scale.place(np.stack([starts, starts + patch_length]))
        weights = windows.partition_of_unity(mode, ends[0], ends[1], scale.overlap(overlap))
        inside = [
            np.flatnonzero((w > 0) & (v >= 0) & (v < length))
            for w, v in zip(weights, map(np.arange, *ends), strict=True)
        ]
        used = np.array([kept.size > 0 for kept in inside])  # rounding may leave a patch nothing to add
        first = ends[0] + [kept[0] if kept.size else 0 for kept in inside]
        stop = ends[0] + [kept[-1] + 1 if kept.size else 0 for kept in inside]
        shard_length = shard_length or length
        edges = _edges(np.concatenate([first[used], stop[used]]), length, shard_length)
        first_tile = np.where(used, np.searchsorted(edges, first, side="right") - 1, 0)
        stop_tile = np.where(used, np.searchsorted(edges, stop, side="left"), 0)
        hits = [np.arange(a, b) for a, b in zip(first_tile, stop_tile, strict=True)]
        order = np.argsort(np.concatenate(hits), kind="stable")
        patches = np.repeat(np.arange(len(hits)), [len(hit) for hit in hits])[order]
        counts = np.bincount(np.concatenate(hits), minlength=len(edges) - 1)
        return cls(
            edges=edges,
            shard=edges[:-1] // shard_length,
            touching=tuple(np.split(patches, np.cumsum(counts)[:-1])),
            starts=ends[0],
            stops=ends[1],
            first=first,
            stop=stop,
            first_tile=first_tile,
            stop_tile=stop_tile,
            weights=tuple(
                w[a:b].astype(np.float32)
                for w, a, b in zip(weights, first - ends[0], stop - ends[0], strict=True)
            ),
        )

    @property
    def awaited(self) -> Integers:
        """How many patches touch each tile."""
        return np.array([len(patches) for patches in self.touching], dtype=np.int64)

    @property
    def shards(self) -> int:
        """How many shards there are."""
        return int(self.shard[-1]) + 1

    def tiles_of(self, shard: int) -> range:
        """The tiles of a shard."""
        return range(*np.searchsorted(self.shard, [shard, shard + 1]).tolist())

    def shards_hit(self) -> tuple[Integers, Integers]:
        """First shard of each patch, and the one after the last; alike where it adds nothing."""
        padded = np.append(self.shard, self.shard[-1])
        stop = np.where(self.stop_tile > self.first_tile, padded[self.stop_tile - 1] + 1, 0)
        return np.where(stop > 0, padded[self.first_tile], 0), stop


def _edges(borders: Integers, length: int, shard_length: int) -> Integers:
    """The ends of all shards, and of the patches' borders those that leave no thin tile."""
    fixed = [*range(0, length, shard_length), length]
    kept = [0]
    inner = np.unique(borders)
    for start, stop in itertools.pairwise(fixed):
        for border in inner[np.searchsorted(inner, start, "right") : np.searchsorted(inner, stop)].tolist():
            if border - kept[-1] >= MIN_TILE_VOXELS and stop - border >= MIN_TILE_VOXELS:
                kept.append(border)
        kept.append(stop)
    return np.array(kept, dtype=np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Tiling:
    """The tiles of a volume under a grid, and the shards that they fill.

    ``shape`` is that of the output, ``shard_shape`` that of a shard, all along I, J, K.
    """

    grid: PatchGrid
    mode: str
    shape: Triple
    shard_shape: Triple
    swept_axis: int
    axes: tuple[AxisTiles, AxisTiles, AxisTiles]

    @classmethod
    def over(
        cls,
        grid: PatchGrid,
        mode: str,
        *,
        swept_axis: int = 0,
        output_shape: Triple | None = None,
        patch_shape: Triple | None = None,
        shard_shape: Triple | None = None,
    ) -> Tiling:
        """The tiles of a grid's volume, or of an output of another shape; without shards it is one shard.

        ``patch_shape`` is what the network makes of a patch.
        """
        windows.check_overlap_mode(mode)
        shape = output_shape or grid.spatial_shape
        shards = shard_shape or shape
        i, j, k = (
            AxisTiles.cut(mode, s, p, o, n, output_length=m, made_length=q, shard_length=u)
            for s, p, o, n, m, q, u in zip(
                grid.starts,
                grid.patch_size,
                grid.patch_overlap,
                grid.spatial_shape,
                shape,
                patch_shape or (None,) * 3,
                shards,
                strict=True,
            )
        )
        return cls(grid, mode, shape, shards, swept_axis, (i, j, k))

    @property
    def order(self) -> Triple:
        """The axes in sweep order."""
        return sweep_order(self.swept_axis)

    @property
    def shard_counts(self) -> Triple:
        """Number of shards along I, J, K."""
        i, j, k = (axis.shards for axis in self.axes)
        return i, j, k

    def shard_of(self, tile: Triple) -> Triple:
        """The shard that a tile lies in."""
        i, j, k = (int(axis.shard[t]) for axis, t in zip(self.axes, tile, strict=True))
        return i, j, k

    def tiles_of(self, shard: Triple) -> Iterator[Triple]:
        """The tiles of a shard."""
        i, j, k = (axis.tiles_of(n) for axis, n in zip(self.axes, shard, strict=True))
        return itertools.product(i, j, k)

    def tiles_hit(self, position: Triple, order: Sequence[int] = (0, 1, 2)) -> Iterator[Triple]:
        """The tiles that the patch at a position adds to, the axes in ``order`` from slow to fast."""
        hit = [
            range(int(axis.first_tile[n]), int(axis.stop_tile[n]))
            for axis, n in zip(self.axes, position, strict=True)
        ]
        for tile in itertools.product(*(hit[axis] for axis in order)):
            i, j, k = (tile[order.index(axis)] for axis in range(3))
            yield i, j, k

    def bounds(self, tile: Triple) -> tuple[Triple, Triple]:
        """First voxel of a tile, and the one after its last."""
        (a, b), (c, d), (e, f) = (
            axis.edges[t : t + 2].tolist() for axis, t in zip(self.axes, tile, strict=True)
        )
        return (a, c, e), (b, d, f)

    def awaited(self, tile: Triple) -> int:
        """How many patches touch a tile."""
        return math.prod(len(axis.touching[t]) for axis, t in zip(self.axes, tile, strict=True))

    def turn(self, tile: Triple, position: Triple) -> int:
        """Which of the patches that touch a tile, in sweep order, the one at a position is."""
        turn = 0
        for a in self.order:
            touching = self.axes[a].touching[tile[a]]
            turn = turn * len(touching) + int(np.searchsorted(touching, position[a]))
        return turn

    def turns(self, tile: Triple, skipped: Bools) -> list[int]:
        """The turns of a tile's patches that are not skipped; ``skipped`` is over the grid's positions."""
        of_tile = skipped[np.ix_(*(axis.touching[t] for axis, t in zip(self.axes, tile, strict=True)))]
        return np.flatnonzero(~of_tile.transpose(self.order).ravel()).tolist()

    def patches_for(self, shards: Bools) -> Bools:
        """Which patches of the grid add to any of some shards."""
        total = np.zeros(np.add(shards.shape, 1), dtype=np.int64)
        total[1:, 1:, 1:] = shards
        for axis in range(3):
            np.cumsum(total, axis=axis, out=total)
        ends = [axis.shards_hit() for axis in self.axes]
        found = np.zeros(self.grid.counts, dtype=np.int64)
        for corner in itertools.product((0, 1), repeat=3):
            sign = -1 if (3 - sum(corner)) % 2 else 1
            found += sign * total[np.ix_(*(ends[axis][side] for axis, side in enumerate(corner)))]
        return found > 0


def sweep_order(swept_axis: int) -> Triple:
    """The axes of a sweep, slowest first."""
    first, second = (axis for axis in range(3) if axis != swept_axis)
    return swept_axis, first, second
