"""Bytes of a chunk <-> voxels: the only module that compresses or decompresses voxels."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import google_crc32c
import numpy as np
from numcodecs import blosc, zstd
from numpy.typing import NDArray

from zpatch.errors import OptionError
from zpatch.geometry.boxes import Voxels

CRC_BYTES = 4
BLOSC_HEADER_BYTES, BLOSC_STORED, BLOSC_WHOLE_BLOCKS = 16, 2, 16  # bytes, and bits of flags
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
ZSTD_LEAST_HEADER_BYTES = 6

Compressor = Literal["none", "blosc", "zstd", "gzip", "zlib"]
Bytes = NDArray[np.uint8]

_WINDOW_BITS = {"gzip": 31, "zlib": 15}

# Chunks are decoded and encoded in zpatch's own threads and processes: blosc's pool is not fork-safe, and
# needs the GIL. zarr-python sets the same.
blosc.use_threads = False


@dataclass(frozen=True, slots=True)
class ChunkCodec:
    """How a chunk is encoded: its compressor, and whether a crc32c of the encoded bytes follows them.

    ``within`` is the compressor that blosc uses, if known.
    """

    compressor: Compressor
    checksum: bool = True
    within: str | None = None

    @property
    def is_quick(self) -> bool:
        """Whether a chunk is decoded about as fast as it is copied."""
        return self.compressor == "none" or self.within in ("lz4", "lz4hc")

    @property
    def crc_bytes(self) -> int:
        """Bytes of the checksum."""
        return CRC_BYTES if self.checksum else 0

    def decode(self, data: Bytes, out: Voxels) -> None:
        """Decode a chunk, without its checksum, into ``out``, C-contiguous and of the chunk's shape.

        Raises ValueError if the bytes are damaged. Their decoded size is compared with the chunk's first, so
        that a few bytes cannot fill the memory. ``data`` must not be a view of a file, which could change
        between check and decoding.
        """
        expected = out.nbytes
        if self.compressor == "none":
            if len(data) != expected:
                raise ValueError(f"has {len(data)} bytes instead of {expected}")
            out.reshape(-1).view(np.uint8)[:] = data
        elif self.compressor == "blosc":
            _check_blosc(data, expected)
            try:
                blosc.decompress(data, out)
            except RuntimeError as error:
                raise ValueError(f"cannot be decoded ({error})") from error
        elif self.compressor == "zstd":
            _decode_zstd(data, out)
        else:
            _inflate(data, out, _WINDOW_BITS[self.compressor])


def codec_of(preset: str) -> ChunkCodec:
    """How chunks of a preset are encoded."""
    settings = CODECS[preset]
    return ChunkCodec("none") if settings is None else ChunkCodec("blosc", within=settings.compressor)


def encode_chunk(voxels: Voxels, preset: str) -> tuple[bytes, bytes]:
    """A C-contiguous chunk, encoded by a preset, and its crc32c."""
    settings = CODECS[preset]
    if settings is None:
        data = voxels.tobytes()
    else:
        shuffle = blosc.SHUFFLE if settings.shuffle else blosc.NOSHUFFLE
        data = blosc.compress(voxels, settings.compressor.encode(), settings.level, shuffle)
    return data, crc32c(data)


def crc32c(data: bytes | Bytes) -> bytes:
    """The crc32c of some bytes, little-endian."""
    return int(google_crc32c.value(data)).to_bytes(CRC_BYTES, "little")


def _little(data: Bytes) -> int:
    return int.from_bytes(data.tobytes(), "little")


def _check_blosc(data: Bytes, expected: int) -> None:
    """Raise ValueError for a frame that blosc would decode to less, or read past its end.

    Its first 16 bytes are the header (README_CHUNK_FORMAT.rst of c-blosc 1).
    """
    if len(data) < BLOSC_HEADER_BYTES or _little(data[4:8]) != expected:
        raise ValueError(f"does not decode to the {expected} bytes of a chunk")
    if _little(data[12:16]) > len(data):
        raise ValueError("cannot be decoded (it is cut short)")
    flags, type_bytes, block_bytes = int(data[2]), int(data[3]), _little(data[8:12])
    may_split = not flags & (BLOSC_STORED | BLOSC_WHOLE_BLOCKS) and type_bytes > 1
    if may_split and block_bytes % type_bytes and block_bytes <= expected:
        raise ValueError("cannot be decoded (its blocks are no whole voxels)")


def _decode_zstd(data: Bytes, out: Voxels) -> None:
    size = _zstd_content_size(data)
    if size is not None and size != out.nbytes:
        raise ValueError(f"does not decode to the {out.nbytes} bytes of a chunk")
    try:
        zstd.decompress(data, out)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"cannot be decoded ({error})") from error


def _zstd_content_size(data: Bytes) -> int | None:
    """The decoded size in the header of a zstd frame (RFC 8878, 3.1.1.1); None if the header has none.

    Anything else at the beginning, such as a skippable frame, raises ValueError: its size is not known.
    """
    if data[:4].tobytes() != ZSTD_MAGIC or len(data) < ZSTD_LEAST_HEADER_BYTES:
        raise ValueError("cannot be decoded (it does not begin with a zstd frame)")
    descriptor = int(data[4])
    single_segment = bool(descriptor & 0x20)
    size_bytes = (int(single_segment), 2, 4, 8)[descriptor >> 6]
    if not size_bytes:
        return None
    first = 5 + (not single_segment) + (0, 1, 2, 4)[descriptor & 3]
    return _little(data[first : first + size_bytes]) + (256 if size_bytes == 2 else 0)


def _inflate(data: Bytes, out: Voxels, window_bits: int) -> None:
    stream = zlib.decompressobj(window_bits)
    try:
        voxels = stream.decompress(data.tobytes(), out.nbytes + 1)
    except zlib.error as error:
        raise ValueError(f"cannot be decoded ({error})") from error
    if len(voxels) != out.nbytes or not stream.eof:
        raise ValueError(f"does not decode to the {out.nbytes} bytes of a chunk")
    out.reshape(-1).view(np.uint8)[:] = np.frombuffer(voxels, np.uint8)


@dataclass(frozen=True, slots=True)
class Codec:
    """A codec preset: blosc's compressor, its level, and whether bytes are shuffled first."""

    compressor: str
    level: int
    shuffle: bool = True


CODECS: Mapping[str, Codec | None] = {
    "lz4": Codec("lz4", 5),
    "lz4hc": Codec("lz4hc", 4),  # higher levels take much longer and gain little
    "zstd": Codec("zstd", 5),
    "none": None,
}


def check_codec(name: str) -> None:
    """Refuse a name that is no preset."""
    if name not in CODECS:
        raise OptionError(f"codec must be one of {', '.join(CODECS)}, not {name!r}", option="codec")
