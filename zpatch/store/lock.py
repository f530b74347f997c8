"""A lock that admits one writer to each store, and errors of the disk that name the store."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from zpatch.errors import StoreError, StoreLockedError, ZpatchError
from zpatch.records.names import LOCK
from zpatch.runtime.guarded_files import open_regular

DYING_WORKERS_S = 10
MOST_HOLDER_BYTES = 512


@contextlib.contextmanager
def writing_to(store: Path) -> Iterator[None]:
    """Turn errors of the disk, such as a full one, into a ``StoreError`` that names the store or the file."""
    try:
        yield
    except OSError as error:
        if isinstance(error, ZpatchError):
            raise
        raise StoreError(
            f"{store}: it cannot be written to ({error.strerror or error}); "
            f"see to its disk, then run the same command again"
        ) from error


def take_lock(path: Path) -> IO[str]:
    """Make the folder of a store if it does not exist, and hold its lock until the stream is closed.

    A lock whose holder was killed is waited for, as its workers still hold it for a moment; any other holder
    raises ``StoreLockedError``.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{path}: it cannot be made ({error.strerror})") from None
    with writing_to(path):
        lock = os.fdopen(open_regular(path / LOCK, os.O_RDWR | os.O_APPEND | os.O_CREAT), "a+")
    until = time.monotonic() + DYING_WORKERS_S
    while not _is_free(lock):
        lock.seek(0)
        holder = lock.read(MOST_HOLDER_BYTES).strip() or "another process"
        if _may_live(holder) or time.monotonic() > until:
            lock.close()
            raise StoreLockedError(f"{path}: {holder} is writing to it; wait until it has ended")
        time.sleep(0.05)
    with writing_to(path):
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
    return lock


def writer_of(path: Path) -> str | None:
    """Which process is writing to a store, in words; None if none is."""
    try:
        with os.fdopen(open_regular(path / LOCK, os.O_RDONLY)) as lock:
            if _is_free(lock, fcntl.LOCK_SH):
                return None
            return lock.read(MOST_HOLDER_BYTES).strip() or "another process"
    except (OSError, ZpatchError):  # it was never written to by a process with a lock, or is not ours to open
        return None


def _is_free(lock: IO[str], how: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(lock, how | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _may_live(holder: str) -> bool:
    """Whether the holder of a lock may still run; True for a holder on another machine.

    The workers of a killed holder, which hold the lock with it, end a moment later: until then they may still
    write to staging.
    """
    found = re.fullmatch(rf"process (\d+) on {re.escape(socket.gethostname())}", holder)
    if found is None:
        return True
    try:
        os.kill(int(found[1]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
