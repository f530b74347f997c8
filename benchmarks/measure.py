"""How things are measured: alternating repetitions in one process, peak memory in a fresh one.

This file is also what a fresh process runs: ``python -m benchmarks.measure module:function argument...``, or
with ``--answer`` before that, one that answers questions.
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
WATCH_S = 0.1  # looking costs as much as a small read
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
    """Seconds that each takes, as A B C A B C ...: whatever else the machine does meets all of them.

    ``before_each``, and ``before_round`` ahead of each A, are not timed.
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
    """How many times as long those take as these: the median over the repetitions, pair by pair."""
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
    """Make a fresh process steady: this thread and those it will start on one core, if so wished, and the
    allocator keeping what is freed, as loaders do that reuse their memory. Without that the kernel's clearing
    of new pages is a good part of what any reader of large patches takes.
    """
    if one_core:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with contextlib.suppress(AttributeError):  # another C library than glibc
        for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            ctypes.CDLL(None).mallopt(option, KEPT_BYTES)


def drop_cache(path: Path) -> bool:
    """Have the kernel forget the pages of a file, or of all below a folder; whether it did.

    Files must be synced, and mapped by no process.
    """
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    cached = [_drop_file(file) for file in files]
    return not any(cached)


def _drop_file(file: Path) -> bool:
    """Whether any page is still in memory."""
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
    """What a function did in a fresh process: its value, the tree's peak memory, and the whole time,
    the interpreter's start and end included."""

    value: Any
    peak_bytes: int
    seconds: float


def in_fresh_process(function: str, *arguments: object, env: Mapping[str, str] | None = None) -> FreshRun:
    """Call ``module:function`` of this package in a new process; arguments arrive as text."""
    command = [sys.executable, "-m", "benchmarks.measure", function, *map(str, arguments)]
    begin = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:  # a pipe that nobody empties would stop it at 64 KiB
        with subprocess.Popen(command, cwd=ROOT, stdout=said, text=True, env=_env(env)) as process:
            tree_bytes = _peak_of_tree(process)
        said.seek(0)
        lines = said.read().splitlines()
    seconds = time.perf_counter() - begin
    if process.returncode:
        raise RuntimeError(f"{function} ended with {process.returncode} in a fresh process")
    answer = json.loads(lines[-1])
    return FreshRun(answer["value"], max(answer["peak_bytes"], tree_bytes), seconds)


class Server:
    """A fresh process that answers questions, so that several can take turns, each with its own libraries.

    ``module:function`` is called there once, and gives what is called with each question.
    """

    def __init__(self, function: str, *arguments: object, env: Mapping[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "benchmarks.measure", "--answer", function, *map(str, arguments)]
        pipe = subprocess.PIPE
        self._name = " ".join([function, *map(str, arguments)])
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True, env=_env(env))
        self.peak_bytes = 0

    def ask(self, question: str, *, watch: bool = False) -> Any:
        """The answer. With ``watch`` the most memory that the process and its descendants held is kept."""
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
        """Ask no more; the process ends by itself."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended; what it said is the error to see
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
    """Memory that some processes hold: anonymous and shared, not the pages of files that they map."""
    return sum(_proportional_bytes(pid, kinds) for pid in pids)


def _peak_of_tree(process: subprocess.Popen[str]) -> int:
    """The most that a process and its descendants together held, looked at every 20 ms.

    The kernel's own high-water mark of the first process, exact, is taken where that is higher.
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
    """Memory of a process, pages that it shares counted by share; 0 once it has gone."""
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
    os.dup2(2, 1)  # what libraries print is no answer
    answer = _called(function, *arguments)
    for question in sys.stdin:
        print(json.dumps(answer(question.rstrip("\n"))), file=answers, flush=True)
    del answer  # and what it holds, workers too, while the interpreter is still whole
    gc.collect()


def _called(function: str, *arguments: str) -> Any:
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(f"benchmarks.{module}"), name)(*arguments)


if __name__ == "__main__":
    _main(*sys.argv[1:])
