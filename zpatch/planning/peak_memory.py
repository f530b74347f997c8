"""The most memory that a prediction holds, known before anything runs.

Sums, shards and decoded chunks are products of pieces of the three axes. A piece is held from one patch of
its axis to another, so a product is held from one place of the sweep to another. The bytes held at each place
follow from tables that grow with the axes and not with the volume.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from zpatch.blending.regridding import regridding_bytes
from zpatch.geometry.boxes import Integers, Triple
from zpatch.planning.prediction_plan import OUTPUT_BUFFERS, PlannedHead, PredictionPlan, Ranges, Region
from zpatch.runtime.buffer_pool import POOL_SLACK
from zpatch.sampling.patch_views import PatchView
from zpatch.sources.chunk_cache import is_quick, patches_of_chunks
from zpatch.sources.voxel_source import VoxelSource
from zpatch.tiling.axis_tiles import AxisTile, AxisTiles

WEIGHT_BYTES = 4  # of a voxel's summed weights
BATCHES_READ = 3  # one in the network, one waiting, one being read
SHARDS_WRITTEN = 2  # besides those that are being filled: one waiting, one being encoded
KEPT_PIECES_BYTES = 3 * 2**23
SMALL_PIECES_BYTES = 2**23  # kept by threads in small blocks


@dataclass(frozen=True, slots=True, eq=False)
class AxisLifetimes:
    """Pieces of one axis: ``size`` voxels each, held from patch ``birth`` up to and including ``death``."""

    birth: Integers
    death: Integers
    size: Integers

    def within(self, first: int) -> AxisLifetimes:
        """The same pieces, with patches counted from ``first``."""
        return AxisLifetimes(self.birth - first, self.death - first, self.size)

    def final(self) -> AxisLifetimes:
        """The same pieces, held only at the end of their lives."""
        return AxisLifetimes(self.death, self.death, self.size)

    def until_next(self) -> AxisLifetimes:
        """The same pieces, held from the end of their lives until the next one ends."""
        return AxisLifetimes(self.death, np.append(self.death[1:], self.death[-1:]), self.size)

    def faces(self) -> AxisLifetimes:
        """The last voxel of each piece but the last, held until the next one ends."""
        return AxisLifetimes(self.death[:-1], self.death[1:], np.ones_like(self.size[1:]))


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """Memory of one kind: the products of pieces of ``axes``, in sweep order, of ``voxel_bytes`` a voxel.

    A kind with negative bytes corrects another kind that counts the same voxels.
    """

    axes: tuple[AxisLifetimes, AxisLifetimes, AxisLifetimes]
    voxel_bytes: int


def sweep_peak_bytes(kinds: Sequence[Held], counts: Sequence[int]) -> int:
    """The most bytes held at any patch of a sweep over ``counts`` patches along each axis, in sweep order.

    >>> pieces = AxisLifetimes(np.array([0, 0]), np.array([0, 1]), np.array([4, 2]))
    >>> sweep_peak_bytes([Held((pieces, pieces, pieces), 1)], (2, 2, 2))
    216
    """
    rows, cross = counts[0], counts[1] * counts[2]
    extents, profiles = [], []
    for kind in kinds:
        slow, *others = kind.axes
        born, gone = _over_cross_section(others, counts[1], counts[2])
        # Within a row a piece is held all along, or from its birth on, or until its death, or between both.
        profiles += [np.full(cross, born[-1]), born, born[-1] - gone, born - gone]
        row = np.arange(rows)[:, None]
        before, after = slow.birth < row, row < slow.death
        begins, ends = slow.birth == row, row == slow.death
        parts = (before & after, begins & after, before & ends, begins & ends)
        extents += [there @ slow.size * kind.voxel_bytes for there in parts]
    table = np.stack(profiles)
    return max(int((of_row @ table).max()) for of_row in np.unique(np.stack(extents, axis=1), axis=0))


def _over_cross_section(axes: Sequence[AxisLifetimes], rows: int, columns: int) -> tuple[Integers, Integers]:
    """Voxels of the cross-section born up to each of its patches, and gone before it."""
    slow, fast = axes
    sizes = np.multiply.outer(slow.size, fast.size).ravel()
    births, deaths = (
        np.add.outer(a * columns, b).ravel() for a, b in ((slow.birth, fast.birth), (slow.death, fast.death))
    )
    born, gone = np.zeros((2, rows * columns + 1), dtype=np.int64)
    np.add.at(born, births, sizes)
    np.add.at(gone, deaths + 1, sizes)
    return np.cumsum(born)[:-1], np.cumsum(gone)[:-1]


def held_of_head(
    planned: PlannedHead, shards: Ranges, patches: Ranges, *, masked: bool = False
) -> Iterator[Held]:
    """The sums and the shards that are held during a sweep over some shards of an output.

    With a mask, weights are summed too, and a shard may be begun by its first patch. For an output on another
    grid, the faces of final tiles are held until the cells that need them are made.
    """
    tiling, head = planned.tiling, planned.head
    sums = head.channels * head.sum_bytes + (WEIGHT_BYTES if masked else 0)
    along = list(zip(tiling.axes, shards, patches, strict=True))
    tiles = [axis.tiles_of(u[0], u[-1]) for axis, u, _ in along]
    all_tiles = [_tile_lives(some, run.start) for (_, _, run), some in zip(along, tiles, strict=True)]
    alone = [
        _tile_lives([t for t in some if len(t.contributors) == 1], run.start)
        for (_, _, run), some in zip(along, tiles, strict=True)
    ]
    filled = [_shard_lives(axis, u, run.start, masked) for axis, u, run in along]
    for lives, voxel_bytes in ((all_tiles, sums), (alone, -sums), (filled, planned.voxel_bytes)):
        a, b, c = (lives[axis] for axis in tiling.order)
        yield Held((a, b, c), voxel_bytes)
    if tiling.output is not None:
        slow, middle, fast = (all_tiles[axis] for axis in tiling.order)
        yield Held((slow.faces(), middle.until_next(), fast.until_next()), sums)
        yield Held((slow.final(), middle.faces(), fast.until_next()), sums)
        yield Held((slow.final(), middle.final(), fast.faces()), sums)


def _tile_lives(tiles: Sequence[AxisTile], first: int) -> AxisLifetimes:
    births = np.array([tile.contributors[0] for tile in tiles], dtype=np.int64)
    deaths = np.array([tile.contributors[-1] for tile in tiles], dtype=np.int64)
    sizes = np.array([tile.length for tile in tiles], dtype=np.int64)
    return AxisLifetimes(births - first, deaths - first, sizes)


def _shard_lives(axis: AxisTiles, shards: range, first: int, masked: bool) -> AxisLifetimes:
    births, deaths, sizes = [], [], []
    for shard in shards:
        tiles, cells = axis.tiles_of(shard), axis.cells_of(shard)
        begin = tiles[0].contributors[0] if masked else axis.tiles[cells[0].tile].contributors[-1]
        births.append(begin - first)
        deaths.append(tiles[-1].contributors[-1] - first)
        sizes.append(sum(cell.length for cell in cells))
    return AxisLifetimes(np.array(births), np.array(deaths), np.array(sizes))


def region_bytes(plan: PredictionPlan) -> int:
    """The most bytes that any region of a plan holds; without the network's if its cost is not known."""
    return _fixed_bytes(plan) + max(_swept_bytes(plan, region) for region in plan.regions)


