"""The sums of one tile: the parts of its contributors are added by rank, in the compiled loop or in torch.

The parts of a patch are added to all its tiles at once. A tile has short pieces of the patch's lines, so to
add them tile by tile would pass over the memory of the patch many times.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from zpatch.geometry.boxes import Triple
from zpatch.runtime import buffer_pool
from zpatch.tiling.volume_tiles import Share, Tile

try:
    from zpatch.blending._blend import add as _compiled_add
except ImportError:  # zpatch was installed without a compiler
    _compiled_add = None  # type: ignore[assignment]


Voxels = torch.Tensor | NDArray[Any]  # arrays in this process's memory: their views cost little


def as_tensor(voxels: Voxels) -> torch.Tensor:
    """The same memory as a tensor."""
    return voxels if isinstance(voxels, torch.Tensor) else torch.from_numpy(voxels)


class Part(NamedTuple):
    """The voxels (C, i, j, k) that a patch adds to a tile, and its share in the tile."""

    voxels: Voxels
    share: Share

    @property
    def weights(self) -> torch.Tensor:
        """The weights of the voxels, (i, j, k), in the same order in memory."""
        order, device = memory_order(self.voxels[0]), as_tensor(self.voxels).device
        slow, middle, fast = (torch.from_numpy(self.share.weights[axis]).to(device) for axis in order)
        return (slow[:, None, None] * middle[:, None] * fast).permute(
            [order.index(axis) for axis in range(3)]
        )


class Addition(NamedTuple):
    """A part, and the sums (C, i, j, k) that it is added to; the first part overwrites them."""

    sums: Voxels
    part: Part
    is_first: bool


def add_all(additions: Sequence[Addition], mode: str) -> None:
    """Do the additions of a patch, in ``mode``, one of ``windows.OVERLAP_MODES``."""
    if mode != "crop" and _compiled_add is not None and all(_is_compiled(a.sums) for a in additions):
        _compiled_add([(a.sums, a.part.voxels, *a.part.share.weights, a.is_first) for a in additions])
        return
    for sums, part, is_first in additions:
        if mode == "crop":
            as_tensor(sums).copy_(as_tensor(part.voxels))  # no other patch gives these
        elif is_first:
            torch.mul(as_tensor(part.voxels), part.weights, out=as_tensor(sums))
        else:
            as_tensor(sums).addcmul_(as_tensor(part.voxels), part.weights)


def _is_compiled(sums: Voxels) -> bool:
    return isinstance(sums, np.ndarray) and sums.dtype == np.float32


class SumsMemory:
    """The memory of tiles' sums, reused for the next tile of the same shape."""

    def __init__(self) -> None:
        self._pool: buffer_pool.Pool[Voxels] = buffer_pool.Pool()

    def take(self, like: Voxels, shape: Triple) -> Voxels:
        """Memory (C, I, J, K) of a tile's extent, in the same order in memory as the voxels ``like`` it."""
        extents, order = (len(like), *shape), memory_order(like)
        ordered = [extents[axis] for axis in order]
        places = [order.index(axis) for axis in range(4)]
        nbytes = math.prod(extents) * like.dtype.itemsize

        def make() -> Voxels:
            if isinstance(like, torch.Tensor):
                return like.new_empty(ordered).permute(places)
            return np.frombuffer(buffer_pool.new_pages(nbytes), like.dtype).reshape(ordered).transpose(places)

        return self._pool.take((*ordered, *order), nbytes, make)

    def give_back(self, sums: Voxels) -> None:
        """Return the memory that ``take`` gave."""
        order = memory_order(sums)
        self._pool.give_back((*(sums.shape[axis] for axis in order), *order), sums.nbytes, sums)


class TileSums:
    """The weighted sums (C, i, j, k) of one ``tile``.

    ``pending`` are the ranks of the contributors that are to be added, in order. Parts that arrive before
    their turn wait. Where some contributors are never added, the sums of the ``weights`` are kept as well.
    """

    __slots__ = ("_early", "_memory", "_pending", "tile", "voxels", "weights")

    def __init__(self, tile: Tile, pending: Iterable[int], memory: SumsMemory) -> None:
        self.tile = tile
        self.voxels: Voxels | None = None
        self.weights: torch.Tensor | None = None
        self._pending = list(pending)[::-1]
        self._early: dict[int, Part] = {}
        self._memory = memory

    @property
    def next_rank(self) -> int:
        """The rank of the contributor that is added next."""
        return self._pending[-1]

    @property
    def is_final(self) -> bool:
        """Whether all contributors are added."""
        return not self._pending

    def keep(self, part: Part) -> None:
        """Keep a copy of a part until those of lower rank are added."""
        copied = as_tensor(part.voxels).clone()
        self._early[part.share.rank] = part._replace(voxels=like_patch(copied))

    def pop_next(self) -> Part | None:
        """The part that is added next, if it is kept."""
        return self._early.pop(self.next_rank, None) if self._pending else None

    def addition(self, part: Part) -> Addition:
        """How the part of rank ``next_rank`` is added, which the caller does before any other."""
        is_first, is_whole = self.voxels is None, part.voxels.shape[1:] == self.tile.shape
        if self.voxels is None:
            self.voxels = self._memory.take(part.voxels, self.tile.shape)
            if len(self._pending) < self.tile.contributors:
                self.weights = torch.zeros(self.tile.shape, device=as_tensor(part.voxels).device)
            if not is_whole:
                self.voxels[...] = 0
                is_first = False
        self._pending.pop()
        if self.weights is not None:
            self.weights[part.share.in_tile] += part.weights
        return Addition(self.voxels if is_whole else self.voxels[:, *part.share.in_tile], part, is_first)


def like_patch(patch: torch.Tensor) -> Voxels:
    """A patch as its parts are taken from it: an array, unless it is in the memory of another device."""
    return patch.numpy() if patch.device.type == "cpu" else patch


def memory_order(voxels: Voxels) -> list[int]:
    """The axes of some voxels, the one with the largest stride first."""
    strides = voxels.stride() if isinstance(voxels, torch.Tensor) else voxels.strides
    return sorted(range(voxels.ndim), key=lambda axis: -strides[axis])
