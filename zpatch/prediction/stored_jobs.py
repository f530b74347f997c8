"""The jobs of a run in a file for other processes, each of which reads only those that it works on."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import pickle
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self, overload

import cloudpickle

from zpatch.digests import digest
from zpatch.errors import ModelError, SourceError, StoreError
from zpatch.prediction.subject_job import SubjectJob
from zpatch.runtime.guarded_files import open_regular

JOBS_TOGETHER = 64  # of a pickle: they share what is alike, such as tiles


@dataclass(frozen=True, slots=True)
class _Part:
    """Where the pickle of some jobs is, and the digest of its bytes."""

    path: Path
    start: int
    bytes: int
    digest: str


class StoredJobs(Sequence[SubjectJob]):
    """Jobs in the order in which they were written; those of the last parts that were read are kept."""

    def __init__(self, count: int, parts: Sequence[_Part]) -> None:
        self._count = count
        self._parts = parts

    @classmethod
    def write(cls, path: Path, jobs: Iterable[SubjectJob]) -> Self:
        """Write a new file that no other user can open. Raises SourceError for what cannot be pickled."""
        left, parts, count, start = iter(jobs), [], 0, 0
        with new_file(path) as file:
            while together := tuple(itertools.islice(left, JOBS_TOGETHER)):
                data = _pickled(together)
                file.write(data)
                parts.append(_Part(path, start, len(data), digest(data)))
                start, count = start + len(data), count + len(together)
        return cls(count, parts)

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, key: int) -> SubjectJob: ...
    @overload
    def __getitem__(self, key: slice) -> list[SubjectJob]: ...
    def __getitem__(self, key: int | slice) -> SubjectJob | list[SubjectJob]:
        if isinstance(key, slice):
            return [self[number] for number in range(*key.indices(self._count))]
        part, number = divmod(range(self._count)[key], JOBS_TOGETHER)
        return _jobs_of(self._parts[part])[number]


def new_file(path: Path) -> BinaryIO:
    """A new file that no other user can open: it holds code."""
    return open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w+b")


def changed_file(path: Path) -> StoreError:
    """The error about a file that is not the one that was written."""
    return StoreError(f"{path}: it was changed after it was written; run the command again")


@contextlib.contextmanager
def opened_code(path: Path) -> Iterator[BinaryIO]:
    """A file to unpickle from, in another process. Raises ModelError or StoreError if that cannot be done."""
    try:
        with open(open_regular(path), "rb") as file:
            yield file
    except (ImportError, AttributeError) as error:
        raise ModelError(
            f"the model cannot be loaded in another process ({error}); its code must be importable there"
        ) from error
    except PermissionError as error:
        raise StoreError(
            f"{path}: {error.strerror}; workers must run as the user who runs the prediction"
        ) from error


def _pickled(jobs: tuple[SubjectJob, ...]) -> bytes:
    try:
        data: bytes = cloudpickle.dumps(jobs)
    except (TypeError, pickle.PicklingError, AttributeError) as error:
        raise SourceError(
            f"an input cannot be sent to other processes ({type(error).__name__}: {error}); leave "
            f"out jobs and scheduler, or save it as Zarr or NIfTI and give its path"
        ) from error
    return data


@functools.lru_cache(maxsize=2)
def _jobs_of(part: _Part) -> tuple[SubjectJob, ...]:
    """The jobs of a part; unpickling runs code, so other bytes in its place are refused."""
    with opened_code(part.path) as file:
        file.seek(part.start)
        data = file.read(part.bytes)
        if digest(data) != part.digest:
            raise changed_file(part.path)
        jobs: tuple[SubjectJob, ...] = cloudpickle.loads(data)
    return jobs
