"""A level of a file as a grid of tiles, each of which is decoded by itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zpatch.chunks.file_mark import FileMark
from zpatch.errors import DamageError
from zpatch.geometry.boxes import Voxels

Four = tuple[int, int, int, int]
Decoder = Callable[[Four, Voxels], Voxels | None]


class DamagedTileError(DamageError):
    """A tile that is cut short, or that its codec cannot decode."""


@dataclass(frozen=True, slots=True, eq=False)
class TiledLevel(ABC):
    """Pixels that are decoded tile by tile.

    Attributes:
        path: Their file.
        mark: The file as it was when it was opened.
        shape: Extent (C, I, J, K): channels, x, y, planes.
        tile: Extent of a tile along the same axes; tiles at the end reach over the border.
        dtype: Type of the pixels, in native byte order.
    """

    path: Path
    mark: FileMark
    shape: Four
    tile: Four
    dtype: np.dtype[Any]

    @abstractmethod
    def decoder(self) -> Decoder:
        """The function that decodes tiles, for this process; several threads may call it.

        It takes the place (c, i, j, k) of a tile in the grid, and gives its pixels (k, j, i, c) in the extent
        of a tile. They may be in the memory that it takes too, of that shape and C-contiguous, where the
        codec can decode into it. None is a tile that was never written, whose pixels are 0. Raises
        DamagedTileError.
        """

    def mapped(self) -> Voxels | None:
        """All pixels (C, I, J, K), memory-mapped, where they lie in the file as they are; else None."""
        return None


def damaged_tile(path: Path, place: Four, problem: str) -> DamagedTileError:
    """The error for a tile."""
    c, i, j, k = place
    more = (f", plane {k}" if k else "") + (f", channel {c}" if c else "")
    return DamagedTileError(
        f"damaged: {path}: the tile in column {i}, row {j}{more} {problem}; restore the file from a copy"
    )
