"""Voxels drawn with probability proportional to their mass, without reading the whole map of masses.

Draw a chunk by the sums of the index, read that one chunk, draw a voxel in it by its mass: this is exact for
a volume of any size. A centre must also be where the whole patch fits. Centres outside that box are rejected
and drawn again, which leaves exactly the conditional distribution (rejection sampling; von Neumann, 1951).
After many rejections in a row the mass inside the box is counted instead, once, and drawn from directly. The
counted mass is kept, but each draw starts with rejections again: it depends on its generator alone, and not
on the draws before it.

On a resampled map a voxel of the map that it was made of is drawn, and a uniform point inside it; the centre
is the resampled voxel that contains the point, if the resampled map has mass there. So the probability of a
resampled voxel is proportional to the mass inside its volume.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zpatch.errors import SamplingError
from zpatch.geometry.boxes import PatchLocation, Voxels
from zpatch.store.voxel_index import ChunkGrid, MassTable

MAX_REJECTIONS = 32
MAX_ROUNDS = 4096  # of rejections, until nothing is thought to be there to be drawn
MIN_INTERIOR_SHARE = 0.05
READ_VOXELS = 2**22  # of a map at a time

Masses = NDArray[Any]
ReadChunks = Callable[[Sequence[PatchLocation]], Sequence[Voxels]]
MassesOf = Callable[[Voxels], Masses]


class AllowedMass:
    """The mass of one class, or of a whole map, in the box of ``allowed`` centres.

    ``table`` has the mass of each chunk of ``grid``; with ``is_counted``, only the mass inside the box.
    ``masses_of`` gives the masses (I, J, K) of a chunk's voxels: numbers, or booleans for equal masses.
    It is made once for a map and a box, and no draw changes it.
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
        """Whether there is no mass to draw from, as far as is known."""
        return not self._cumulative.size or not self._cumulative[-1] > 0

    def pick_chunks(self, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Numbers of chunks (count,), drawn by their mass."""
        entries = np.searchsorted(self._cumulative, rng.random(count) * self._cumulative[-1], side="right")
        chunks: NDArray[np.int64] = self._table.chunk_id[np.minimum(entries, len(self._cumulative) - 1)]
        return chunks

    def draw_in(
        self, chunk: int, voxels: Voxels, count: int, rng: np.random.Generator
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Voxels (count, 3) of a chunk, drawn by their masses, and which of them (count,) are allowed."""
        box = self.grid.box(chunk)
        masses, corner = self._masses_in(box, voxels), np.array(box.index)
        if self.is_exact:
            masses, corner = self._inside(masses, box), np.maximum(corner, self._allowed.index_ini)
        if not masses.any():
            raise SamplingError(
                f"the index of the map has mass in {box}, and the map itself has none there; "
                f"run 'zpatch verify' on the store"
            )
        drawn = corner + _draw_voxels(masses, count, rng)
        allowed = (drawn >= self._allowed.index_ini) & (drawn < self._allowed.index_fin)
        return drawn, np.asarray(allowed.all(axis=1))

    def _masses_in(self, box: PatchLocation, voxels: Voxels) -> Masses:
        """The masses (I, J, K) of a chunk's voxels."""
        return self._masses_of(voxels)

    def counted(self, read: ReadChunks) -> AllowedMass:
        """The mass inside the box alone; the first call reads the chunks that the border of the box cuts."""
        if self.is_exact:
            return self
        if self._counted is None:
            self._counted = self._count(read)
        return self._counted

    def _count(self, read: ReadChunks) -> AllowedMass:
        mass = self._table.mass.copy()
        cut = np.flatnonzero(~self._whole)
        voxels_of = _read_in_turn(self.grid, self._table.chunk_id[cut].tolist(), read)
        for entry, (chunk, voxels) in zip(cut, voxels_of, strict=True):
            mass[entry] = self._inside(self._masses_of(voxels), self.grid.box(chunk)).sum(dtype=np.float64)
        table = MassTable(self._table.chunk_id, mass).select(mass > 0)
        return AllowedMass(table, self.grid, self._allowed, self._masses_of, is_counted=True)

    def _inside(self, masses: Masses, box: PatchLocation) -> Masses:
        """The part of a chunk's masses in the allowed box."""
        ends = zip(box.index, box.size, self._allowed.index_ini, self._allowed.index_fin, strict=True)
        return masses[tuple(slice(max(a - f, 0), max(min(b - f, n), 0)) for f, n, a, b in ends)]


def draw_centres(
    parts: Sequence[tuple[AllowedMass, int]], read: ReadChunks, rng: np.random.Generator
) -> list[NDArray[np.int64] | None]:
    """Draw a number of allowed voxels of each part by their mass; all parts are of one map.

    ``read`` gives the voxels (C, I, J, K) of some chunks; a chunk that several parts need is read once.
    Returns the voxels (count, 3) of each part, or None for a part without an allowed voxel of any mass.
    """
    masses = [mass for mass, _ in parts]
    centres = [np.empty((count, 3), dtype=np.int64) for _, count in parts]
    pending = [np.arange(count) for _, count in parts]  # the rows of centres that are not drawn yet
    for attempt in range(MAX_ROUNDS):
        for n, mass in enumerate(masses):
            if pending[n].size and (attempt == MAX_REJECTIONS or mass.is_hopeless):
                masses[n] = mass.counted(read)
            if masses[n].is_empty:
                pending[n] = pending[n][:0]
        if not any(rows.size for rows in pending):
            break
        pending = _draw_round(masses, centres, pending, read, rng)
    return [
        None if mass.is_empty or rows.size else drawn
        for mass, rows, drawn in zip(masses, pending, centres, strict=True)
    ]


def _draw_round(
    masses: Sequence[AllowedMass],
    centres: Sequence[NDArray[np.int64]],
    pending: Sequence[NDArray[np.int64]],
    read: ReadChunks,
    rng: np.random.Generator,
) -> list[NDArray[np.int64]]:
    """Draw each pending row of ``centres`` once; the rows whose voxel is not allowed, to be drawn again."""
    parts_in: defaultdict[int, list[tuple[int, NDArray[np.int64]]]] = defaultdict(list)
    for part, (mass, rows) in enumerate(zip(masses, pending, strict=True)):
        if rows.size:
            for chunk, its_rows in _by_chunk(mass.pick_chunks(rows.size, rng), rows):
                parts_in[chunk].append((part, its_rows))
    rejected = [[rows[:0]] for rows in pending]
    for chunk, voxels in _read_in_turn(masses[0].grid, sorted(parts_in), read):
        for part, rows in parts_in[chunk]:
            drawn, allowed = masses[part].draw_in(chunk, voxels, rows.size, rng)
            centres[part][rows[allowed]] = drawn[allowed]
            rejected[part].append(rows[~allowed])
    return [np.concatenate(rows) for rows in rejected]


def _by_chunk(chunks: NDArray[np.int64], rows: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Each chunk in order, with the rows that it was picked for."""
    order = np.argsort(chunks, kind="stable")
    picked, first = np.unique(chunks[order], return_index=True)
    return zip(picked.tolist(), np.split(rows[order], first[1:]), strict=True)


def _read_in_turn(grid: ChunkGrid, chunks: Sequence[int], read: ReadChunks) -> Iterator[tuple[int, Voxels]]:
    """Chunks with their voxels, some millions of voxels in memory at a time."""
    together = max(1, READ_VOXELS // math.prod(grid.chunk_shape))
    for first in range(0, len(chunks), together):
        some = chunks[first : first + together]
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
