"""Measuring: alternating repetitions in one process, and peak memory of a fresh process.

Fresh processes run this module: ``python -m benchmarks.measure module:function argument...``. With
``--answer`` before the function, the process answers questions until its input is closed.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import mmap
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
POLL_S = 0.02
WATCH_S = 0.1  # asking for the memory takes as long as a small read
CLOSE_S = 30.0
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
KEPT_BYTES = 32 * 2**20
ANONYMOUS, SHARED = "Pss_Anon:", "Pss_Shmem:"  # of /proc/PID/smaps_rollup
HELD = ANONYMOUS, SHARED

Run = Callable[[], object]


def alternate(
    contenders: Mapping[str, Run],
    repetitions: int,
    *,
    before_each: Run = lambda: None,
    before_round: Run = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each run, in the order A B C A B C ..., so that other load on the machine affects all alike.

    ``before_each`` is called before each run, and ``before_round`` before each A; neither is timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repetitions):
        before_round()
        for name, run in contenders.items():
            before_each()
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def times_as_long(those: Sequence[float], these: Sequence[float]) -> float:
    """The ratio of two contenders' times, ``those`` over ``these``: the median over pairs of repetitions."""
    return statistics.median(a / b for a, b in zip(those, these, strict=True))


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Keep this thread on one core."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def settle(*, one_core: bool) -> None:
    """Prepare a fresh process for timing.

    With ``one_core`` this thread and all threads that it starts run on one core. The allocator keeps freed
    memory, as loaders do that reuse their buffers; otherwise the clearing of new pages by the kernel is a
    large part of the time of any reader of large patches.
    """
    if one_core:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with contextlib.suppress(AttributeError):  # another C library than glibc
        for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            ctypes.CDLL(None).mallopt(option, KEPT_BYTES)


def drop_cache(path: Path) -> bool:
    """Drop the pages of a file, or of all files below a folder, from the page cache; whether none is left.

    Files must be synced, and mapped by no process.
    """
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    cached = [_drop_file(file) for file in files]
    return not any(cached)


def _drop_file(file: Path) -> bool:
    """Drop the pages of a file; whether any is still in memory."""
    with file.open("rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if not os.fstat(stream.fileno()).st_size:
            return False
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
            start = ctypes.c_char.from_buffer(mapped)
            pages = ctypes.create_string_buffer(-(-len(mapped) // mmap.PAGESIZE))
            failed = ctypes.CDLL(None).mincore(ctypes.byref(start), ctypes.c_size_t(len(mapped)), pages)
            del start
    return bool(failed) or any(page & 1 for page in pages.raw)


@dataclass(frozen=True, slots=True)
class FreshRun:
    """The result of a function in a fresh process.

    ``value`` is what it returned, ``peak_bytes`` the peak memory of the process and its children, ``seconds``
    the time of the whole process, with the start and end of the interpreter.
    """

    value: Any
    peak_bytes: int
    seconds: float


def in_fresh_process(function: str, *arguments: object, env: Mapping[str, str] | None = None) -> FreshRun:
    """Call ``module:function`` of this package in a new process; arguments arrive as text."""
    command = [sys.executable, "-m", "benchmarks.measure", function, *map(str, arguments)]
    begin = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:  # a pipe that is not read would block it at 64 KiB
        with subprocess.Popen(command, cwd=ROOT, stdout=output, text=True, env=_env(env)) as process:
            tree_bytes = _peak_of_tree(process)
        output.seek(0)
        lines = output.read().splitlines()
    seconds = time.perf_counter() - begin
    if process.returncode:
        raise RuntimeError(f"{function} ended with {process.returncode} in a fresh process")
    answer = json.loads(lines[-1])
    return FreshRun(answer["value"], max(answer["peak_bytes"], tree_bytes), seconds)


class Server:
    """A fresh process that answers questions, so that contenders with different libraries can take turns.

    ``module:function`` is called there once, and returns the function that is called with each question.
    """

    def __init__(self, function: str, *arguments: object, env: Mapping[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "benchmarks.measure", "--answer", function, *map(str, arguments)]
        pipe = subprocess.PIPE
        self._name = " ".join([function, *map(str, arguments)])
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True, env=_env(env))
        self.peak_bytes = 0

    def ask(self, question: str, *, watch: bool = False) -> Any:
        """Return the answer; with ``watch``, update ``peak_bytes`` of the process and its descendants."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(question, file=self._process.stdin, flush=True)
        while watch and not select.select([self._process.stdout], [], [], WATCH_S)[0]:
            self.peak_bytes = max(self.peak_bytes, held_bytes(tree_of(self._process.pid)))
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._name} ended with {self._process.wait()}")
        return json.loads(line)

    def end(self) -> None:
        """Close the input, so that the process ends by itself."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended already, and printed its error
            self._process.stdin.close()

    def close(self) -> None:
        """End the process, and wait until it has ended."""
        assert self._process.stdout is not None
        self.end()
        try:
            self._process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def _env(changes: Mapping[str, str] | None) -> dict[str, str]:
    return {**os.environ, **(changes or {})}


def tree_of(pid: int) -> list[int]:
    """A process and its descendants."""
    import psutil  # type: ignore[import-untyped]

    try:
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.Error:
        return []


def held_bytes(pids: Sequence[int], kinds: Sequence[str] = HELD) -> int:
    """Memory of some processes together: anonymous and shared, without the pages of mapped files."""
    return sum(_proportional_bytes(pid, kinds) for pid in pids)


def _peak_of_tree(process: subprocess.Popen[str]) -> int:
    """The peak memory of a process and its descendants together, sampled every 20 ms; 0 without descendants.

    The caller compares it with the kernel's exact high-water mark of the process itself.
    """
    import psutil

    peak = 0
    root = psutil.Process(process.pid)
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):
            children = root.children(recursive=True)
            if children:
                peak = max(peak, sum(_proportional_bytes(p.pid) for p in (root, *children)))
        time.sleep(POLL_S)
    return peak


def _proportional_bytes(pid: int, kinds: Sequence[str] = ("Pss:",)) -> int:
    """Memory of a process, with its share of shared pages; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(tuple(kinds)))


def _high_water_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _main(function: str, *arguments: str) -> None:
    if function == "--answer":
        _answer(*arguments)
        return
    value = _called(function, *arguments)
    print(json.dumps({"value": value, "peak_bytes": _high_water_bytes()}))


def _answer(function: str, *arguments: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the output of libraries must not mix with answers
    answer = _called(function, *arguments)
    for question in sys.stdin:
        print(json.dumps(answer(question.rstrip("\n"))), file=answers, flush=True)
    del answer  # with its workers, before the interpreter shuts down
    gc.collect()


def _called(function: str, *arguments: str) -> Any:
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(f"benchmarks.{module}"), name)(*arguments)


if __name__ == "__main__":
    _main(*sys.argv[1:])
