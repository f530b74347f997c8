"""Helpers for tests of processes: running children, waiting, shared memory, a small Dask cluster."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import forked
import psutil

from zpatch.slides import openslide_file, tiff_file

DEADLINE_S = 10
LISTS_CHILDREN = Path(f"/proc/self/task/{os.getpid()}/children").exists()
SHARED_MEMORY = Path("/dev/shm")


def children() -> list[int]:
    """The running processes below this one, without Python's resource tracker and the fork server."""
    return [pid for pid in child_pids() if pid not in forked.server_pids() and _counts(pid)]


def child_pids() -> list[int]:
    """All processes below this one."""
    if not LISTS_CHILDREN:
        return [child.pid for child in psutil.Process().children(recursive=True)]
    return _pids_below(os.getpid())


def _pids_below(parent: int) -> list[int]:
    """From Linux's list of each thread: psutil reads the state of every process of the machine."""
    found: list[int] = []
    with contextlib.suppress(OSError):  # ended just now
        for thread in os.listdir(f"/proc/{parent}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{parent}/task/{thread}/children") as listed:
                found += map(int, listed.read().split())
    return [*found, *(pid for child in found for pid in _pids_below(child))]


def _counts(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return is_running(pid) and not any(
            "resource_tracker" in part for part in psutil.Process(pid).cmdline()
        )
    return False


def eventually(condition: Callable[[], Any], what: str, deadline_s: float = 60) -> Any:
    until = time.monotonic() + deadline_s
    while time.monotonic() < until:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError(f"not within {deadline_s} s: {what}")


def is_running(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False


def shared_memory() -> set[str]:
    """The names of all blocks and semaphores in shared memory."""
    with os.scandir(SHARED_MEMORY) as entries:
        return {entry.name for entry in entries if not entry.is_dir()}


def without_other_programs(names: set[str], own_pids: Collection[int]) -> set[str]:
    """Those of ``names`` that exist and that only ``own_pids`` may map, as tests run beside each other.

    Inodes are compared: a semaphore's creator maps it under a temporary name.
    """
    mapped = set()
    for pid in set(psutil.pids()) - set(own_pids) if names else ():
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
            mapped |= {int(line.split(None, 5)[4]) for line in lines if str(SHARED_MEMORY) in line}
    found = set()
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            if (SHARED_MEMORY / name).stat().st_ino not in mapped:
                found.add(name)
    return found


@contextlib.contextmanager
def local_cluster(workers: int = 2) -> Iterator[Any]:
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=workers, threads_per_worker=1, processes=True, dashboard_address=":0", silence_logs=50
    ) as cluster:
        yield cluster


def close_slides(folder: Path) -> None:
    """Close the slides below a folder that this process keeps open."""
    for door in (tiff_file._open, openslide_file._open):
        door.forget(lambda key: key[1].path.is_relative_to(folder))
