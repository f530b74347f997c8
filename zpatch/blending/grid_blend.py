"""Blending the patches of a grid into final voxels, tile by tile, while they arrive.

Weights are normalised beforehand, so that a tile's sums are its voxels as soon as its last contributor is
added. A tile is in memory between its first and its last contributor, so that memory does not grow along the
swept axis. Where only one patch covers a tile there is nothing to sum: its voxels are handed on as they are.
"""

from __future__ import annotations

import numpy as np
import torch

from zpatch.blending.blend import accumulation_dtype
from zpatch.blending.sinks import BlendedSink
from zpatch.blending.tile_sums import (
    Part,
    SumsMemory,
    TileSums,
    add_all,
    as_tensor,
    like_patch,
    memory_order,
)
from zpatch.errors import IncompleteCoverageError, MemoryLimitError
from zpatch.geometry.boxes import Bools, PatchLocation, Triple
from zpatch.runtime.byte_sizes import format_bytes
from zpatch.tiling.volume_tiles import Tile, Tiling


class GridBlend:
    """Blends the patches of a grid, in any order, and hands each tile on as soon as it is final.

    Only tiles of ``wanted`` shards (over their numbers) are made; all of them by default. Contributions are
    summed in sweep order, so that the voxels do not depend on the order in which patches arrive. Parts of
    patches that arrive before their turn wait, and take at most ``max_held_bytes``. Patches that are
    ``skipped`` (over the positions of the grid) are never run: where others cover a voxel, it is divided by
    their weights, and tiles without any are not handed on.
    """

    def __init__(
        self,
        tiling: Tiling,
        sink: BlendedSink,
        *,
        wanted: Bools | None = None,
        skipped: Bools | None = None,
        max_held_bytes: int | None = None,
    ) -> None:
        self.channels: int | None = None
        self.held_bytes = 0
        self._tiling = tiling
        self._sink = sink
        self._wanted = np.ones(tiling.shard_counts, dtype=bool) if wanted is None else wanted
        self._all_wanted = bool(self._wanted.all())
        self._skipped = skipped
        self._max_held_bytes = max_held_bytes
        run = True if skipped is None else ~skipped
        self._needed = tiling.patches_for(self._wanted) & run
        self._arrived = np.zeros(tiling.grid.counts, dtype=bool)
        self._sums: dict[Triple, TileSums] = {}
        self._memory = SumsMemory()

    def size_of(self, location: PatchLocation) -> Triple:
        """Extent of a patch in the output."""
        return self._tiling.size_of(self._tiling.grid.position_of(location))

    def add(self, patch: torch.Tensor, location: PatchLocation) -> None:
        """Take in a patch (C, I, J, K) of the grid."""
        position = self._tiling.grid.position_of(location)
        if self._arrived[position]:
            raise IncompleteCoverageError(f"the patch at {location.index} was added twice")
        self._arrived[position] = True
        self.channels = len(patch)
        if not self._needed[position]:
            return
        voxels = like_patch(patch.to(accumulation_dtype(patch.dtype, self._tiling.mode)))
        alone, additions, changed = [], [], []
        # In the patch's order in memory, in which the compiled loop passes over it.
        for tile, share in self._tiling.tiles_hit(position, memory_order(voxels[0])):
            if not self._is_wanted(tile):
                continue
            part = Part(voxels[:, *share.in_patch], share)
            if tile.contributors == 1:
                alone.append((tile, as_tensor(part.voxels)))
                continue
            sums = self._sums_of(tile)
            if share.rank == sums.next_rank:
                additions.append(sums.addition(part))
                changed.append(sums)
            else:
                self._hold(sums, part)
        for tile, final in alone:
            self._hand_on(tile, final)
        add_all(additions, self._tiling.mode)
        for sums in changed:
            self._complete(sums)

    def _is_wanted(self, tile: Tile) -> bool:
        i, j, k = (slice(shards.start, shards.stop) for shards in tile.shards)
        return self._all_wanted or bool(self._wanted[i, j, k].any())

    def _sums_of(self, tile: Tile) -> TileSums:
        sums = self._sums.get(tile.number)
        if sums is None:
            sums = self._sums[tile.number] = TileSums(tile, self._ranks(tile), self._memory)
        return sums

    def _complete(self, sums: TileSums) -> None:
        """Add the parts of a tile that waited for the one that was added; hand the tile on if it is final."""
        while (early := sums.pop_next()) is not None:
            self.held_bytes -= early.voxels.nbytes
            add_all([sums.addition(early)], self._tiling.mode)
        if sums.is_final:
            del self._sums[sums.tile.number]
            assert sums.voxels is not None
            self._hand_on(sums.tile, as_tensor(sums.voxels), sums.weights)
            self._memory.give_back(sums.voxels)

    def _ranks(self, tile: Tile) -> range | list[int]:
        """The ranks of those contributors of a tile that are run."""
        if self._skipped is None:
            return range(tile.contributors)
        return self._tiling.ranks(tile, ~self._skipped)

    def _hold(self, sums: TileSums, part: Part) -> None:
        self.held_bytes += part.voxels.nbytes
        if self._max_held_bytes is not None and self.held_bytes > self._max_held_bytes:
            raise MemoryLimitError(
                f"patches that arrived before their turn take {format_bytes(self.held_bytes)}, more than "
                f"{format_bytes(self._max_held_bytes)}; give them in the order of the grid"
            )
        sums.keep(part)

    def _hand_on(self, tile: Tile, voxels: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Hand on the voxels of a tile, which are divided by ``weights`` where these do not sum to one."""
        if self._skipped is None or weights is None:
            self._sink.put(tile.first, voxels)
            return
        empty = weights == 0
        if self._tiling.mode != "crop":
            reached = torch.from_numpy(self._tiling.reached(tile, self._skipped)).to(empty.device)
            voxels = voxels / weights.masked_fill(empty | ~reached, 1)
        self._sink.put(tile.first, voxels, empty=empty)  # they are 0 where empty

    def check_complete(self) -> None:
        """Raise IncompleteCoverageError where a patch has not arrived; it may still be added then."""
        missing = self._needed & ~self._arrived
        if missing.any():
            i, j, k = (int(n) for n in np.unravel_index(missing.argmax(), missing.shape))
            first = self._tiling.grid.at((i, j, k))
            raise IncompleteCoverageError(
                f"{int(missing.sum())} of {int(self._needed.sum())} patches are missing, the first one from "
                f"{first.index_ini} to {first.index_fin}; add every patch of the grid once"
            )

    def finish(self) -> None:
        """Check that every patch arrived."""
        self.check_complete()

    def close(self) -> None:
        """Drop the sums of all tiles."""
        self._sums = {}
        self._memory = SumsMemory()
        self.held_bytes = 0
