"""Patches per second of several processes: from files in the page cache (warm), and from disk (cold)."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import os
import resource
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from zpatch.bench.patch_group import PatchGroup
from zpatch.chunks.mapped_shards import close_shards
from zpatch.errors import WorkerError
from zpatch.geometry.boxes import Triple
from zpatch.images.subject import Subject
from zpatch.runtime.task_contract import Progress
from zpatch.runtime.tasks import run_tasks
from zpatch.sampling.randomness import rng

BLOCK_BYTES = 512  # of getrusage
MOST_WAITING = 3  # times its seconds: the longest cold measurement, dropping files included
POLL_S = 0.001
DROP_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK


@dataclass(frozen=True, slots=True)
class Speed:
    """Patches per second of all ``processes`` together.

    ``warm`` is the rate from files in the page cache, ``cold`` the rate after the files were dropped from it,
    or None if that cannot be measured. ``disk_bytes_per_s`` were read from disk during the cold measurement,
    None if the system does not count them. ``kept`` is the share of pages that the system did not drop.
    """

    processes: int
    warm: float
    cold: float | None = None
    disk_bytes_per_s: float | None = None
    kept: float = 0.0


@dataclass(frozen=True, slots=True)
class ReadingTask:
    """The measurement of one process, which is number ``number`` of ``processes``.

    It reads groups of ``group`` patches of ``subjects``, one after the other, for about ``seconds`` warm and,
    with ``cold``, as long cold. Processes wait for each other in the folder ``meeting`` before they start.
    """

    store: Path
    subjects: tuple[Subject, ...]
    patch_size: Triple
    group: int
    seconds: float
    cold: bool
    number: int
    processes: int
    meeting: Path

    def groups(self) -> Iterator[PatchGroup]:
        """Endless random groups; the subjects take turns."""
        for number, subject in enumerate(itertools.cycle(self.subjects)):
            stream = rng(1, subject=self.number, draw=number)
            yield PatchGroup.drawn(subject, self.patch_size, self.group, stream)

    def meet(self, start: str) -> None:
        """Wait until all processes are at the start of this name.

        Raises WorkerError if this process has been there before: it was killed and started again.
        """
        try:
            Path(self.meeting, f"{start}-{self.number}").touch(exist_ok=False)
        except FileExistsError:
            raise WorkerError(
                "a process that read patches was killed, perhaps for want of memory; try fewer jobs="
            ) from None
        while len(list(self.meeting.glob(f"{start}-*"))) < self.processes:
            time.sleep(POLL_S)


def reading_speed(
    store: Path,
    subjects: Sequence[Subject],
    *,
    patch_size: Triple,
    group: int,
    processes: int,
    seconds: float,
) -> Speed:
    """Measure ``processes`` at once, for about ``seconds`` cold and as long warm.

    In the cold measurement processes read different subjects, so that none loads files for another.
    Raises WorkerError if a process is killed.
    """
    cold = hasattr(os, "posix_fadvise") and len(subjects) >= processes
    close_shards(store)  # forked processes would inherit the maps, and mapped files are not dropped
    with TemporaryDirectory(prefix="zpatch-bench-") as meeting:
        tasks = [
            ReadingTask(
                store=store,
                subjects=tuple(subjects[number::processes] or subjects),
                patch_size=patch_size,
                group=group,
                seconds=seconds,
                cold=cold,
                number=number,
                processes=processes,
                meeting=Path(meeting),
            )
            for number in range(processes)
        ]
        speeds = []
        for _, speed in run_tasks(_measured, tasks, jobs=processes):
            if isinstance(speed, WorkerError):
                raise speed
            speeds.append(speed)
    return Speed(
        processes,
        warm=sum(speed.warm for speed in speeds),
        cold=sum(speed.cold or 0 for speed in speeds) if cold else None,
        disk_bytes_per_s=sum(speed.disk_bytes_per_s or 0 for speed in speeds) or None,
        kept=max(speed.kept for speed in speeds),
    )


def _measured(task: ReadingTask, _progress: Progress) -> Speed:
    """The speed of one process: first cold, then warm, on the same groups."""
    upcoming = task.groups()
    next(upcoming).read()  # loads modules that are imported at first use
    cold = None
    if task.cold:
        task.meet("cold")
        cold = _read_cold(task, upcoming)
    ready = _read_once(itertools.chain(cold.groups if cold else [], upcoming), task.seconds / 2)
    task.meet("warm")
    patches = 0
    begin = time.perf_counter()
    for group in itertools.cycle(ready):
        group.read()
        patches += task.group
        if (taken_s := time.perf_counter() - begin) >= task.seconds:
            break
    speed = Speed(task.processes, warm=patches / taken_s)
    if cold is None:
        return speed
    patches = task.group * len(cold.groups)
    return dataclasses.replace(
        speed,
        cold=patches / cold.taken_s,
        disk_bytes_per_s=cold.disk_bytes / cold.taken_s,
        kept=cold.kept_pages / max(cold.pages, 1),
    )


@dataclass(slots=True)
class _ColdReads:
    """A cold measurement: the files of each of ``groups`` were dropped from the page cache first."""

    groups: list[PatchGroup] = field(default_factory=list)
    taken_s: float = 0.0
    disk_bytes: int = 0
    pages: int = 0
    kept_pages: int = 0


def _read_cold(task: ReadingTask, upcoming: Iterator[PatchGroup]) -> _ColdReads:
    done = _ColdReads()
    until = time.perf_counter() + MOST_WAITING * task.seconds
    while not done.groups or (done.taken_s < task.seconds and time.perf_counter() < until):
        group = next(upcoming)
        close_shards(task.store)  # mapped files are not dropped
        for file in group.shard_files():
            pages, kept = _drop(file)
            done.pages += pages
            done.kept_pages += kept
        blocks = _blocks_read()
        begin = time.perf_counter()
        group.read()
        done.taken_s += time.perf_counter() - begin
        done.disk_bytes += (_blocks_read() - blocks) * BLOCK_BYTES
        done.groups.append(group)
    return done


def _read_once(groups: Iterable[PatchGroup], seconds: float) -> list[PatchGroup]:
    """The groups that were read within about ``seconds``: their files are now in the page cache."""
    ready = []
    until = time.perf_counter() + seconds
    for group in groups:
        group.read()
        ready.append(group)
        if time.perf_counter() >= until:
            break
    return ready


def _blocks_read() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_inblock


def _drop(file: Path) -> tuple[int, int]:
    """Drop a file from the page cache; returns its number of pages, and how many of them stayed.

    Pages stay if another process maps the file. Where the system does not say, all pages count as kept.
    """
    try:
        # Opened as shards are: without following links, and without waiting for a pipe.
        with open(file, "rb", opener=lambda path, _: os.open(path, DROP_FLAGS)) as stream:
            os.fsync(stream.fileno())  # dirty pages cannot be dropped
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            mapped = np.memmap(stream, dtype=np.uint8, mode="r")
    except (OSError, ValueError):  # reading the file raises the error
        return 0, 0
    pages = np.zeros(-(-mapped.size // os.sysconf("SC_PAGE_SIZE")), dtype=np.uint8)
    address, size, states = (ctypes.c_void_p(n) for n in (mapped.ctypes.data, mapped.size, pages.ctypes.data))
    if ctypes.CDLL(None).mincore(address, size, states):
        return pages.size, pages.size
    return pages.size, int((pages & 1).sum())
