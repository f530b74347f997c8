"""Centres on a resampled map, drawn by the mass of the map that it was resampled from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zpatch.geometry.affines import Affine
from zpatch.geometry.boxes import PatchLocation, Voxels
from zpatch.images.image import Image
from zpatch.sampling.centre_draws import AllowedMass, Masses, MassesOf, ReadChunks
from zpatch.sources.resampled_source import ResampledSource
from zpatch.store.voxel_index import ChunkGrid, MassTable

TOUCHING = 1e-6  # voxels: volumes that share less do not overlap


class ResampledMap:
    """A map that was resampled from ``root``, by ``sources``: its own first, then those on the way there.

    ``to_root`` is voxel of it to voxel of the root, 4 x 4.
    """

    def __init__(self, image: Image, root: Image, sources: Sequence[ResampledSource]) -> None:
        self.image = image
        self.root = root
        self.to_root: Affine = np.eye(4)
        for source in sources:
            self.to_root = source.matrix @ self.to_root
        self.from_root: Affine = np.linalg.inv(self.to_root).astype(np.float64)
        self._sources = sources
        self._picks = all(source.interpolation.mode == "nearest" for source in sources)

    def box_in_root(self, box: PatchLocation) -> PatchLocation:
        """The voxels of the root that a box overlaps, clipped to the root."""
        return _box_around(box, self.to_root).clipped(self.root.spatial_shape)

    def box_of_root(self, box: PatchLocation) -> PatchLocation:
        """The resampled voxels that a box of the root overlaps; they may be outside."""
        return _box_around(box, self.from_root)

    def voxels_at(self, points: NDArray[np.float64]) -> NDArray[np.int64]:
        """The resampled voxels (n, 3) that contain points (n, 3) of the root."""
        return np.asarray(np.floor(_moved(points, self.from_root) + 0.5), dtype=np.int64)

    def have_mass(
        self, voxels: NDArray[np.int64], masses_of: MassesOf, chunk: PatchLocation, masses: Masses
    ) -> NDArray[np.bool_]:
        """Which of some voxels (n, 3) have mass.

        ``masses`` (I, J, K) are those of a chunk of the root, in which most of them were picked.
        """
        if not self._picks:
            return self._read(self.image, voxels, masses_of)
        picked = self._picked(voxels) - np.array(chunk.index)
        inside = ((picked >= 0) & (picked < np.array(chunk.size))).all(axis=1)
        found = np.zeros(len(voxels), dtype=bool)
        i, j, k = picked[inside].T
        found[inside] = masses[i, j, k] > 0
        found[~inside] = self._read(self.root, picked[~inside] + np.array(chunk.index), masses_of)
        return found

    def _picked(self, voxels: NDArray[np.int64]) -> NDArray[np.int64]:
        """The voxels of the root that are picked for resampled voxels."""
        for source in self._sources:
            nearest = np.floor(_moved(voxels, source.matrix) + 0.5)
            voxels = np.clip(nearest, 0, np.array(source.source.shape[1:]) - 1).astype(np.int64)
        return voxels

    def _read(self, image: Image, voxels: NDArray[np.int64], masses_of: MassesOf) -> NDArray[np.bool_]:
        boxes = [PatchLocation((i, j, k), (1, 1, 1)) for i, j, k in voxels.tolist()]
        return np.array([bool(masses_of(found).any()) for found in image.read_group(boxes)], dtype=bool)


class ResampledMass(AllowedMass):
    """The mass of one class, or of all weights, in a box of ``allowed`` centres of a resampled map.

    ``table``, ``grid`` and ``masses_of`` are those of the root. A point is drawn inside a voxel of the root;
    it is rejected unless the resampled voxel that contains it is allowed and has mass itself.
    """

    def __init__(
        self,
        table: MassTable,
        grid: ChunkGrid,
        allowed: PatchLocation,
        masses_of: MassesOf,
        resampled: ResampledMap,
        *,
        is_counted: bool = False,
    ) -> None:
        super().__init__(table, grid, resampled.box_in_root(allowed), masses_of, is_counted=is_counted)
        self.is_hopeless = False  # to count is to read all chunks: it is only done after many rejections
        self._resampled = resampled
        self._centres = allowed
        self._is_counted = is_counted

    def draw_in(
        self, chunk: int, voxels: Voxels, count: int, rng: np.random.Generator
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Resampled voxels (count, 3) around points of a chunk, and which of them (count,) are allowed."""
        drawn, found = super().draw_in(chunk, voxels, count, rng)
        masses = self._masses_of(voxels)
        centres = self._resampled.voxels_at(drawn + rng.random(drawn.shape) - 0.5)
        inside = (centres >= self._centres.index_ini) & (centres < self._centres.index_fin)
        found &= inside.all(axis=1)
        box = self.grid.box(chunk)
        found[found] = self._resampled.have_mass(centres[found], self._masses_of, box, masses)
        return centres, found

    def counted(self, read: ReadChunks) -> AllowedMass:
        """The mass of voxels that overlap an allowed centre with mass; the first call reads all chunks."""
        if self._is_counted:
            return self
        if self._counted is None:
            masses = np.zeros(len(self._table.chunk_id))
            for entry, chunk in enumerate(self._table.chunk_id.tolist()):
                box = self.grid.box(chunk)
                [voxels] = read([box])
                found = self._inside(self._masses_of(voxels) * self._overlapping(box), box)
                masses[entry] = found.sum(dtype=np.float64)
            table = MassTable(self._table.chunk_id, masses).select(masses > 0)
            self._counted = ResampledMass(
                table, self.grid, self._centres, self._masses_of, self._resampled, is_counted=True
            )
        return self._counted

    def _masses_in(self, box: PatchLocation, voxels: Voxels) -> Masses:
        masses = self._masses_of(voxels)
        return np.asarray(masses * self._overlapping(box)) if self._is_counted else masses

    def _overlapping(self, box: PatchLocation) -> NDArray[np.bool_]:
        """Which voxels (I, J, K) of a box of the root may overlap an allowed centre that has mass."""
        found = np.zeros(box.size, dtype=bool)
        near = self._resampled.box_of_root(box)
        ends = zip(near.index, near.index_fin, self._centres.index, self._centres.index_fin, strict=True)
        low, high = zip(*((max(a, c), min(b, d)) for a, b, c, d in ends), strict=True)
        if any(b <= a for a, b in zip(low, high, strict=True)):
            return found
        [voxels] = self._resampled.image.read_group([PatchLocation.between(low, high)])
        centres = np.argwhere(self._masses_of(voxels)) + np.array(low)
        matrix = self._resampled.to_root
        middle = _moved(centres, matrix)
        half = np.abs(matrix[:3, :3]).sum(axis=1) / 2 - TOUCHING
        first = np.floor(middle - half + 0.5).astype(np.int64) - np.array(box.index)
        last = np.floor(middle + half + 0.5).astype(np.int64) - np.array(box.index)
        for step in np.ndindex(*((last - first).max(axis=0) + 1 if len(centres) else (0, 0, 0))):
            at = first + step
            inside = (at <= last) & (at >= 0) & (at < np.array(box.size))
            i, j, k = at[inside.all(axis=1)].T
            found[i, j, k] = True
        return found


def _box_around(box: PatchLocation, matrix: Affine) -> PatchLocation:
    """The voxels of another grid that a box overlaps; ``matrix`` is voxel of its grid to voxel of that."""
    ends = zip(box.index_ini, box.index_fin, strict=True)
    corners = np.array(np.meshgrid(*([a - 0.5, b - 0.5] for a, b in ends))).reshape(3, -1)
    places = matrix[:3, :3] @ corners + matrix[:3, 3:]
    low = np.floor(places.min(axis=1) + 0.5 + TOUCHING)
    high = np.ceil(places.max(axis=1) + 0.5 - TOUCHING)
    return PatchLocation.between(low.tolist(), high.tolist())


def _moved(points: NDArray[Any], matrix: Affine) -> NDArray[np.float64]:
    """Points (n, 3) of one grid in another. Rounded as the places of an axis are: without matmul."""
    columns = [points[:, n, None] * matrix[:3, n] for n in range(3)]
    return np.asarray(columns[0] + columns[1] + columns[2] + matrix[:3, 3])