def kept_bytes(plan: PredictionPlan) -> int:
    """What a region keeps of the memory that the network has freed, where no limit forbids it.

    That is the outputs of a batch once more, and pieces that fit none of its tensors.
    """
    return plan.outputs_bytes // OUTPUT_BUFFERS + KEPT_PIECES_BYTES


def _fixed_bytes(plan: PredictionPlan) -> int:
    """Bytes held in any region: batches that are read and predicted, shards in flight, and spare pieces."""
    voxels = plan.batch_size * math.prod(plan.grid.patch_size)
    read = voxels * sum(image.num_channels for image in plan.images) * 4
    batches = (BATCHES_READ + (1 if plan.tta else 0)) * read  # one more that is flipped
    written = SHARDS_WRITTEN * sum(head.shard_bytes for head in plan.heads)
    outputs = max(plan.outputs_bytes, plan.network_bytes)  # the network holds its own while it runs
    regridded = sum(
        regridding_bytes(h.tiling, (h.head.channels + 1) * h.head.sum_bytes)
        for h in plan.heads
        if h.tiling.output is not None
    )
    return batches + outputs + written + regridded + len(plan.heads) * POOL_SLACK + SMALL_PIECES_BYTES


def _swept_bytes(plan: PredictionPlan, region: Region) -> int:
    """The most bytes that a region's sweep holds: sums and shards, and the chunks that are read."""
    order = plan.heads[0].tiling.order
    counts = [len(region.patches[axis]) for axis in order]
    kept = [
        held
        for head, shards in zip(plan.heads, region.shards, strict=True)
        if all(shards)
        for held in held_of_head(head, shards, region.patches, masked=plan.skipped is not None)
    ]
    slow_views = [view for view in plan.views if not is_quick(view.image.source)]
    chunks = [_held_chunks(view, plan, region.patches) for view in slow_views]
    sources = [view.image.source for view in slow_views]
    of_patch = sum(_bytes_under(plan.grid.patch_size, source) for source in sources)
    together = (plan.batch_size - 1) * of_patch
    together += plan.batch_size * sum(_bytes_below(plan.grid.patch_size, source) for source in sources)
    return sweep_peak_bytes(kept, counts) + (sweep_peak_bytes(chunks, counts) + together if chunks else 0)


