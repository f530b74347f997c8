"""How much is held at most while a front sweeps over a volume, known before anything runs.

What is held (sums, shards, decoded chunks) is a product of pieces of the three axes. A piece is there
from one patch of its axis to another, so the whole is there from one place in the sweep to another, and what
is held at each place follows from tables that grow with the axes and not with the volume.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from zpatch.blending.axis_tiles import AxisTile
from zpatch.geometry.boxes import Integers, Triple
from zpatch.geometry.patch_grid import PatchGrid
from zpatch.images.chunk_cache import is_quick, patches_of_chunks
from zpatch.images.image import Image
from zpatch.images.voxel_source import VoxelSource
from zpatch.prediction.prediction_options import PredictOptions
from zpatch.prediction.prediction_plan import PlannedHead, Ranges, Region, outputs_bytes
from zpatch.runtime.buffer_pool import POOL_SLACK

WEIGHT_BYTES = 4  # of a voxel's summed weights
BATCHES_READ = 3  # one with the network, one waiting, one being read
SHARDS_WRITTEN = 2  # besides those that are being filled: one waiting, one being encoded
SMALL_PIECES_BYTES = 2**23  # what the threads keep of small blocks


@dataclass(frozen=True, slots=True, eq=False)
class AxisLifetimes:
    """Pieces of one axis: ``size`` voxels each, held from patch ``birth`` up to and with ``death``."""

    birth: Integers
    death: Integers
    size: Integers

    def within(self, first: int) -> AxisLifetimes:
        """The same, with patches counted from a number on."""
        return AxisLifetimes(self.birth - first, self.death - first, self.size)


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """What is held of one kind: products of pieces, ``voxel_bytes`` for each voxel; axes in sweep order.

    A kind with negative bytes takes away from another one that counts it too.
    """

    axes: tuple[AxisLifetimes, AxisLifetimes, AxisLifetimes]
    voxel_bytes: int


def peak_bytes(kinds: Sequence[Held], counts: Sequence[int]) -> int:
    """The most that is held at any patch of a sweep of so many patches along each axis, in sweep order.

    >>> pieces = AxisLifetimes(np.array([0, 0]), np.array([0, 1]), np.array([4, 2]))
    >>> peak_bytes([Held((pieces, pieces, pieces), 1)], (2, 2, 2))
    216
    """
    rows, cross = counts[0], counts[1] * counts[2]
    extents, profiles = [], []
    for kind in kinds:
        slow, *others = kind.axes
        born, gone = _over_cross_section(others, counts[1], counts[2])
        # Of what is there in a row, some is all along, some from its birth on, some until its death.
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
    """What is held of sums and of shards while patches sweep over some shards of an output.

    Where patches are ``masked`` out weights are summed too, and a shard may begin with its first patch.
    """
    tiling, head = planned.tiling, planned.head
    sums = head.channels * head.sum_bytes + (WEIGHT_BYTES if masked else 0)
    along = list(zip(tiling.axes, shards, patches, strict=True))
    tiles = [[t for shard in u for t in axis.tiles_of(shard)] for axis, u, _ in along]
    all_tiles = [_tile_lives(some, run.start) for (_, _, run), some in zip(along, tiles, strict=True)]
    alone = [
        _tile_lives([t for t in some if len(t.contributors) == 1], run.start)
        for (_, _, run), some in zip(along, tiles, strict=True)
    ]
    filled = [
        _shard_lives([axis.tiles_of(shard) for shard in u], run.start, masked) for axis, u, run in along
    ]
    for lives, voxel_bytes in ((all_tiles, sums), (alone, -sums), (filled, planned.voxel_bytes)):
        a, b, c = (lives[axis] for axis in tiling.order)
        yield Held((a, b, c), voxel_bytes)


def _tile_lives(tiles: Sequence[AxisTile], first: int) -> AxisLifetimes:
    births = np.array([tile.contributors[0] for tile in tiles], dtype=np.int64)
    deaths = np.array([tile.contributors[-1] for tile in tiles], dtype=np.int64)
    sizes = np.array([tile.length for tile in tiles], dtype=np.int64)
    return AxisLifetimes(births - first, deaths - first, sizes)


def _shard_lives(shards: Sequence[Sequence[AxisTile]], first: int, masked: bool) -> AxisLifetimes:
    births = np.array([tiles[0].contributors[0 if masked else -1] for tiles in shards], dtype=np.int64)
    deaths = np.array([tiles[-1].contributors[-1] for tiles in shards], dtype=np.int64)
    sizes = np.array([tiles[-1].stop - tiles[0].first for tiles in shards], dtype=np.int64)
    return AxisLifetimes(births - first, deaths - first, sizes)


def fixed_bytes(
    images: Sequence[Image], planned: Sequence[PlannedHead], options: PredictOptions, *, tta: bool
) -> int:
    """What is held in any region: batches on their way in and out, shards being written, and spare pieces."""
    voxels = options.batch_size * math.prod(options.patch_size)
    read = voxels * sum(image.num_channels for image in images) * 4
    batches = (BATCHES_READ + (1 if tta else 0)) * read  # one more that is flipped
    batches += outputs_bytes([h.head for h in planned], options.batch_size, tta=tta)
    written = SHARDS_WRITTEN * sum(h.shard_bytes for h in planned)
    return batches + written + len(planned) * POOL_SLACK + SMALL_PIECES_BYTES


def region_bytes(
    region: Region,
    images: Sequence[Image],
    heads: Sequence[PlannedHead],
    grid: PatchGrid,
    batch_size: int,
    masked: bool,
) -> int:
    """The front of a region's sweep: sums and shards, and the chunks that are read."""
    order = heads[0].tiling.order
    counts = [len(region.patches[axis]) for axis in order]
    kept = [
        held
        for head, shards in zip(heads, region.shards, strict=True)
        if all(shards)
        for held in held_of_head(head, shards, region.patches, masked=masked)
    ]
    sources = [image.source for image in images if not is_quick(image.source)]
    chunks = [_held_chunks(source, grid, order, region.patches) for source in sources]
    together = (batch_size - 1) * sum(_bytes_under(grid.patch_size, source) for source in sources)
    return peak_bytes(kept, counts) + (peak_bytes(chunks, counts) + together if chunks else 0)


def _bytes_under(patch_size: Triple, source: VoxelSource) -> int:
    """The chunks that a patch touches at most, as it lies worst."""
    extents = [(-(-(p - 1) // c) + 1) * c for p, c in zip(patch_size, source.chunk_shape, strict=True)]
    return math.prod(min(n, e) for n, e in zip(source.shape[1:], extents, strict=True)) * _voxel_bytes(source)


def _voxel_bytes(source: VoxelSource) -> int:
    return source.shape[0] * source.dtype.itemsize


def _held_chunks(source: VoxelSource, grid: PatchGrid, order: Triple, patches: Ranges) -> Held:
    lives = []
    for axis in order:
        run, length = patches[axis], min(source.chunk_shape[axis], grid.spatial_shape[axis])
        starts = grid.starts[axis][run.start : run.stop]
        births, deaths = patches_of_chunks(starts, grid.patch_size[axis], length, grid.spatial_shape[axis])
        touched = births <= deaths
        sizes = np.full(int(touched.sum()), length)
        lives.append(AxisLifetimes(births[touched], deaths[touched], sizes))
    slow, middle, fast = lives
    return Held((slow, middle, fast), _voxel_bytes(source))
