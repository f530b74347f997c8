"""Blending the patches of a grid into voxels, tile by tile, as a front sweeps over the volume.

Weights are normalised beforehand, so sums hold the answer as soon as the last patch has come. A tile is made
when its first patch arrives and gone when it is final, so that memory is that of the front and not of the
volume. Where only one patch covers a tile there is nothing to sum: its voxels go straight through.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

from zpatch.blending.sinks import VolumeSink
from zpatch.blending.tiling import Bools, Tiling
from zpatch.errors import IncompleteCoverageError, MemoryLimitError, ModelError
from zpatch.geometry.boxes import PatchLocation, Triple
from zpatch.runtime import buffer_pool
from zpatch.runtime.byte_sizes import format_bytes

try:
    from zpatch.blending._blend import add as _compiled_add
except ImportError:  # no compiler was there
    _compiled_add = None  # type: ignore[assignment]

Finalise = Callable[[torch.Tensor], torch.Tensor]
Weights = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def accumulation_dtype(dtype: torch.dtype, mode: str) -> torch.dtype:
    """What patches of a type are summed in: float32 or wider; integers stay exact in crop mode."""
    if dtype.is_floating_point or dtype.is_complex:
        return torch.promote_types(dtype, torch.float32)
    if mode == "crop":
        return torch.uint8 if dtype == torch.bool else dtype
    return torch.float32


class Skipped(NamedTuple):
    """Patches of a grid that are never run: ``patches`` over its positions.

    ``fill(shape)`` gives final voxels (C, I, J, K) for where no patch was run. Where some were, their
    weights are summed too and divided out.
    """

    patches: Bools
    fill: Callable[[Triple], torch.Tensor]


class _Part(NamedTuple):
    """What a patch adds to a tile: voxels (C, i, j, k), from ``first`` on in the tile, and its weights."""

    voxels: torch.Tensor
    first: Triple
    weights: Weights

    @property
    def place(self) -> tuple[slice, ...]:
        return tuple(slice(a, a + n) for a, n in zip(self.first, self.voxels.shape[1:], strict=True))

    @property
    def product(self) -> torch.Tensor:
        """The weights of all voxels, (i, j, k), in memory as the voxels lie."""
        order = memory_order(self.voxels[0])
        slow, middle, fast = (self.weights[axis] for axis in order)
        return (slow[:, None, None] * middle[:, None] * fast).permute(
            [order.index(axis) for axis in range(3)]
        )


class _Tile:
    """The sums of a tile that awaits further patches; ``turns`` says which, in the order of summing."""

    __slots__ = ("done", "early", "sums", "turns", "weights")

    def __init__(self, turns: Sequence[int]) -> None:
        self.turns = turns
        self.done = 0
        self.early: dict[int, _Part] = {}
        self.sums: torch.Tensor | None = None
        self.weights: torch.Tensor | None = None

    @property
    def is_final(self) -> bool:
        return self.done == len(self.turns)


class GridBlend:
    """Blends the patches of a grid, in any order, and hands each tile on as soon as it is final.

    Only tiles in ``wanted`` shards (over their numbers) are made; all of them by default. Contributions
    are summed in sweep order, so that the voxels do not depend on the order in which patches arrive; what
    comes too early waits, and takes at most ``max_held_bytes``.
    """

    def __init__(
        self,
        tiling: Tiling,
        sink: VolumeSink,
        finalise: Finalise,
        *,
        wanted: Bools | None = None,
        skipped: Skipped | None = None,
        max_held_bytes: int | None = None,
    ) -> None:
        self.channels: int | None = None
        self.held_bytes = 0
        self._tiling = tiling
        self._sink = sink
        self._finalise = finalise
        self._wanted = np.ones(tiling.shard_counts, dtype=bool) if wanted is None else wanted
        self._skipped = skipped
        self._max_held_bytes = max_held_bytes
        self._awaited = tiling.patches_for(self._wanted)
        if skipped is not None:
            self._awaited &= ~skipped.patches
        self._seen = np.zeros(tiling.grid.counts, dtype=bool)
        self._begun = np.zeros(tiling.shard_counts, dtype=bool)
        self._tiles: dict[Triple, _Tile] = {}
        self._pool: buffer_pool.Pool[torch.Tensor] = buffer_pool.Pool()
        self._weights = [[torch.from_numpy(w) for w in axis.weights] for axis in tiling.axes]

    def size_of(self, location: PatchLocation) -> Triple:
        """Extent of a patch in the output."""
        position = self._tiling.grid.position_of(location)
        i, j, k = (int(a.stops[n] - a.starts[n]) for a, n in zip(self._tiling.axes, position, strict=True))
        return i, j, k

    def add(self, patch: torch.Tensor, location: PatchLocation) -> None:
        """Take in a patch (C, I, J, K) of the grid."""
        position = self._tiling.grid.position_of(location)
        if self._seen[position]:
            raise IncompleteCoverageError(f"the patch at {location.index} came twice")
        self._seen[position] = True
        if not self._awaited[position]:
            return
        patch = patch.to(accumulation_dtype(patch.dtype, self._tiling.mode))
        # As the patch lies in memory, so that what neighbouring tiles take of it is still in the cache.
        for tile in self._tiling.tiles_hit(position, memory_order(patch[0])):
            if self._wanted[self._tiling.shard_of(tile)]:
                self._add_to_tile(tile, patch, position)

    def _add_to_tile(self, tile: Triple, patch: torch.Tensor, position: Triple) -> None:
        part = self._part(tile, patch, position)
        if self._tiling.awaited(tile) == 1:
            self._hand_on(tile, part.voxels, None)
            return
        state = self._tiles.get(tile)
        if state is None:
            state = self._tiles[tile] = _Tile(self._turns(tile))
        turn = self._tiling.turn(tile, position)
        if state.turns[state.done] != turn:
            self._hold(state, turn, part)
            return
        self._sum(state, part, tile)
        while not state.is_final and (early := state.early.pop(state.turns[state.done], None)) is not None:
            self.held_bytes -= early.voxels.nbytes
            self._sum(state, early, tile)
        if state.is_final:
            del self._tiles[tile]
            assert state.sums is not None
            self._hand_on(tile, state.sums, state.weights)
            self._give_back(state.sums)

    def _part(self, tile: Triple, patch: torch.Tensor, position: Triple) -> _Part:
        low, high = self._tiling.bounds(tile)
        first, slices, weights = [], [], []
        for a, axis in enumerate(self._tiling.axes):
            n, kept = position[a], int(axis.first[position[a]])
            start, stop = max(low[a], kept), min(high[a], int(axis.stop[n]))
            first.append(start - low[a])
            slices.append(slice(start - int(axis.starts[n]), stop - int(axis.starts[n])))
            weights.append(self._weights[a][n][start - kept : stop - kept].to(patch.device))
        (i, j, k), (u, v, w) = first, weights
        return _Part(patch[:, *slices], (i, j, k), (u, v, w))

    def _turns(self, tile: Triple) -> Sequence[int]:
        if self._skipped is None:
            return range(self._tiling.awaited(tile))
        return self._tiling.turns(tile, self._skipped.patches)

    def _hold(self, state: _Tile, turn: int, part: _Part) -> None:
        self.held_bytes += part.voxels.nbytes
        if self._max_held_bytes is not None and self.held_bytes > self._max_held_bytes:
            raise MemoryLimitError(
                f"patches that came before their turn take {format_bytes(self.held_bytes)}, more than "
                f"{format_bytes(self._max_held_bytes)}; give them in the order of the grid"
            )
        state.early[turn] = part._replace(voxels=part.voxels.clone())

    def _sum(self, state: _Tile, part: _Part, tile: Triple) -> None:
        state.done += 1
        is_first = state.sums is None
        if state.sums is None:
            low, high = self._tiling.bounds(tile)
            i, j, k = (b - a for a, b in zip(low, high, strict=True))
            state.sums = self._new_sums(part.voxels, (i, j, k))
            if len(state.turns) < self._tiling.awaited(tile):
                state.weights = torch.zeros((i, j, k), device=part.voxels.device)
            if part.voxels.shape != state.sums.shape:  # the part does not cover all of the tile
                state.sums.zero_()
                is_first = False
        target = state.sums[:, *part.place]
        if self._tiling.mode == "crop":
            target.copy_(part.voxels)  # no other patch gives these, and torch adds no uint16
        elif _is_compiled(target):
            u, v, w = (weight.numpy() for weight in part.weights)
            _compiled_add(target.numpy(), part.voxels.numpy(), u, v, w, is_first)
        elif is_first:
            torch.mul(part.voxels, part.product, out=target)
        else:
            target.addcmul_(part.voxels, part.product)
        if state.weights is not None:
            state.weights[part.place] += part.product

    def _new_sums(self, patch: torch.Tensor, shape: Triple) -> torch.Tensor:
        """Memory (C, I, J, K) of a tile's extent, in the order in which the patch's voxels lie in theirs."""
        extents, order = (len(patch), *shape), memory_order(patch)
        ordered = [extents[axis] for axis in order]
        nbytes = math.prod(extents) * patch.dtype.itemsize

        def make() -> torch.Tensor:
            if patch.device.type == "cpu":
                sums = torch.from_numpy(buffer_pool.new_pages(nbytes)).view(patch.dtype).view(ordered)
            else:
                sums = patch.new_empty(ordered)
            return sums.permute([order.index(axis) for axis in range(4)])

        return self._pool.take((*ordered, *order), nbytes, make)

    def _give_back(self, sums: torch.Tensor) -> None:
        order = memory_order(sums)
        self._pool.give_back((*(sums.shape[axis] for axis in order), *order), sums.nbytes, sums)

    def _hand_on(self, tile: Triple, voxels: torch.Tensor, weights: torch.Tensor | None) -> None:
        first, _ = self._tiling.bounds(tile)
        skipped = 0
        if weights is None:
            final = self._finalise(voxels)
        else:
            empty = weights == 0
            assert self._skipped is not None
            whole = empty | ~self._lacking(tile, self._skipped.patches).to(empty.device)
            exact = voxels if self._tiling.mode == "crop" else voxels / weights.masked_fill(whole, 1)
            final = self._finalise(exact)
            final = torch.where(empty, self._skipped.fill(_extent(voxels)).to(final.device), final)
            skipped = int(empty.sum())
        self._sink.put(first, final.cpu(), skipped=skipped)
        self._fill_shard(self._tiling.shard_of(tile))

    def _lacking(self, tile: Triple, skipped: Bools) -> torch.Tensor:
        """Where a skipped patch would have added to a tile, (i, j, k); elsewhere its weights sum to one."""
        axes = self._tiling.axes
        low, high = self._tiling.bounds(tile)
        found = torch.zeros([b - a for a, b in zip(low, high, strict=True)], dtype=torch.bool)
        touching = (axis.touching[n].tolist() for axis, n in zip(axes, tile, strict=True))
        for position in itertools.product(*touching):
            if skipped[position]:
                ends = zip(axes, position, low, strict=True)
                found[tuple(slice(max(x.first[n] - a, 0), x.stop[n] - a) for x, n, a in ends)] = True
        return found

    def _fill_shard(self, shard: Triple) -> None:
        """Hand on what no patch of a shard is run for, once."""
        if self._begun[shard]:
            return
        self._begun[shard] = True
        if self._skipped is None:
            return
        for tile in self._tiling.tiles_of(shard):
            if not self._turns(tile):
                low, high = self._tiling.bounds(tile)
                i, j, k = (b - a for a, b in zip(low, high, strict=True))
                self._sink.put(low, self._skipped.fill((i, j, k)), skipped=i * j * k)

    def finish(self) -> None:
        """Make sure that every patch came, and hand on what none is run for."""
        missing = self._awaited & ~self._seen
        if missing.any():
            i, j, k = (int(n) for n in np.unravel_index(missing.argmax(), missing.shape))
            first = self._tiling.grid.at((i, j, k))
            raise IncompleteCoverageError(
                f"{int(missing.sum())} of {int(self._awaited.sum())} patches are missing, the first one from "
                f"{first.index_ini} to {first.index_fin}; add every patch of the grid once"
            )
        for i, j, k in np.argwhere(self._wanted & ~self._begun).tolist():
            self._fill_shard((i, j, k))


def _extent(voxels: torch.Tensor) -> Triple:
    _, i, j, k = voxels.shape
    return i, j, k


def _is_compiled(sums: torch.Tensor) -> bool:
    return _compiled_add is not None and sums.dtype == torch.float32 and sums.device.type == "cpu"


def memory_order(voxels: torch.Tensor) -> list[int]:
    """The axes of some voxels, the one whose neighbours lie farthest apart first."""
    strides = voxels.stride()
    return sorted(range(voxels.ndim), key=lambda axis: -strides[axis])


class Blend(Protocol):
    """Takes in patches; ``channels`` is how many the first one had."""

    channels: int | None

    def size_of(self, location: PatchLocation) -> Triple:
        """Extent of a patch in the output."""

    def add(self, patch: torch.Tensor, location: PatchLocation) -> None:
        """Take in a patch (C, I, J, K)."""


def add_checked(blend: Blend, batch: torch.Tensor, locations: Sequence[PatchLocation]) -> None:
    """Add a batch once its length and the shapes of its patches fit the locations."""
    if not isinstance(batch, torch.Tensor) or batch.ndim != 5:
        got = tuple(batch.shape) if isinstance(batch, torch.Tensor) else type(batch).__name__
        raise ModelError(f"a batch must be a tensor (B, C, I, J, K), not {got}")
    if len(batch) != len(locations):
        raise ModelError(f"a batch of {len(batch)} patches came with {len(locations)} locations")
    batch = batch.detach()
    if blend.channels not in (None, batch.shape[1]):
        raise ModelError(f"a batch has {batch.shape[1]} channels where those before had {blend.channels}")
    blend.channels = batch.shape[1]
    for patch, location in zip(batch, locations, strict=True):
        size = blend.size_of(location)
        blend.add(_fitted(patch, size, location), location)


def _fitted(patch: torch.Tensor, size: Triple, location: PatchLocation) -> torch.Tensor:
    """The patch at exactly its size in the output, which rounding may make one voxel more or less."""
    got = tuple(patch.shape[1:])
    if got == size:
        return patch
    if size == location.size or any(abs(a - b) > 1 for a, b in zip(got, size, strict=True)):
        raise ModelError(
            f"the patch at {location.index} is {got} where the output has room for {size}; "
            f"the network must keep the patch's shape, or output_shape= must say how it scales"
        )
    for axis, length in enumerate(size, start=1):
        nearest = torch.arange(length, device=patch.device).clamp(max=patch.shape[axis] - 1)
        patch = patch.index_select(axis, nearest)
    return patch