def _bytes_under(patch_size: Triple, source: VoxelSource) -> int:
    """Bytes of the most chunks that a patch touches, wherever it is."""
    counts = _chunks_under(patch_size, source)
    extents = (min(n, m * c) for n, m, c in zip(source.shape[1:], counts, source.chunk_shape, strict=True))
    return math.prod(extents) * _voxel_bytes(source)


def _bytes_below(patch_size: Triple, source: VoxelSource) -> int:
    """Bytes of what the chunks under a patch are made from."""
    i, j, k = map(min, source.chunk_shape, source.shape[1:])
    return math.prod(_chunks_under(patch_size, source)) * source.bytes_below((i, j, k))


def _chunks_under(patch_size: Triple, source: VoxelSource) -> list[int]:
    """The most chunks that a patch touches along each axis, wherever it is."""
    sizes = zip(patch_size, source.chunk_shape, source.shape[1:], strict=True)
    return [min(-(-(p - 1) // c) + 1, -(-n // c)) for p, c, n in sizes]


def _voxel_bytes(source: VoxelSource) -> int:
    return source.shape[0] * source.dtype.itemsize


def _held_chunks(view: PatchView, plan: PredictionPlan, patches: Ranges) -> Held:
    source, grid, lifetimes = view.image.source, plan.grid_of(view), []
    for axis in plan.heads[0].tiling.order:
        run, length = patches[axis], min(source.chunk_shape[axis], grid.spatial_shape[axis])
        starts = grid.starts[axis][run.start : run.stop]
        births, deaths = patches_of_chunks(starts, grid.patch_size[axis], length, grid.spatial_shape[axis])
        touched = births <= deaths
        sizes = np.full(int(touched.sum()), length)
        lifetimes.append(AxisLifetimes(births[touched], deaths[touched], sizes))
    slow, middle, fast = lifetimes
    return Held((slow, middle, fast), _voxel_bytes(source))
