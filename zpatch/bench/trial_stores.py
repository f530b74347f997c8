"""What patches cost to read: the chunks that they touch, and their time if the voxels were packed otherwise.

How many bytes are decoded for each one delivered follows from geometry. How long that takes is tried on
stand-ins: files whose index puts a few real chunks of an image, packed in the way in question, wherever the
patches touch a chunk. The reader does with them just what it would do with a store packed like that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from zpatch.chunks.codec import CODECS, codec_of, crc32c, encode_chunk
from zpatch.chunks.gather import read_region
from zpatch.chunks.layout import chunk_counts, covering_chunks, plan_layout
from zpatch.chunks.mapped_shards import NO_CHUNK, close_shards
from zpatch.chunks.sharded_array import ChunkFiles, ShardedArray
from zpatch.geometry.affines import spacing_mm
from zpatch.geometry.boxes import (
    PatchLocation,
    Triple,
    allowed_centres,
    check_patch_fits,
    padded_to_4d,
    stored_corners,
)
from zpatch.images.group_read import read_group, read_requests
from zpatch.images.image import Image
from zpatch.images.subject import Subject
from zpatch.images.voxel_source import Request, new_voxels
from zpatch.images.voxel_sources import ShardSource
from zpatch.store.image_record import ImageRecord, codec_for

SAMPLE_BYTES = 2 * 2**20  # of each image of a group
MOST_CHUNKS = 2**21  # in the index of a stand-in, 16 bytes each
MOST_PARTS = 2**17  # of chunks in the patches of a group: what planning them takes memory for

Boxes = tuple[NDArray[np.int64], NDArray[np.int64]]


@dataclass(frozen=True, slots=True)
class PatchGroup:
    """Patches of one subject that are read together, of all its images."""

    subject: Subject
    locations: tuple[PatchLocation, ...]

    @classmethod
    def drawn(cls, subject: Subject, patch_size: Triple, count: int, rng: np.random.Generator) -> Self:
        """So many patches, each start equally likely."""
        check_patch_fits(patch_size, subject.spatial_shape, subject.name)
        starts = rng.integers(0, allowed_centres(subject.spatial_shape, patch_size).size, size=(count, 3))
        return cls(subject, tuple(PatchLocation((i, j, k), patch_size) for i, j, k in starts.tolist()))

    @property
    def images(self) -> list[Image]:
        """The images that are read."""
        return list(self.subject.images.values())

    @property
    def delivered_bytes(self) -> int:
        """Bytes of the patches' voxels, as they are stored."""
        voxels = sum(math.prod(location.size) for location in self.locations)
        return sum(voxels * image.num_channels * image.source.dtype.itemsize for image in self.images)

    def read(self) -> None:
        """Read the patches as a sampler does, and drop them."""
        read_group(self.images, self.locations)

    def singly(self) -> list[Self]:
        """Each of the patches as a group of its own."""
        return [dataclasses.replace(self, locations=(location,)) for location in self.locations]

    def shard_files(self) -> list[Path]:
        """The files that hold the patches."""
        files = []
        for array in map(array_of, self.images):
            numbers, _ = covering_chunks(*self.boxes(array), array.shape, array.shards)
            for number in np.unique(numbers).tolist():
                place = np.unravel_index(number, array.shard_grid)
                files.append(array.shard_file(tuple(int(n) for n in place)))
        return files

    def boxes(self, array: ShardedArray) -> Boxes:
        """First voxel and stop of each patch, (patches, 4) in stored axis order (c, z, y, x)."""
        return stored_corners(self.locations, range(array.shape[0]))


def array_of(image: Image) -> ShardedArray:
    """The stored array of an image of a store."""
    assert isinstance(image.source, ShardSource)
    return image.source.array


def record_of(image: Image) -> ImageRecord:
    """The manifest's record of an image of a store."""
    assert image.record is not None
    return image.record


