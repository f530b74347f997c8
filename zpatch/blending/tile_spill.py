"""Tiles in bounded memory: the least recently used ones are in a scratch file."""

from __future__ import annotations

import contextlib
import errno
import io
import math
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from zpatch.errors import StoreError
from zpatch.geometry.boxes import Triple


class SpilledTiles:
    """Tensors (C, i, j, k) by their place in a grid of tiles, at most ``max_bytes`` of them in memory.

    One tile more is in memory while it is taken out. ``bytes`` are in memory now, and ``peak_bytes`` is the
    most that was. The scratch file is in ``scratch_folder``, by default the system's folder of temporary
    files.
    """

    def __init__(self, max_bytes: int | None = None, scratch_folder: Path | None = None) -> None:
        self.bytes = 0
        self.peak_bytes = 0
        self._max_bytes = math.inf if max_bytes is None else max_bytes
        self._held: dict[Triple, torch.Tensor] = {}  # in the order of use
        self._on_disk: dict[Triple, StoredTensor] = {}
        self._scratch = ScratchFile(scratch_folder)
        self._spare: torch.Tensor | None = None  # the memory of the tile that was last moved to disk

    def pop(self, place: Triple, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Take a tile out; zeros of that shape and type if there is none."""
        if place in self._held:
            self.bytes -= self._held[place].nbytes
            return self._held.pop(place)
        if place in self._on_disk:
            stored = self._on_disk[place]
            tile = self._scratch.read(stored, self._memory(stored.shape, stored.dtype))
            self._scratch.free(self._on_disk.pop(place))
            return tile
        return self._memory(shape, dtype).zero_()

    def _memory(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        spare, self._spare = self._spare, None
        if spare is not None and spare.shape == tuple(shape) and spare.dtype == dtype:
            return spare
        return torch.empty(tuple(shape), dtype=dtype)

    def put(self, place: Triple, tile: torch.Tensor) -> None:
        """Keep a tile, as the most recently used one. If the disk is full, all tiles stay as they are."""
        self._held[place] = tile
        self.bytes += tile.nbytes
        while self.bytes > self._max_bytes:
            coldest = next(iter(self._held))
            self._on_disk[coldest] = self._scratch.write(self._held[coldest])
            self._spare = self._held.pop(coldest)
            self.bytes -= self._spare.nbytes
        self.peak_bytes = max(self.peak_bytes, self.bytes)

    def last_channel(self, place: Triple) -> torch.Tensor | None:
        """The last channel (i, j, k) of a tile, which stays where it is; None if there is no such tile."""
        if place in self._on_disk:
            stored = self._on_disk[place].last_channel
            return self._scratch.read(stored, torch.empty(stored.shape, dtype=stored.dtype))
        return self._held[place][-1] if place in self._held else None

    def close(self) -> None:
        """Drop all tiles, and the scratch file."""
        self._held, self._on_disk, self._spare, self.bytes = {}, {}, None, 0
        self._scratch.close()


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """The place of a tensor in a scratch file."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def last_channel(self) -> StoredTensor:
        """The place of the last part along its first axis."""
        channels, *rest = self.shape
        offset = self.offset + self.nbytes // channels * (channels - 1)
        return StoredTensor(offset, tuple(rest), self.dtype)


class ScratchFile:
    """Tensors in a file without a name, which is removed when it is closed or its process ends.

    It is made when first written to. Space that was freed is reused for tensors of the same size.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._file: io.FileIO | None = None
        self._end = 0
        self._free: defaultdict[int, list[int]] = defaultdict(list)

    def write(self, tensor: torch.Tensor) -> StoredTensor:
        """Write a contiguous tensor. If the disk fails, tensors written before stay as they are."""
        free = self._free[tensor.nbytes]
        stored = StoredTensor(free[-1] if free else self._end, tuple(tensor.shape), tensor.dtype)
        with self._named_errors():
            if self._file is None:
                self._file = tempfile.TemporaryFile(buffering=0, dir=self._folder)  # noqa: SIM115
            self._file.seek(stored.offset)
            _transfer(self._file.write, tensor)
        if free:
            free.pop()
        else:
            self._end += stored.nbytes
        return stored

    def read(self, stored: StoredTensor, tensor: torch.Tensor) -> torch.Tensor:
        """Read a tensor into one of its shape and type."""
        assert self._file is not None
        with self._named_errors():
            self._file.seek(stored.offset)
            _transfer(self._file.readinto, tensor)
        return tensor

    def free(self, stored: StoredTensor) -> None:
        """Free the space of a tensor."""
        self._free[stored.nbytes].append(stored.offset)

    def close(self) -> None:
        """Remove the file."""
        if self._file is not None:
            self._file.close()
        self._file, self._end = None, 0
        self._free.clear()

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(
                f"the scratch file in {self._folder or tempfile.gettempdir()} failed "
                f"({error.strerror or error}); free space there, or give a larger max_memory"
            ) from error


def _transfer(step: Callable[[memoryview], int | None], tensor: torch.Tensor) -> None:
    """Write or read the bytes of a tensor, by as many calls as it takes."""
    data = tensor.numpy().reshape(-1).view(np.uint8).data
    while data:
        done = step(data)
        if not done:
            raise OSError(errno.EIO, "it ended early")
        data = data[done:]
