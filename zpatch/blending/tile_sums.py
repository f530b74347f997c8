"""The sums of one tile: the parts of its contributors are added by rank, in the compiled loop or in torch."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

import torch

from zpatch.geometry.boxes import Triple
from zpatch.runtime import buffer_pool
from zpatch.tiling.volume_tiles import Share, Tile

try:
    from zpatch.blending._blend import add as _compiled_add
except ImportError:  # zpatch was installed without a compiler
    _compiled_add = None  # type: ignore[assignment]


class Part(NamedTuple):
    """The voxels (C, i, j, k) that a patch adds to a tile, and its share in the tile."""

    voxels: torch.Tensor
    share: Share

    @property
    def weights(self) -> torch.Tensor:
        """The weights of the voxels, (i, j, k), in the same order in memory."""
        order = memory_order(self.voxels[0])
        slow, middle, fast = (
            torch.from_numpy(self.share.weights[axis]).to(self.voxels.device) for axis in order
        )
        return (slow[:, None, None] * middle[:, None] * fast).permute(
            [order.index(axis) for axis in range(3)]
        )


class SumsMemory:
    """The memory of tiles' sums, reused for the next tile of the same shape."""

    def __init__(self) -> None:
        self._pool: buffer_pool.Pool[torch.Tensor] = buffer_pool.Pool()

    def take(self, like: torch.Tensor, shape: Triple) -> torch.Tensor:
        """Memory (C, I, J, K) of a tile's extent, in the same order in memory as the voxels ``like`` it."""
        extents, order = (len(like), *shape), memory_order(like)
        ordered = [extents[axis] for axis in order]
        nbytes = math.prod(extents) * like.dtype.itemsize

        def make() -> torch.Tensor:
            if like.device.type == "cpu":
                sums = torch.from_numpy(buffer_pool.new_pages(nbytes)).view(like.dtype).view(ordered)
            else:
                sums = like.new_empty(ordered)
            return sums.permute([order.index(axis) for axis in range(4)])

        return self._pool.take((*ordered, *order), nbytes, make)

    def give_back(self, sums: torch.Tensor) -> None:
        """Return the memory that ``take`` gave."""
        order = memory_order(sums)
        self._pool.give_back((*(sums.shape[axis] for axis in order), *order), sums.nbytes, sums)


class TileSums:
    """The weighted sums (C, i, j, k) of one tile.

    ``pending`` are the ranks of the contributors that are to be added, in order. Parts that arrive before
    their turn wait. Where some contributors are never added, the sums of the ``weights`` are kept as well.
    """

    __slots__ = ("_early", "_memory", "_mode", "_pending", "_tile", "voxels", "weights")

    def __init__(self, tile: Tile, pending: Iterable[int], mode: str, memory: SumsMemory) -> None:
        self.voxels: torch.Tensor | None = None
        self.weights: torch.Tensor | None = None
        self._tile = tile
        self._pending = deque(pending)
        self._early: dict[int, Part] = {}
        self._mode = mode
        self._memory = memory

    @property
    def next_rank(self) -> int:
        """The rank of the contributor that is added next."""
        return self._pending[0]

    @property
    def is_final(self) -> bool:
        """Whether all contributors are added."""
        return not self._pending

    def keep(self, part: Part) -> None:
        """Keep a copy of a part until those of lower rank are added."""
        self._early[part.share.rank] = part._replace(voxels=part.voxels.clone())

    def pop_next(self) -> Part | None:
        """The part that is added next, if it is kept."""
        return self._early.pop(self._pending[0], None) if self._pending else None

    def add(self, part: Part) -> None:
        """Add the part of rank ``next_rank``."""
        is_first = self.voxels is None
        if self.voxels is None:
            self.voxels = self._memory.take(part.voxels, self._tile.shape)
            if len(self._pending) < self._tile.contributors:
                self.weights = torch.zeros(self._tile.shape, device=part.voxels.device)
            if part.voxels.shape != self.voxels.shape:  # the part does not cover all of the tile
                self.voxels.zero_()
                is_first = False
        self._pending.popleft()
        self._add_voxels(self.voxels[:, *part.share.in_tile], part, is_first)
        if self.weights is not None:
            self.weights[part.share.in_tile] += part.weights

    def _add_voxels(self, sums: torch.Tensor, part: Part, is_first: bool) -> None:
        if self._mode == "crop":
            sums.copy_(part.voxels)  # no other patch gives these, and torch adds no uint16
        elif _compiled_add is not None and sums.dtype == torch.float32 and sums.device.type == "cpu":
            _compiled_add(sums.numpy(), part.voxels.numpy(), *part.share.weights, is_first)
        elif is_first:
            torch.mul(part.voxels, part.weights, out=sums)
        else:
            sums.addcmul_(part.voxels, part.weights)


def memory_order(voxels: torch.Tensor) -> list[int]:
    """The axes of some voxels, the one with the largest stride first."""
    strides = voxels.stride()
    return sorted(range(voxels.ndim), key=lambda axis: -strides[axis])
