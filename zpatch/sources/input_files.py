"""The files that an image's voxels are read from, as they were: arrays mapped from files, graphs over arrays.

A prediction takes a seal of each input. It is compared with the files that each worker sees, and again before
each shard is written: an array that is not there would be predicted as its fill value.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from zpatch.chunks.file_mark import FileMark
from zpatch.errors import DamageError
from zpatch.geometry.boxes import Voxels
from zpatch.sources.lazy_array import CheckedZarr
from zpatch.sources.voxel_source import VoxelSource, WrappedSource

SAME_FILES = "all workers must see the same files as the process that starts them"


def root_of(path: Path) -> Path:
    """The store, image, plate or series that a path is in, without links; the path itself if it is in none.

    It is the nearest Zarr group or array whose name ends in ``.zarr``, or the outermost one.
    """
    root = path.resolve()
    for folder in root.parents:
        is_whole = root.suffix == ".zarr"
        if is_whole or not any((folder / name).exists() for name in ("zarr.json", ".zgroup", ".zarray")):
            break
        root = folder
    return root


def map_of(array: Any) -> Any:
    """The memory map that an array is a view of, if any."""
    found = None
    while array is not None:
        if isinstance(array, np.memmap) and array.filename is not None:
            found = array
        array = getattr(array, "base", None)
    return found


def offset_in_file(array: Voxels, mapped: Any) -> int:
    """Where in its file the first voxel of an array is, that is a view of a memory map."""
    first, start = (a.__array_interface__["data"][0] for a in (array, mapped))
    return int(first - start + mapped.offset)


def mark_of_map(array: Voxels) -> FileMark | None:
    """The mark of the file that an array is mapped from; None for an array of voxels that are in no file."""
    mapped = map_of(array)
    if mapped is None or mapped.mode == "c":
        return None
    return FileMark.of_voxels(Path(mapped.filename), changes=mapped.mode != "r")


@dataclass(frozen=True, slots=True)
class MappedView:
    """An array that is mapped from a file, to be mapped again in another process."""

    mark: FileMark
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, array: Voxels, mark: FileMark) -> Self:
        """The view of an array, whose changes are written to the file first."""
        mapped = map_of(array)
        if mark.changes:
            mapped.flush()
        return cls(mark, array.dtype, array.shape, array.strides, offset_in_file(array, mapped))

    def open(self) -> Voxels:
        """Map the file here. Raises DamageError if it is not the same file here."""
        if problem := self.mark.problem():
            raise DamageError(f"{problem} for {_this_process()}; {SAME_FILES}")
        mapped = np.memmap(self.mark.path, np.uint8, "r")
        return np.ndarray(self.shape, self.dtype, mapped, self.offset, self.strides)


def inputs_of_graph(array: Any) -> tuple[list[Any], list[Voxels], list[VoxelSource]]:
    """The Zarr arrays, the arrays of numpy and the sources that a dask array is computed from.

    They are found where dask keeps the arrays that ``from_zarr`` and ``from_array`` were given. Not found are
    arrays that are opened in tasks (``inline_array=True``, ``delayed``, functions that read files).
    """
    layers = array.__dask_graph__().layers.values()
    found = [value for layer in layers for value in getattr(layer, "mapping", {}).values()]
    arrays = [value.zarr_array if isinstance(value, CheckedZarr) else value for value in found]
    return (
        [value for value in arrays if type(value).__module__.startswith("zarr.")],
        [value for value in found if isinstance(value, np.ndarray)],
        [value for value in found if isinstance(value, WrappedSource)],
    )


@dataclass(frozen=True, slots=True)
class InputSeal:
    """An input as it was when a prediction began.

    Attributes:
        name: What errors call it.
        marks: Its metadata files, or the file that it is mapped from.
        chunks: Files of chunks at evenly spaced places of its grid, with their sizes and times of
            modification; None for no file.
    """

    name: str
    marks: tuple[FileMark, ...]
    chunks: tuple[tuple[Path, tuple[int, int] | None], ...]

    @classmethod
    def of(cls, name: str, source: VoxelSource) -> Self:
        """Take the seal. Raises DamageError if a file is not the one that was opened."""
        marks = source.marks()
        for mark in marks:
            mark.check(name)
        return cls(name, marks, tuple((file, _status(file)) for file in source.sampled_files()))

    def check(self) -> None:
        """Raise DamageError if the input is not there, or has changed."""
        for mark in self.marks:
            mark.check(self.name)
        if problem := self._problem_of_chunks():
            raise DamageError(
                f"{self.name}: {problem}: the input was moved, unmounted or changed while it was read; put "
                f"it back as it was, and run the same command again"
            )

    def check_seen(self) -> None:
        """Raise DamageError if this process sees another input than the process that took the seal."""
        problems = [problem for mark in self.marks if (problem := mark.problem())]
        if problem := next(iter(problems), None) or self._problem_of_chunks():
            raise DamageError(f"{self.name}: {problem} for {_this_process()}; {SAME_FILES}")

    def is_unchanged(self) -> bool:
        """Whether no file of chunks was written again, on the machine on which the seal was taken."""
        return all(_status(file) == status for file, status in self.chunks)

    def _problem_of_chunks(self) -> str | None:
        for file, status in self.chunks:
            then, now = (None if s is None else s[0] for s in (status, _status(file)))
            if then != now:
                before = "did not exist" if then is None else f"had {then} bytes"
                return f"{file} {before} and {'is not there' if now is None else f'has {now} bytes'} now"
        return None


def check_all(seals: Sequence[InputSeal]) -> None:
    """Raise DamageError if an input of a prediction is not there, or has changed."""
    for seal in seals:
        seal.check()


def _status(file: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"
