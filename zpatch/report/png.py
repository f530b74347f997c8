"""Pictures as PNG (ISO/IEC 15948), of 8 bits a sample and not interlaced."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Colour = tuple[int, int, int, int]

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GREY, _RGB, _PALETTE = 0, 2, 3
_NO_FILTER, _UP = 0, 2


def png(pixels: NDArray[np.uint8], palette: Sequence[Colour] = ()) -> bytes:
    """A PNG file of pixels (rows, columns) of grey, or (rows, columns, 3) of red, green and blue.

    With a ``palette`` of (red, green, blue, opacity) pixels (rows, columns) are numbers of its colours.
    """
    kind = _PALETTE if palette else _GREY if pixels.ndim == 2 else _RGB
    height, width = pixels.shape[:2]
    lines = np.ascontiguousarray(pixels, np.uint8).reshape(height, -1)
    if not palette:  # neighbours differ little, numbers of colours mean nothing
        lines = np.diff(lines, axis=0, prepend=np.zeros_like(lines[:1]))
    filtered = np.insert(lines, 0, _NO_FILTER if palette else _UP, axis=1)
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0))]
    if palette:
        parts.append((b"PLTE", bytes(part for colour in palette for part in colour[:3])))
        parts.append((b"tRNS", bytes(opacity for *_, opacity in palette)))
    parts += [(b"IDAT", zlib.compress(filtered.tobytes(), 9)), (b"IEND", b"")]
    return SIGNATURE + b"".join(_part(name, content) for name, content in parts)


def _part(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
