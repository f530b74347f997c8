"""How many patches a second some processes read: from files that are in the page cache, and that are not."""

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

from zpatch.bench.trial_stores import PatchGroup
from zpatch.chunks.mapped_shards import close_shards
from zpatch.errors import WorkerError
from zpatch.geometry.boxes import Triple
from zpatch.images.subject import Subject
from zpatch.runtime.task_contract import Progress
from zpatch.runtime.tasks import run_tasks
from zpatch.sampling.randomness import rng

BLOCK_BYTES = 512  # of getrusage
MOST_WAITING = 3  # a cold measurement takes at most so many times its seconds, dropping files included
POLL_S = 0.001
DROP_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK


@dataclass(frozen=True, slots=True)
class Speed:
    """Patches per second of some processes together: ``warm`` from the page cache, ``cold`` with files that
    were dropped from it, None where that cannot be measured.

    ``disk_bytes_per_s`` were read from the disk meanwhile, None where the system does not say; ``kept`` is
    the share of the files' pages that the system would not drop.
    """

    processes: int
    warm: float
    cold: float | None = None
    disk_bytes_per_s: float | None = None
    kept: float = 0.0


@dataclass(frozen=True, slots=True)
class ReadingTask:
    """What one of some processes measures: groups of patches of ``subjects``, one after the other.

    Processes meet in the folder ``meeting`` before they start their clocks.
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
        """Random groups without end, each subject as often as the others."""
        for number, subject in enumerate(itertools.cycle(self.subjects)):
            stream = rng(1, subject=self.number, draw=number)
            yield PatchGroup.drawn(subject, self.patch_size, self.group, stream)

    def meet(self, where: str) -> None:
        """Wait until all processes have come here."""
        try:
            Path(self.meeting, f"{where}-{self.number}").touch(exist_ok=False)
        except FileExistsError:
            raise WorkerError(
                "a process that read patches was killed, perhaps for want of memory; try fewer --jobs"
            ) from None
        while len(list(self.meeting.glob(f"{where}-*"))) < self.processes:
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
    """Measure with some processes at a time, about ``seconds`` cold and as long warm.

    Cold, each process reads subjects of its own, so that none fetches files for another.
    """
    cold = hasattr(os, "posix_fadvise") and len(subjects) >= processes
    close_shards(store)  # or processes that fork from this one would have the files mapped, and not drop them
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
        names = [f"read-{number}" for number in range(processes)]
        speeds = []
        for _, speed in run_tasks(_measured, tasks, folder=store, names=names, jobs=processes):
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
    """The speed of one process: cold first, then the same groups again, warm."""
    upcoming = task.groups()
    next(upcoming).read()  # what is imported at first use
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
    """Groups whose files were dropped from the page cache before each was read."""

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
        close_shards(task.store)  # what is mapped is not dropped
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
    """Those of the groups that were read in about so long: now their files are in the page cache."""
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
    """Have the system forget a file; how many pages it has, and how many stay in memory all the same.

    Pages stay where another process has the file mapped, and not every system says which do.
    """
    try:
        # As shards are opened: no links, and no waiting for a pipe that stands for a file.
        with open(file, "rb", opener=lambda path, _: os.open(path, DROP_FLAGS)) as stream:
            os.fsync(stream.fileno())  # what is still to be written cannot be dropped
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            mapped = np.memmap(stream, dtype=np.uint8, mode="r")
    except (OSError, ValueError):  # reading it will say what is wrong
        return 0, 0
    pages = np.zeros(-(-mapped.size // os.sysconf("SC_PAGE_SIZE")), dtype=np.uint8)
    address, size, states = (ctypes.c_void_p(n) for n in (mapped.ctypes.data, mapped.size, pages.ctypes.data))
    if ctypes.CDLL(None).mincore(address, size, states):
        return pages.size, pages.size
    return pages.size, int((pages & 1).sum())
