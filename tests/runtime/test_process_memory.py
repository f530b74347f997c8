"""The memory of a process, and the return of freed memory that malloc keeps."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

import forked
import numpy as np
import pytest

from zpatch.runtime import process_memory

LINUX = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
MIB = 2**20


# Whether a block of 24 MiB is mapped by itself, so that it goes back to the system when it is freed.
PROGRAM = """
import ctypes
import torch
from zpatch.runtime.process_memory import freed_at_once

class State(ctypes.Structure):  # of mallinfo2(3)
    _fields_ = [(f"_{n}", ctypes.c_size_t) for n in range(4)] + [("mapped", ctypes.c_size_t)]
    _fields_ += [(f"_{n}", ctypes.c_size_t) for n in range(5, 10)]

ask = ctypes.CDLL(None).mallinfo2
ask.restype = State

def is_mapped():
    before = ask().mapped
    block = torch.ones(6 * 2**20)
    return ask().mapped - before >= block.nbytes

with freed_at_once():
    found = [is_mapped()]
    with freed_at_once():
        found.append(is_mapped())
    found.append(is_mapped())
print(*found, is_mapped())
"""

# Whether freed blocks of 24 MiB stay with the process, and are returned when that is asked for.
KEEPING_PROGRAM = """
import torch
from zpatch.runtime.process_memory import freed_at_once, kept_when_freed, resident_bytes, return_freed

def is_kept():
    blocks = [torch.ones(6 * 2**20) for _ in range(4)]
    before = resident_bytes()
    del blocks
    return before - resident_bytes() < 24 * 2**20

with kept_when_freed():
    found = [is_kept()]
    before = resident_bytes()
    return_freed()
    found.append(before - resident_bytes() > 80 * 2**20)
    with freed_at_once():
        with kept_when_freed():
            found.append(is_kept())
print(*found)
"""


def filled(mib: int) -> None:
    """Fill new pages and return them: malloc might give some that it kept."""
    with mmap.mmap(-1, mib * MIB) as pages:
        np.frombuffer(pages, np.uint8)[:] = 1


@LINUX
def test_memory_that_is_filled_is_held_and_memory_that_is_freed_is_not() -> None:
    before = process_memory.resident_bytes()
    filled = np.ones(64 * MIB, dtype=np.uint8)
    held = process_memory.resident_bytes()
    assert held - before > 60 * MIB
    del filled
    assert process_memory.resident_bytes() < held - 60 * MIB


@LINUX
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="asks the GNU C library")
def test_blocks_go_back_to_the_system_when_they_are_freed_as_long_as_any_thread_wants_it() -> None:
    assert forked.run(PROGRAM).stdout.split() == ["True", "True", "True", "False"]


@LINUX
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="asks the GNU C library")
def test_blocks_are_kept_for_the_next_ones_unless_any_thread_wants_them_returned() -> None:
    assert forked.run(KEEPING_PROGRAM).stdout.split() == ["True", "True", "False"]


@LINUX
def test_the_peak_is_measured_anew_after_it_is_reset() -> None:
    filled(96)
    process_memory.reset_peak()
    before = process_memory.resident_bytes()
    filled(32)
    grown = process_memory.peak_bytes() - before
    assert 30 * MIB < grown < 40 * MIB
    assert process_memory.private_bytes() <= process_memory.resident_bytes()


def test_without_proc_the_memory_is_the_peak_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_memory, "_STATUS", Path("/no/such/file"))
    assert process_memory.resident_bytes() > 10 * MIB
    assert process_memory.resident_bytes() == process_memory.peak_bytes() == process_memory.private_bytes()
