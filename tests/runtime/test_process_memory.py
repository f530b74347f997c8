"""The memory of a process, and the return of freed memory that malloc keeps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from zpatch.runtime import process_memory

LINUX = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
MIB = 2**20

# A network's memory: large pieces are freed with small ones left between them, so that malloc keeps them.
PROGRAM = """
import contextlib, sys
import torch
from zpatch.runtime.process_memory import freed_at_once, resident_bytes

def held_by_64(small):
    mine = [(torch.ones(2**20), bytearray(600)) for _ in range(64)]
    held = resident_bytes()
    small += [piece for _, piece in mine]
    del mine
    return held - resident_bytes()

small = []
held_by_64(small)  # malloc has raised its threshold
with freed_at_once() if sys.argv[1] == "at once" else contextlib.nullcontext():
    with freed_at_once() if sys.argv[1] == "at once" else contextlib.nullcontext():
        torch.ones(1)
    print(held_by_64(small))
print(held_by_64(small))
"""


@LINUX
def test_memory_that_is_filled_is_held_and_memory_that_is_freed_is_not() -> None:
    before = process_memory.resident_bytes()
    filled = np.ones(64 * MIB, dtype=np.uint8)
    held = process_memory.resident_bytes()
    assert held - before > 60 * MIB
    del filled
    assert process_memory.resident_bytes() < held - 60 * MIB


@LINUX
def test_freed_blocks_are_returned_at_once_within_a_block_and_kept_after_it() -> None:
    within, after = map(int, printed("at once").split())
    assert within > 250 * MIB
    assert after < 64 * MIB
    assert max(map(int, printed("as usual").split())) < 64 * MIB


def printed(how: str) -> str:
    command = [sys.executable, "-c", PROGRAM, how]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


@LINUX
def test_the_peak_is_measured_anew_after_it_is_reset() -> None:
    np.ones(96 * MIB, dtype=np.uint8)
    process_memory.reset_peak()
    before = process_memory.resident_bytes()
    np.ones(32 * MIB, dtype=np.uint8)
    grown = process_memory.peak_bytes() - before
    assert 30 * MIB < grown < 40 * MIB
    assert process_memory.private_bytes() <= process_memory.resident_bytes()


def test_without_proc_the_memory_is_the_peak_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_memory, "_STATUS", Path("/no/such/file"))
    assert process_memory.resident_bytes() > 10 * MIB
    assert process_memory.resident_bytes() == process_memory.peak_bytes() == process_memory.private_bytes()
