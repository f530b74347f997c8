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

# Large pieces are freed with small ones left between them, so that malloc cannot give them back by itself.
PROGRAM = """
import torch
from zpatch.runtime.process_memory import resident_bytes, return_freed
mine = [(torch.ones(2**20), bytearray(600)) for _ in range(64)]
held = resident_bytes()
small = [piece for _, piece in mine]
del mine
kept = resident_bytes()
return_freed()
print(held, kept, resident_bytes())
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
def test_freed_memory_that_malloc_keeps_is_returned() -> None:
    command = [sys.executable, "-c", PROGRAM]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    held, kept, left = map(int, output.split())
    assert left <= kept
    assert left < held - 200 * MIB


def test_without_proc_the_memory_is_the_peak_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_memory, "_STATUS", Path("/no/such/file"))
    assert process_memory.resident_bytes() > 10 * MIB
