"""Ways to pack voxels into chunks, and how many bytes patches then decode: this follows from geometry."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from zpatch.bench.patch_group import PatchGroup, array_of, record_of
from zpatch.chunks.codec import CODECS
from zpatch.chunks.layout import covering_chunks, plan_layout
from zpatch.geometry.affines import spacing_mm
from zpatch.geometry.boxes import Triple, padded_to_4d
from zpatch.images.image import Image
from zpatch.records.image_record import codec_for


@dataclass(frozen=True, slots=True)
class Packing:
    """A way to store voxels, as options of ``zpatch convert``: side of chunks, and codec preset.

    None stands for the stored chunks or codec of each image.
    """

    chunk: int | None = None
    codec: str | None = None

    def chunks_of(self, image: Image) -> tuple[int, int, int, int]:
        """The shape (c, z, y, x) of an image's chunks in this packing."""
        record = record_of(image)
        if self.chunk is None:
            return array_of(image).chunks
        layout = plan_layout(
            record.shape,
            image.source.dtype.itemsize,
            spacing=spacing_mm(record.affine_array)[::-1],
            chunk=self.chunk,
            interleaved=record.colours,
        )
        return padded_to_4d(layout.chunks)

    def codec_of(self, image: Image) -> str:
        """The codec of an image in this packing."""
        return record_of(image).codec if self.codec is None else codec_for(self.codec, image.kind)


STORED = Packing()


def stored_options(images: Sequence[Image], sides: Sequence[int]) -> Packing:
    """The options that give all images their stored chunks and codecs; None where no single option does."""
    chunks = [array_of(image).chunks for image in images]
    fits = (side for side in sides if [Packing(side).chunks_of(image) for image in images] == chunks)
    codecs = [record_of(image).codec for image in images]
    presets = (name for name in CODECS if [codec_for(name, image.kind) for image in images] == codecs)
    return Packing(next(fits, None), next(presets, None))


def distinct_sides(images: Sequence[Image], sides: Sequence[int]) -> list[int]:
    """Those sides of chunks that give the images different chunks; of equal ones, the first."""
    by_chunks: dict[tuple[tuple[int, ...], ...], int] = {}
    for side in sides:
        by_chunks.setdefault(tuple(Packing(side).chunks_of(image) for image in images), side)
    return list(by_chunks.values())


def decoded_bytes(group: PatchGroup, packing: Packing = STORED) -> int:
    """Bytes of the chunks that a group touches, each chunk counted once."""
    total = 0
    for image in group.images:
        array, chunks = array_of(image), packing.chunks_of(image)
        numbers, _ = covering_chunks(*group.boxes(array), array.shape, chunks)
        total += len(np.unique(numbers)) * math.prod(chunks) * array.dtype.itemsize
    return total


def decoded_per_delivered(groups: Sequence[PatchGroup], packing: Packing = STORED) -> float:
    """Bytes decoded for each byte delivered, over all groups."""
    return sum(decoded_bytes(g, packing) for g in groups) / sum(g.delivered_bytes for g in groups)


def parts_of_patch(patch_size: Triple, image: Image) -> int:
    """The largest number of stored chunks that a patch of an image can touch."""
    chunks = array_of(image).chunks
    touched = [-(-p // c) + 1 for p, c in zip(patch_size[::-1], chunks[1:], strict=True)]
    return math.prod(touched) * -(-image.num_channels // chunks[0])
