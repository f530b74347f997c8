"""The memory of this process, and returning freed memory to the system."""

from __future__ import annotations

import contextlib
import ctypes
import resource
from pathlib import Path

_STATUS = Path("/proc/self/status")


def resident_bytes() -> int:
    """Bytes of the process without mapped files; where that is not known, its peak memory."""
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def return_freed() -> None:
    """Have the GNU C library give freed memory back to the system, which it keeps in pieces otherwise."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
