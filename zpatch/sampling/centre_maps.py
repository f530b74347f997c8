"""Label maps and sampling maps that centres are drawn from: their image, their index, their mass by chunk.

What a draw has found out about a map is kept for the next draw: for stored images, of the most recent maps of
this process; for other images, as long as the image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from zpatch.errors import NothingToDrawError, SamplingError
from zpatch.geometry.boxes import PatchLocation, Voxels
from zpatch.images.image import Image
from zpatch.runtime.recent import Recent
from zpatch.sampling.centre_draws import AllowedMass, MassesOf
from zpatch.sampling.resampled_draws import ResampledMap, ResampledMass
from zpatch.store.voxel_index import (
    ChunkGrid,
    MassTable,
    check_weights,
    read_label_table,
    read_weight_sums,
    sum_masses,
    sum_table,
)

RECENT_MAPS = 64
MAX_BOXES = 256

Key = TypeVar("Key")
Map = TypeVar("Map", bound="_Map")


class _Map:
    """An image to draw from, with the allowed masses that were asked for before.

    Chunks are those of the image that it was resampled from, if it was.
    """

    def __init__(self, image: Image) -> None:
        self._image, sources = image.root
        root = self._image
        i, j, k = (min(n, c) for n, c in zip(root.spatial_shape, root.source.chunk_shape, strict=True))
        self.grid = ChunkGrid(root.spatial_shape, (i, j, k))
        self._resampled = None if root is image else ResampledMap(image, root, sources)
        self._allowed_masses: dict[Any, AllowedMass] = {}

    def read(self, boxes: Sequence[PatchLocation]) -> list[Voxels]:
        """The values (C, I, J, K) of some chunks."""
        return self._image.read_group(boxes)

    def _mass_within(
        self, key: Any, allowed: PatchLocation, table: Callable[[], MassTable], masses_of: MassesOf
    ) -> AllowedMass:
        """The mass of a class, or of all weights, among the allowed centres; kept for the same ``key``."""
        if (key, allowed) not in self._allowed_masses:
            if len(self._allowed_masses) >= MAX_BOXES:
                self._allowed_masses.clear()
            if self._resampled is None:
                mass = AllowedMass(table(), self.grid, allowed, masses_of)
            else:
                mass = ResampledMass(table(), self.grid, allowed, masses_of, self._resampled)
            self._allowed_masses[key, allowed] = mass
        return self._allowed_masses[key, allowed]


class LabelClasses(_Map):
    """The classes of a label map: its values, or its channels if there are several; None is all but 0."""

    def __init__(self, image: Image) -> None:
        super().__init__(image)
        self._table, image = None, self._image
        if image.kind == "label" and image.folder and image.record:
            self._table = read_label_table(image.folder, image.record.files)
        self._masses: dict[int | None, MassTable] = {}

    def has(self, label: int | None) -> bool:
        """Whether any voxel belongs to a class."""
        return bool(self._mass(label).mass.sum() > 0)

    def allowed_mass(self, label: int | None, allowed: PatchLocation) -> AllowedMass:
        """The voxels of a class among the allowed centres, each of mass 1."""
        table, members = partial(self._mass, label), partial(self._members, label)
        return self._mass_within(label, allowed, table, members)

    def _mass(self, label: int | None) -> MassTable:
        if label not in self._masses:
            self._masses[label] = self._make_mass(label)
        return self._masses[label]

    def _make_mass(self, label: int | None) -> MassTable:
        one_channel = self._image.num_channels == 1
        if self._table is None or (label is None and not one_channel):
            return sum_masses(self.grid, self.read, partial(self._members, label))
        values = [v for v in self._table.values.tolist() if v != 0] if label is None else [label]
        return self._table.table(values, len(self.grid))

    def _members(self, label: int | None, voxels: Voxels) -> NDArray[np.bool_]:
        """Which voxels (I, J, K) belong to a class."""
        if label is None:
            return np.asarray((voxels != 0).any(axis=0))
        if self._image.num_channels == 1:
            return np.asarray(voxels[0] == label)
        if 0 <= label < self._image.num_channels:
            return np.asarray(voxels[label] != 0)
        return np.zeros(voxels.shape[1:], dtype=bool)


class WeightMap(_Map):
    """A map of weights, at least 0 and finite; ``where`` names it in errors."""

    def __init__(self, image: Image, where: str) -> None:
        super().__init__(image)
        if image.num_channels != 1:
            raise SamplingError(f"{where} has {image.num_channels} channels; a map has one")
        self._where, image = where, self._image
        if image.kind == "sampling" and image.folder and image.record:
            self._mass = sum_table(read_weight_sums(image.folder, image.record.files))
        else:
            self._mass = sum_masses(self.grid, self.read, self._weights)
        if not self._mass.mass.sum() > 0:
            raise NothingToDrawError(f"{where} is zero everywhere; nothing can be drawn from it")

    def allowed_mass(self, allowed: PatchLocation) -> AllowedMass:
        """The weights of the allowed centres."""
        return self._mass_within(None, allowed, lambda: self._mass, self._weights)

    def _weights(self, voxels: Voxels) -> Voxels:
        check_weights(voxels, self._where)
        return np.asarray(voxels[0])


def recorded_labels(image: Image) -> set[int] | None:
    """The values of a label map by its record, or by that of the map that it was resampled from.

    None if they are not known without reading voxels, and for a map of several channels.
    """
    root, _ = image.root
    if image.num_channels > 1 or root.record is None or "labels" not in root.record.stats:
        return None
    return {int(value) for value in root.record.stats["labels"]}


_recent: Recent[Any, Any] = Recent(RECENT_MAPS)


def label_classes(image: Image) -> LabelClasses:
    """The classes of an image, kept from an earlier draw if there was one."""
    return _map_of(image, LabelClasses, lambda: LabelClasses(image))


def weight_map(image: Image, where: str) -> WeightMap:
    """The weights of an image, kept from an earlier draw if there was one; ``where`` names it in errors."""
    return _map_of(image, WeightMap, lambda: WeightMap(image, where))


def _map_of(image: Image, kind: type[Map], make: Callable[[], Map]) -> Map:
    root, _ = image.root
    if root.folder and root.record:
        grid = None if root is image else (image.identity(), image.spatial_shape)
        found: Map = _recent.get((kind, root.folder, root.record.contents, root.scaling, grid), make)
        return found
    return image.remembered(kind, make)
