"""Voxels drawn with probability proportional to their mass, without reading the map that holds it.

Draw a chunk by the index's sums, read that one chunk, draw a voxel in it by its masses: exact, whatever the
volume's size. A centre must also lie where the whole patch fits. Centres outside that box are rejected and
drawn again, which leaves exactly the conditional distribution; after many rejections in a row the part of
the sums inside the box is counted instead, once, and drawn from directly. What has been counted is kept, but
each draw goes the whole way: it depends on its generator alone, and not on the draws before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zpatch.errors import SamplingError
from zpatch.geometry.boxes import PatchLocation, Voxels
from zpatch.store.voxel_index import ChunkGrid, MassTable

MAX_REJECTIONS = 32
MIN_INTERIOR_SHARE = 0.05
READ_VOXELS = 2**22  # of a map at a time

Masses = NDArray[Any]
ReadChunks = Callable[[Sequence[PatchLocation]], Sequence[Voxels]]
MassesOf = Callable[[Voxels], Masses]


class AllowedMass:
    """The mass of one class, or of a whole map, as far as the centres of patches reach.

    ``masses_of`` makes masses (I, J, K) of a chunk's voxels: numbers, or booleans for voxels that are alike.
    It is made once for a map and a box of ``allowed`` centres, drawn from often, and changed by no draw.
    ``is_counted`` says that the masses of ``table`` are those inside the box.
    """

    def __init__(
        self,
        table: MassTable,
        grid: ChunkGrid,
        allowed: PatchLocation,
        masses_of: MassesOf,
        *,
        is_counted: bool = False,
    ) -> None:
        first = grid.origins(table.chunk_id)
        stop = np.minimum(first + grid.chunk_shape, grid.spatial_shape)
        touched = ((first < allowed.index_fin) & (stop > allowed.index_ini)).all(axis=1)
        whole = ((first >= allowed.index_ini) & (stop <= allowed.index_fin)).all(axis=1)
        self.grid = grid
        self._allowed = allowed
        self._masses_of = masses_of
        self._whole = whole[touched]
        self._table = table.select(touched)
        self._cumulative = np.cumsum(self._table.mass)
        self._counted: AllowedMass | None = None
        self.is_exact = is_counted or bool(self._whole.all())
        inside = float((self._table.mass * self._whole).sum())
        self.is_hopeless = inside < MIN_INTERIOR_SHARE * self._table.mass.sum()

    @property
    def is_empty(self) -> bool:
        """Whether nothing can be drawn, as far as is known."""
        return not self._cumulative.size or not self._cumulative[-1] > 0

    def pick_chunks(self, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Chunks by their mass, (count,)."""
        entries = np.searchsorted(self._cumulative, rng.random(count) * self._cumulative[-1], side="right")
        chunks: NDArray[np.int64] = self._table.chunk_id[np.minimum(entries, len(self._cumulative) - 1)]
        return chunks

    def draw_in(
        self, chunk: int, voxels: Voxels, count: int, rng: np.random.Generator
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Voxels (count, 3) of a chunk by their masses, and which of them are allowed."""
        box = self.grid.box(chunk)
        masses, corner = self._masses_of(voxels), np.array(box.index)
        if self.is_exact:
            masses, corner = self._inside(masses, box), np.maximum(corner, self._allowed.index_ini)
        if not masses.any():
            raise SamplingError(
                f"the index of the map says that {box} has voxels to draw, and it has none; "
                f"run 'zpatch verify' on the store"
            )
        drawn = corner + _draw_voxels(masses, count, rng)
        allowed = (drawn >= self._allowed.index_ini) & (drawn < self._allowed.index_fin)
        return drawn, np.asarray(allowed.all(axis=1))

    def counted(self, read: ReadChunks) -> AllowedMass:
        """The same reach by the mass inside alone; the first time, chunks that the border cuts are read."""
        if self.is_exact:
            return self
        if self._counted is None:
            self._counted = self._count(read)
        return self._counted

    def _count(self, read: ReadChunks) -> AllowedMass:
        mass = self._table.mass.copy()
        cut = np.flatnonzero(~self._whole)
        voxels_of = _read_in_turn(self.grid, self._table.chunk_id[cut], read)
        for entry, (chunk, voxels) in zip(cut, voxels_of, strict=True):
            mass[entry] = self._inside(self._masses_of(voxels), self.grid.box(chunk)).sum(dtype=np.float64)
        table = MassTable(self._table.chunk_id, mass).select(mass > 0)
        return AllowedMass(table, self.grid, self._allowed, self._masses_of, is_counted=True)

    def _inside(self, masses: Masses, box: PatchLocation) -> Masses:
        """The part of a chunk's masses that lies in the allowed box."""
        ends = zip(box.index, box.size, self._allowed.index_ini, self._allowed.index_fin, strict=True)
        return masses[tuple(slice(max(a - f, 0), max(min(b - f, n), 0)) for f, n, a, b in ends)]


def draw_centres(
    parts: Sequence[tuple[AllowedMass, int]], read: ReadChunks, rng: np.random.Generator
) -> list[NDArray[np.int64] | None]:
    """So many allowed voxels of each reach, all of one map, by their mass; chunks are read once for all.

    ``read`` gives the voxels (C, I, J, K) of some chunks. Of each reach come (count, 3), or None where no
    allowed voxel has any mass.
    """
    reaches = [reach for reach, _ in parts]
    centres = [np.empty((count, 3), dtype=np.int64) for _, count in parts]
    pending = [np.arange(count) for _, count in parts]
    for attempt in range(MAX_REJECTIONS + 1):
        for n, reach in enumerate(reaches):
            if pending[n].size and (attempt == MAX_REJECTIONS or reach.is_hopeless):
                reaches[n] = reach.counted(read)
            if reaches[n].is_empty:
                pending[n] = pending[n][:0]
        if not any(left.size for left in pending):
            break
        _draw_round(reaches, centres, pending, read, rng)
    return [None if reach.is_empty else found for reach, found in zip(reaches, centres, strict=True)]


def _draw_round(
    reaches: Sequence[AllowedMass],
    centres: list[NDArray[np.int64]],
    pending: list[NDArray[np.int64]],
    read: ReadChunks,
    rng: np.random.Generator,
) -> None:
    """Draw once for all that is pending; what is rejected stays so."""
    picks = [
        reach.pick_chunks(left.size, rng) if left.size else left
        for reach, left in zip(reaches, pending, strict=True)
    ]
    chunks, wanted = np.concatenate(picks), np.concatenate(pending)
    owners = np.repeat(np.arange(len(reaches)), [left.size for left in pending])
    order = np.lexsort((owners, chunks))
    chunks, owners, wanted = chunks[order], owners[order], wanted[order]
    borders = np.flatnonzero(np.diff(chunks) | np.diff(owners)) + 1
    rejected: list[list[NDArray[np.int64]]] = [[left[:0]] for left in pending]
    voxels_of = _read_in_turn(reaches[0].grid, np.unique(chunks), read)
    chunk, voxels = next(voxels_of)
    for owner, mine, of in zip(
        owners[[0, *borders]].tolist(),
        np.split(wanted, borders),
        chunks[[0, *borders]].tolist(),
        strict=True,
    ):
        while chunk != of:
            chunk, voxels = next(voxels_of)
        drawn, allowed = reaches[owner].draw_in(chunk, voxels, mine.size, rng)
        centres[owner][mine[allowed]] = drawn[allowed]
        rejected[owner].append(mine[~allowed])
    pending[:] = [np.concatenate(left) for left in rejected]


def _read_in_turn(
    grid: ChunkGrid, chunks: NDArray[np.int64], read: ReadChunks
) -> Iterator[tuple[int, Voxels]]:
    """Chunks with their voxels, some millions of voxels in memory at a time."""
    together = max(1, READ_VOXELS // math.prod(grid.chunk_shape))
    for first in range(0, len(chunks), together):
        some = chunks[first : first + together].tolist()
        yield from zip(some, read([grid.box(chunk) for chunk in some]), strict=True)


def _draw_voxels(masses: Masses, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    flat = masses.T.reshape(-1)
    if flat.dtype == np.bool_:
        hits = np.flatnonzero(flat)
        chosen = hits[rng.integers(0, len(hits), count)]
    else:
        cumulative = np.cumsum(flat, dtype=np.float64)
        chosen = np.searchsorted(cumulative, rng.random(count) * cumulative[-1], side="right")
        chosen = np.minimum(chosen, np.flatnonzero(flat)[-1])
    k, j, i = np.unravel_index(chosen, masses.T.shape)
    return np.stack([i, j, k], axis=1)
