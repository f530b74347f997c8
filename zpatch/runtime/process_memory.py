"""What this process holds of the system's memory, and giving back what malloc keeps of it."""

from __future__ import annotations

import contextlib
import ctypes
import resource
from pathlib import Path

_STATUS = Path("/proc/self/status")


def resident_bytes() -> int:
    """What the process holds, beside mapped files; where the system does not tell, the most it ever held."""
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def return_freed() -> None:
    """Have the GNU C library give freed memory back to the system, which it keeps in pieces otherwise."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
