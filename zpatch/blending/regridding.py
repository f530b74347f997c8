"""Blended tiles -> voxels of an output on another grid, cell by cell, as the tiles under a cell become final.

A cell is made from a tile and the last voxels of the tiles before it (``tiling.output_cells``). So a tile is
let go once its own cell is made, and only its faces, the last voxels along each axis, wait for the next ones.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from zpatch.blending.sinks import BlendedSink
from zpatch.blending.tile_sums import memory_order
from zpatch.geometry.boxes import Bools, Triple, Voxels
from zpatch.resampling import loops
from zpatch.resampling.axis_taps import AxisTaps
from zpatch.runtime import buffer_pool
from zpatch.tiling.output_cells import AxisCell
from zpatch.tiling.volume_tiles import Tiling

BLOCK_BYTES = 2**21  # of voxels that are resampled at a time, so that they stay in the cache
COVERED = 1 - 1e-5  # the weight of covered voxels from which on a voxel of the output is covered

Offset = Triple  # from a tile to that of a cell, on each axis: 0, or 1 if the cell reaches back to it


@dataclass(slots=True, eq=False)
class _FinalTile:
    """What is left of a final tile for the ``cells`` that need it: all ``voxels``, or only its ``faces``.

    The face of an axis are the last voxels along it.
    """

    voxels: Voxels | None
    cells: dict[Triple, Offset]
    faces: dict[int, Voxels] = field(default_factory=dict)

    def piece(self, offset: Offset, order: Sequence[int]) -> Voxels:
        """The voxels (C, i, j, k) that a cell at some offset needs."""
        voxels = self.voxels
        if voxels is None:
            voxels = self.faces[_face_for(offset, order)]
        return voxels[:, *(slice(-1, None) if back else slice(None) for back in offset)]

    def trim(self, order: Sequence[int], *, owns_voxels: bool) -> None:
        """Let go of the voxels that no cell needs."""
        if self.voxels is not None and any(not any(offset) for offset in self.cells.values()):
            self.voxels = self.voxels if owns_voxels else self.voxels.copy("K")
            return
        needed = {_face_for(offset, order) for offset in self.cells.values()}
        if self.voxels is not None:
            last = slice(-1, None)
            self.faces = {axis: self.voxels[:, *(slice(None),) * axis, last].copy() for axis in needed}
            self.voxels = None
        self.faces = {axis: self.faces[axis] for axis in needed}


def _face_for(offset: Offset, order: Sequence[int]) -> int:
    """The axis of the face that a cell at some offset reads: the one that is held longest."""
    return next(axis for axis in order if offset[axis])


def regridding_bytes(tiling: Tiling, voxel_bytes: int) -> int:
    """The most memory of a Regridder besides what waits: a tile, a block, what it is made from, and reduced.

    ``voxel_bytes`` is the size of a blended voxel, with all channels.
    """
    cells = [max(cell.length for cell in axis.cells) for axis in tiling.axes]
    tiles = [1 + max(tile.length for tile in axis.tiles) for axis in tiling.axes]
    most, tile = 0, math.prod(tiles) * voxel_bytes
    for slow in range(3):
        row, plane = (math.prod(of) // of[slow] * voxel_bytes for of in (cells, tiles))
        planes = 3 + tiles[slow] // cells[slow]  # under a row, at its ends, and rounded
        most = max(most, 3 * max(BLOCK_BYTES, row) + max(BLOCK_BYTES, planes * plane) + 2 * plane)
    return most + tile


class Regridder:
    """Resamples a blended volume onto the grid of the output, and hands on voxels of the output.

    Takes in the tiles of ``tiling`` in any order, without those that only patches add to that are ``skipped``
    (over the positions of the grid). Only cells of ``wanted`` shards (over their numbers) are made. A voxel
    of the output is empty if any voxel is that it is interpolated from.
    """

    def __init__(
        self,
        tiling: Tiling,
        sink: BlendedSink,
        *,
        wanted: Bools | None = None,
        skipped: Bools | None = None,
    ) -> None:
        assert tiling.output is not None
        self._tiling = tiling
        self._output = tiling.output
        self._sink = sink
        self._wanted = np.ones(tiling.shard_counts, dtype=bool) if wanted is None else wanted
        self._run = None if skipped is None else ~skipped
        self._numbers = [{tile.first: tile.number for tile in axis.tiles} for axis in tiling.axes]
        self._cells_over = [_cells_over_tiles(axis.cells) for axis in tiling.axes]
        self._tiles: dict[Triple, _FinalTile] = {}
        self._missing: dict[Triple, int] = {}  # how many tiles, by the number of the cell
        self._box_memory, self._out_memory = _Memory(), _Memory()

    def put(self, first: Triple, voxels: torch.Tensor, *, empty: torch.Tensor | None = None) -> None:
        """Take in the blended voxels (C, I, J, K) of the tile from ``first`` on."""
        i, j, k = (numbers[v] for numbers, v in zip(self._numbers, first, strict=True))
        values = voxels.cpu().numpy()
        if self._run is not None:
            values = _with_cover(values, empty)
        cells = dict(self._cells_from((i, j, k)))
        self._tiles[i, j, k] = tile = _FinalTile(values, cells)
        order = memory_order(torch.from_numpy(values)[0])
        for cell in list(cells):
            missing = self._missing.pop(cell, None) or len(list(self._tiles_under(cell)))
            if missing > 1:
                self._missing[cell] = missing - 1
            else:
                self._make(cell, order)
        tile.trim(self._tiling.order, owns_voxels=self._run is not None)

    def _axis_cells(self, cell: Triple) -> list[AxisCell]:
        return [axis.cells[number] for axis, number in zip(self._tiling.axes, cell, strict=True)]

    def _cells_from(self, tile: Triple) -> Iterator[tuple[Triple, Offset]]:
        """The wanted cells that are made from a tile, and their offsets from it."""
        for i, j, k in itertools.product(*(of[n] for of, n in zip(self._cells_over, tile, strict=True))):
            along = self._axis_cells((i, j, k))
            a, b, c = (each.tile - number for each, number in zip(along, tile, strict=True))
            if self._wanted[tuple(each.shard for each in along)]:
                yield (i, j, k), (a, b, c)

    def _tiles_under(self, cell: Triple) -> Iterator[Triple]:
        """The tiles that a cell is made from and any patch is run for."""
        for i, j, k in itertools.product(*(each.tiles for each in self._axis_cells(cell))):
            if self._run is None or self._tiling.is_hit((i, j, k), self._run):
                yield i, j, k

    def _make(self, cell: Triple, order: Sequence[int]) -> None:
        """Make a cell, block by block along the axis that is slowest in memory; let go of what it needed."""
        numbers = list(self._tiles_under(cell))
        tiles = [self._tiles[number] for number in numbers]
        pieces = [(tile.cells[cell], tile.piece(tile.cells[cell], self._tiling.order)) for tile in tiles]
        along = self._axis_cells(cell)
        for rows in self._blocks(along, len(pieces[0][1]) * pieces[0][1].itemsize, order[0]):
            self._make_block(along, rows, pieces, order)
        for number, tile in zip(numbers, tiles, strict=True):
            del tile.cells[cell]
            tile.trim(self._tiling.order, owns_voxels=True)
            if not tile.cells:
                del self._tiles[number]

    def _blocks(self, along: Sequence[AxisCell], voxel_bytes: int, slow: int) -> Iterator[range]:
        """Rows of a cell along an axis: they, or what they are made from, take about ``BLOCK_BYTES``."""
        length = along[slow].length
        of_cell = max(math.prod(cell.length for cell in along), math.prod(self._extents(along)))
        step = max(1, BLOCK_BYTES * length // (voxel_bytes * of_cell))
        for start in range(0, length, step):
            yield range(start, min(start + step, length))

    def _extents(self, along: Sequence[AxisCell]) -> list[int]:
        """The extent of what a cell is made from."""
        tiles = [axis.tiles[cell.tile] for axis, cell in zip(self._tiling.axes, along, strict=True)]
        return [cell.reach + tile.length for cell, tile in zip(along, tiles, strict=True)]

    def _make_block(
        self,
        along: Sequence[AxisCell],
        rows: range,
        pieces: Sequence[tuple[Offset, Voxels]],
        order: Sequence[int],
    ) -> None:
        """Make some ``rows`` of a cell, along the axis that is slowest in memory."""
        slow, *others = order
        taps = {axis: _taps_of(along[axis]) for axis in others}
        taps[slow] = _taps_of(along[slow]).some(rows)
        planes = range(taps[slow].start, taps[slow].stop)
        taps[slow] = taps[slow].moved(planes.start)
        box = self._box(along, planes, pieces, order)
        out = self._out_memory.array((len(box), *(len(taps[axis].first) for axis in order)), box.dtype)
        if self._output.mode == "nearest":
            loops.pick(box, [taps[axis].first for axis in order], out)
        else:
            loops.sum_taps(box, [taps[axis] for axis in order], out)
        first = [0, 0, 0]
        for axis, of_axis in enumerate(self._output.axes):
            first[of_axis] = along[axis].first + (rows.start if axis == slow else 0)
        axes = [1 + order.index(self._output.axes.index(axis)) for axis in range(3)]
        self._hand_on((first[0], first[1], first[2]), torch.from_numpy(out).permute(0, *axes))

    def _box(
        self,
        along: Sequence[AxisCell],
        planes: range,
        pieces: Sequence[tuple[Offset, Voxels]],
        order: Sequence[int],
    ) -> Voxels:
        """Some planes of the voxels under a cell, in one piece, with axes in their order in memory."""
        _, voxels = pieces[0]
        extents = self._extents(along)
        of_planes = [extents[axis] for axis in order[1:]]
        box = self._box_memory.array((len(voxels), len(planes), *of_planes), voxels.dtype)
        if self._run is not None:
            box[...] = 0  # where no patch is run
        for offset, voxels in pieces:
            target, source = [slice(None)], [slice(None)] * 4
            for axis in order:
                start = along[axis].reach * (1 - offset[axis])
                part = range(start, start + voxels.shape[1 + axis])
                of_box = planes if axis == order[0] else range(part.start, part.stop)
                low, high = max(part.start, of_box.start), min(part.stop, of_box.stop)
                shift = of_box.start if axis == order[0] else 0
                target.append(slice(low - shift, max(low, high) - shift))
                source[1 + axis] = slice(low - start, max(low, high) - start)
            box[tuple(target)] = voxels[tuple(source)].transpose(0, *(1 + axis for axis in order))
        return box

    def _hand_on(self, first: Triple, voxels: torch.Tensor) -> None:
        if self._run is None:
            self._sink.put(first, voxels)
            return
        voxels, covered = voxels[:-1], voxels[-1]
        empty = covered < COVERED
        self._sink.put(first, voxels, empty=empty if empty.any() else None)


def _cells_over_tiles(cells: Sequence[AxisCell]) -> dict[int, list[int]]:
    """The numbers of the cells that are made from each tile."""
    found: dict[int, list[int]] = {}
    for number, cell in enumerate(cells):
        for tile in cell.tiles:
            found.setdefault(tile, []).append(number)
    return found


def _taps_of(cell: AxisCell) -> AxisTaps:
    assert cell.taps is not None
    return cell.taps


def _with_cover(voxels: Voxels, empty: torch.Tensor | None) -> Voxels:
    """The voxels, and as one more channel whether they are covered."""
    found = np.empty((len(voxels) + 1, *voxels.shape[1:]), voxels.dtype)
    found[:-1] = voxels
    found[-1] = 1 if empty is None else ~empty.cpu().numpy()
    return found


class _Memory:
    """Memory that is used again and again."""

    def __init__(self) -> None:
        self._pages = np.empty(0, np.uint8)

    def array(self, shape: Sequence[int], dtype: Any) -> Voxels:
        """A C-contiguous array of undefined contents, valid until the next one is asked for."""
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        if nbytes > len(self._pages):
            self._pages = buffer_pool.new_pages(nbytes)
        found: Voxels = self._pages[:nbytes].view(dtype).reshape(shape)
        return found