def parts_of_patch(patch_size: Triple, image: Image) -> int:
    """How many chunks a patch of an image touches, at most."""
    chunks = array_of(image).chunks
    touched = [-(-p // c) + 1 for p, c in zip(patch_size[::-1], chunks[1:], strict=True)]
    return math.prod(touched) * -(-image.num_channels // chunks[0])


@dataclass(frozen=True, slots=True)
class Packing:
    """A way to store voxels, as options of ``zpatch convert``; None is as each image is stored now."""

    chunk: int | None = None
    codec: str | None = None

    def chunks_of(self, image: Image) -> tuple[int, int, int, int]:
        """The chunk that an image would have, (c, z, y, x)."""
        record = record_of(image)
        if self.chunk is None:
            return array_of(image).chunks
        layout = plan_layout(
            record.shape,
            image.source.dtype.itemsize,
            spacing=spacing_mm(record.affine_array)[::-1],
            chunk=self.chunk,
            colours=record.colours,
        )
        return padded_to_4d(layout.chunks)

    def codec_of(self, image: Image) -> str:
        """The codec that an image would have."""
        return record_of(image).codec if self.codec is None else codec_for(self.codec, image.kind)


STORED = Packing()


def stored_options(images: Sequence[Image], sides: Sequence[int]) -> Packing:
    """The options that the images were converted with; None for what no single option gives all of them."""
    chunks = [array_of(image).chunks for image in images]
    fits = (side for side in sides if [Packing(side).chunks_of(image) for image in images] == chunks)
    codecs = [record_of(image).codec for image in images]
    presets = (name for name in CODECS if [codec_for(name, image.kind) for image in images] == codecs)
    return Packing(next(fits, None), next(presets, None))


def distinct_sides(images: Sequence[Image], sides: Sequence[int]) -> list[int]:
    """Some sides of chunks, without those that give the images no other chunks than one before."""
    by_chunks: dict[tuple[tuple[int, ...], ...], int] = {}
    for side in sides:
        by_chunks.setdefault(tuple(Packing(side).chunks_of(image) for image in images), side)
    return list(by_chunks.values())


def decoded_bytes(group: PatchGroup, packing: Packing = STORED) -> int:
    """Bytes of the chunks that a group touches, each counted once."""
    total = 0
    for image in group.images:
        array, chunks = array_of(image), packing.chunks_of(image)
        numbers, _ = covering_chunks(*group.boxes(array), array.shape, chunks)
        total += len(np.unique(numbers)) * math.prod(chunks) * array.dtype.itemsize
    return total


def decoded_per_delivered(groups: Sequence[PatchGroup], packing: Packing = STORED) -> float:
    """How many bytes are decoded for each byte that is delivered."""
    return sum(decoded_bytes(g, packing) for g in groups) / sum(g.delivered_bytes for g in groups)


@dataclass(frozen=True, slots=True)
class StandIns:
    """Groups of patches, and for each image of a group where it is read from, packed otherwise.

    ``stored_bytes`` is what the files of all the images would take, from how the sample was packed.
    """

    groups: tuple[tuple[PatchGroup, tuple[ShardSource, ...]], ...]
    stored_bytes: float

    def read_s(self) -> float:
        """Read all groups, one after the other; how long that took."""
        begin = time.perf_counter()
        for group, sources in self.groups:
            requests = []
            for image, source in zip(group.images, sources, strict=True):
                shapes = [(image.num_channels, *location.size) for location in group.locations]
                outs = [new_voxels(shape, image.dtype) for shape in shapes]
                requests.append(Request(source, group.locations, outs, image.scaling))
            read_requests(requests)
        return time.perf_counter() - begin


@contextlib.contextmanager
def stand_ins(
    groups: Sequence[PatchGroup], packing: Packing, others: Sequence[Packing]
) -> Iterator[StandIns]:
    """Make stand-ins, and remove them at the end. All of ``others`` are to be tried on the same voxels."""
    with TemporaryDirectory(prefix="zpatch-bench-") as folder:
        made, stored_bytes = [], 0.0
        for number, group in enumerate(groups):
            sources = []
            for name, image in group.subject.images.items():
                array, share = _stand_in(Path(folder, f"{number}-{name}"), group, image, packing, others)
                sources.append(ShardSource(array))
                stored_bytes += share * record_of(image).voxel_bytes
            made.append((group, tuple(sources)))
        try:
            yield StandIns(tuple(made), stored_bytes)
        finally:
            close_shards(Path(folder))


def can_be_tried(groups: Sequence[PatchGroup], packing: Packing) -> bool:
    """Whether neither a stand-in nor planning to read it takes much memory."""
    for group in groups:
        for image in group.images:
            array, chunks = array_of(image), packing.chunks_of(image)
            first, stop = group.boxes(array)
            parts = np.prod((stop - 1) // chunks - first // chunks + 1, axis=1).sum()
            if parts > MOST_PARTS or math.prod(chunk_counts(array.shape, chunks)) > MOST_CHUNKS:
                return False
    return True


def times_as_fast(these: StandIns, those: StandIns, seconds: float) -> float:
    """How many times as fast these are read as those: in turns for about so long, the median of all turns."""
    for each in (these, those):
        each.read_s()  # checks the chunks, and has all of it in memory
    until = time.perf_counter() + seconds
    ratios: list[float] = []
    while not ratios or time.perf_counter() < until:
        time_s = these.read_s()
        ratios.append(those.read_s() / time_s)
    return statistics.median(ratios)


def _stand_in(
    path: Path, group: PatchGroup, image: Image, packing: Packing, others: Sequence[Packing]
) -> tuple[ShardedArray, float]:
    """An array that can be read where the group touches it, and its size as a share of its voxels'."""
    array, chunks, codec = array_of(image), packing.chunks_of(image), packing.codec_of(image)
    grid = chunk_counts(array.shape, chunks)
    file = path / "0.0.0.0"
    path.mkdir()
    extents, raw = [], 0
    with file.open("wb") as stream:
        for voxels in _sample(group, image, chunks, others):
            start = stream.tell()
            for data in encode_chunk(voxels, codec):
                stream.write(data)
            extents.append((start, stream.tell() - start))
            raw += voxels.nbytes
        packed = stream.tell()
        # One after the other, so that no two chunks that are decoded in a row are the same.
        touched = np.unique(covering_chunks(*group.boxes(array), array.shape, chunks)[0])
        index = np.full((math.prod(grid), 2), NO_CHUNK, dtype="<u8")
        index[touched] = np.array(extents)[np.arange(len(touched)) % len(extents)]
        tail = index.tobytes()
        stream.write(tail + crc32c(tail))
    stand_in = ShardedArray(
        path=path,
        shape=array.shape,
        dtype=array.dtype,
        chunks=chunks,
        shards=padded_to_4d([n * c for n, c in zip(grid, chunks, strict=True)]),
        codec=codec_of(codec),
        files=ChunkFiles(axes=(0, 1, 2, 3), prefix="", separator="."),
        name=f"a stand-in for {array}",
    )
    return stand_in, packed / raw


def _sample(
    group: PatchGroup, image: Image, chunks: Sequence[int], others: Sequence[Packing]
) -> Iterator[NDArray[Any]]:
    """Real chunks of an image, drawn from what the patches touch; of the same voxels in each packing.

    At least two, so that no chunk is decoded twice in a row.
    """
    array = array_of(image)
    shape, largest = np.array(array.shape), np.max([p.chunks_of(image) for p in others], axis=0)
    cells = np.unique(covering_chunks(*group.boxes(array), array.shape, tuple(largest.tolist()))[0])
    grid = chunk_counts(array.shape, tuple(largest.tolist()))
    affordable = SAMPLE_BYTES // (math.prod(largest.tolist()) * array.dtype.itemsize)
    count = max(2, min(affordable, len(cells)))
    drawn = np.random.default_rng(0).choice(cells, size=count, replace=count > len(cells))
    for cell in np.stack(np.unravel_index(drawn, grid), axis=1):
        first = np.maximum(np.minimum(cell * largest, shape - largest), 0)
        stop = np.minimum(first + largest, shape)
        voxels = read_region(array, first.tolist(), stop.tolist())
        voxels = np.pad(voxels, [(0, n - m) for n, m in zip(largest.tolist(), voxels.shape, strict=True)])
        for place in np.ndindex(*(largest // chunks).tolist()):
            box = tuple(slice(n * c, (n + 1) * c) for n, c in zip(place, chunks, strict=True))
            yield np.ascontiguousarray(voxels[box])
