"""Small stores that stand in for the store in another packing, to measure the speed of reading it.

A stand-in is one file whose index maps each chunk that the patches touch to one of a few real chunks of the
image, packed in the way under test. The reader treats it exactly like a store that is packed in this way.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zpatch.bench.packing import Packing
from zpatch.bench.patch_group import PatchGroup, array_of, record_of
from zpatch.chunks.codec import codec_of, crc32c, encode_chunk
from zpatch.chunks.gather import read_region
from zpatch.chunks.layout import chunk_counts, covering_chunks
from zpatch.chunks.mapped_shards import NO_CHUNK, close_shards
from zpatch.chunks.sharded_array import ChunkFiles, ShardedArray
from zpatch.geometry.boxes import padded_to_4d
from zpatch.images.image import Image
from zpatch.sources.group_read import read_requests
from zpatch.sources.voxel_source import Request, new_voxels
from zpatch.sources.voxel_sources import ShardSource

SAMPLE_BYTES = 2 * 2**20  # of each image of a group
MOST_CHUNKS = 2**21  # in the index of a stand-in, 16 bytes each
MOST_PARTS = 2**17  # of chunks in the patches of a group, which a plan of reading holds in memory


@dataclass(frozen=True, slots=True)
class StandIns:
    """Groups of patches, each with the stand-in that each of its images is read from.

    ``stored_bytes`` estimates the size of the files of all images in this packing, from the sample.
    """

    groups: tuple[tuple[PatchGroup, tuple[ShardSource, ...]], ...]
    stored_bytes: float

    def read_s(self) -> float:
        """Read all groups, one after the other, and return the seconds that this took."""
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
    """Write stand-ins, and remove them at the end; all packings in ``others`` sample the same voxels."""
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
    """Whether the index of a stand-in and the plan of reading it fit in little memory."""
    for group in groups:
        for image in group.images:
            array, chunks = array_of(image), packing.chunks_of(image)
            first, stop = group.boxes(array)
            parts = np.prod((stop - 1) // chunks - first // chunks + 1, axis=1).sum()
            if parts > MOST_PARTS or math.prod(chunk_counts(array.shape, chunks)) > MOST_CHUNKS:
                return False
    return True


def times_as_fast(tested: StandIns, base: StandIns, seconds: float) -> float:
    """Speed of reading ``tested`` relative to ``base``: both are read in turns for about ``seconds``, and the
    median of the ratios counts."""
    for each in (tested, base):
        each.read_s()  # verifies the chunks, and loads them into the page cache
    until = time.perf_counter() + seconds
    ratios: list[float] = []
    while not ratios or time.perf_counter() < until:
        time_s = tested.read_s()
        ratios.append(base.read_s() / time_s)
    return statistics.median(ratios)


def _stand_in(
    path: Path, group: PatchGroup, image: Image, packing: Packing, others: Sequence[Packing]
) -> tuple[ShardedArray, float]:
    """An array that can be read where the group touches it, and its packed bytes for each byte of voxels."""
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
        # Chunks take turns, so that none is decoded twice in a row.
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
    """Real chunks of an image, drawn from the chunks that the patches touch.

    All packings sample the same voxels, in at least two chunks, so that none is decoded twice in a row.
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
