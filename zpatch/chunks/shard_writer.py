"""Voxels -> a shard file: its encoded chunks, one after the other, then their index."""

from __future__ import annotations

import itertools
import math
import os

import numpy as np

from zpatch.chunks.codec import crc32c, encode_chunk
from zpatch.chunks.mapped_shards import NO_CHUNK
from zpatch.chunks.sharded_array import ShardedArray
from zpatch.digests import FileSeal, new_digest
from zpatch.geometry.boxes import Voxels


def write_shard(array: ShardedArray, shard: tuple[int, ...], voxels: Voxels, preset: str) -> FileSeal:
    """Write one shard file, sync it, and give its seal.

    ``voxels`` is the part of the array that the shard covers, (c, z, y, x), little-endian; at the array's end
    it may be smaller than the shard. Chunks wholly outside the array are not written.
    """
    file = array.shard_file(shard)
    file.parent.mkdir(parents=True, exist_ok=True)
    index = np.full((math.prod(array.chunks_per_shard), 2), NO_CHUNK, dtype="<u8")
    scratch = np.zeros(array.chunks, dtype=array.dtype)
    seal = new_digest()
    offset = 0
    with file.open("wb") as stream:
        for number, position in enumerate(itertools.product(*map(range, array.chunks_per_shard))):
            box = tuple(slice(p * c, (p + 1) * c) for p, c in zip(position, array.chunks, strict=True))
            part = voxels[box]
            if part.size == 0:
                continue
            if part.shape != scratch.shape:
                scratch[...] = 0
            scratch[tuple(map(slice, part.shape))] = part
            length = 0
            for data in encode_chunk(scratch, preset):
                stream.write(data)
                seal.update(data)
                length += len(data)
            index[number] = offset, length
            offset += length
        tail = index.tobytes()
        tail += crc32c(tail)
        stream.write(tail)
        seal.update(tail)
        stream.flush()
        os.fsync(stream.fileno())
    return FileSeal(offset + len(tail), seal.hexdigest())
