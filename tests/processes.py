"""Helpers for tests of processes: running children, waiting, shared memory, a small Dask cluster."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import psutil

DEADLINE_S = 10
SHARED_MEMORY = Path("/dev/shm")


def children() -> list[int]:
    """The running child processes of this one, without Python's resource tracker."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if not any("resource_tracker" in part for part in child.cmdline()) and is_running(child.pid):
                found.append(child.pid)
    return found


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
    return set(os.listdir(SHARED_MEMORY)) if SHARED_MEMORY.exists() else set()


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
