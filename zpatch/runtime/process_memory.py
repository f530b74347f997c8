"""The memory of this process: what it holds, its peak, and whether freed memory is kept or returned."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

_STATUS = Path("/proc/self/status")
_RESETS_PEAK = Path("/proc/self/clear_refs")

# Of the GNU C library's mallopt(3). It raises its thresholds as large blocks are freed, up to these maxima.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
FIRST_THRESHOLD, LAST_MMAP_THRESHOLD, LAST_TRIM_THRESHOLD = 2**17, 2**25, 2**26
KEEPS_ALL = 2**31 - 1

_running: set[object] = set()  # the blocks of freed_at_once, in all threads: malloc has one setting


def resident_bytes() -> int:
    """Bytes of the process in memory, with its libraries; where that is not known, its peak."""
    return _status("VmRSS") or _peak_of_life()


def private_bytes() -> int:
    """Bytes of the process without mapped files, which other processes share; or else its peak."""
    return _status("RssAnon") or _peak_of_life()


def peak_bytes() -> int:
    """The most bytes that were in memory since ``reset_peak``; or since the process began."""
    return _status("VmHWM") or _peak_of_life()


def reset_peak() -> None:
    """Begin to measure the peak anew, where the system can."""
    with contextlib.suppress(OSError):
        _RESETS_PEAK.write_text("5")


def _status(key: str) -> int | None:
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    return None


def _peak_of_life() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextlib.contextmanager
def freed_at_once() -> Iterator[None]:
    """Let the GNU C library return each large block to the system as it is freed.

    Otherwise it keeps freed blocks of up to 32 MiB, in pieces that do not fit what is allocated next: a
    network then holds more than it needs. Afterwards its thresholds are those of a process that has freed
    large blocks. Other libraries do not change.
    """
    this = object()
    _running.add(this)
    _set_thresholds(FIRST_THRESHOLD, FIRST_THRESHOLD)
    try:
        yield
    finally:
        _running.discard(this)
        if not _running:
            _set_thresholds(LAST_MMAP_THRESHOLD, LAST_TRIM_THRESHOLD)


@contextlib.contextmanager
def kept_when_freed() -> Iterator[None]:
    """Let the GNU C library keep all blocks of up to 32 MiB that are freed, for the next ones.

    The system provides new memory page by page, which for the outputs of a network takes as long as filling
    them. What is kept is in pieces, of which more and more may be needed: see to it by ``return_freed``. The
    rest is returned at the end. While a block of ``freed_at_once`` runs in any thread,
    nothing is kept.
    """
    if not _running:
        _set_thresholds(LAST_MMAP_THRESHOLD, KEEPS_ALL)
    try:
        yield
    finally:
        if not _running:
            _set_thresholds(LAST_MMAP_THRESHOLD, LAST_TRIM_THRESHOLD)


def _set_thresholds(of_mmap: int, of_trim: int) -> None:
    """Set both thresholds, and return what is free already."""
    with contextlib.suppress(AttributeError, OSError):
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, of_mmap)
        library.mallopt(M_TRIM_THRESHOLD, of_trim)
    return_freed()


def return_freed() -> None:
    """Return the memory that the GNU C library keeps to the system."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
