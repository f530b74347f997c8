"""Random patches of one subject that are read together, as the workers of a queue read them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from zpatch.chunks.layout import covering_chunks
from zpatch.chunks.sharded_array import ShardedArray
from zpatch.geometry.boxes import PatchLocation, Triple, allowed_centres, check_patch_fits, stored_corners
from zpatch.images.image import Image
from zpatch.images.subject import Subject
from zpatch.records.image_record import ImageRecord
from zpatch.sources.group_read import read_group
from zpatch.sources.voxel_sources import ShardSource

Boxes = tuple[NDArray[np.int64], NDArray[np.int64]]


@dataclass(frozen=True, slots=True)
class PatchGroup:
    """Patches of all images of one subject that are read together, at ``locations``."""

    subject: Subject
    locations: tuple[PatchLocation, ...]

    @classmethod
    def drawn(cls, subject: Subject, patch_size: Triple, count: int, rng: np.random.Generator) -> Self:
        """``count`` random patches; all starts inside the volume are equally likely."""
        check_patch_fits(patch_size, subject.spatial_shape, subject.name)
        starts = rng.integers(0, allowed_centres(subject.spatial_shape, patch_size).size, size=(count, 3))
        return cls(subject, tuple(PatchLocation((i, j, k), patch_size) for i, j, k in starts.tolist()))

    @property
    def images(self) -> list[Image]:
        """The images of the subject."""
        return list(self.subject.images.values())

    @property
    def delivered_bytes(self) -> int:
        """Bytes of the voxels of all patches, in their stored types."""
        voxels = sum(math.prod(location.size) for location in self.locations)
        return sum(voxels * image.num_channels * image.source.dtype.itemsize for image in self.images)

    def read(self) -> None:
        """Read the patches as a sampler reads them, and discard them."""
        read_group(self.images, self.locations)

    def singly(self) -> list[Self]:
        """One group for each patch."""
        return [dataclasses.replace(self, locations=(location,)) for location in self.locations]

    def shard_files(self) -> list[Path]:
        """The shard files that the patches are read from; of a slide, its file."""
        files = []
        for image in self.images:
            if not isinstance(image.source, ShardSource):
                files += [mark.path for mark in image.source.marks()]
                continue
            array = array_of(image)
            numbers, _ = covering_chunks(*self.boxes(array), array.shape, array.shards)
            for number in np.unique(numbers).tolist():
                place = np.unravel_index(number, array.shard_grid)
                files.append(array.shard_file(tuple(int(n) for n in place)))
        return files

    def boxes(self, array: ShardedArray) -> Boxes:
        """First voxel and stop of each patch, two arrays (patches, 4) in stored axis order (c, z, y, x)."""
        return stored_corners(self.locations, range(array.shape[0]))


def array_of(image: Image) -> ShardedArray:
    """The stored array of an image of a store."""
    assert isinstance(image.source, ShardSource)
    return image.source.array


def record_of(image: Image) -> ImageRecord:
    """The manifest's record of an image of a store."""
    assert image.record is not None
    return image.record
