"""Processes that start at once: a server imports the libraries, and forks a clean child for each program.

A child has imported what most programs need and has done nothing else. It has standard streams, a folder, an
environment and a process group of its own. Where imports, start or shutdown are tested, a process is fresh.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

IMPORTED = (
    "nibabel", "torch", "zarr.codecs", "zpatch.bench.benchmark", "zpatch.cli.bench", "zpatch.cli.convert",
    "zpatch.cli.predict", "zpatch.conversion.conversion", "zpatch.loading.patch_queue",
    "zpatch.prediction.inference",
)  # fmt: skip
M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # parameters of mallopt, in malloc.h
MESSAGE_BYTES = 2**17
NO_OPTIONS: Mapping[int, int] = {}
SYNC = os.fsync  # children sync files to the disk if this process does

Program = str | Callable[..., Any]  # text, which finds its arguments in sys.argv; or a function of a module


class Forked:
    """A running child: what tests use of ``subprocess.Popen``. Its block ends all of its process group."""

    def __init__(self, status: socket.socket, stdin: int, stdout: int, stderr: IO[str]) -> None:
        self.stdin = os.fdopen(stdin, "w", encoding="utf-8")
        self.returncode: int | None = None
        self._stdout = os.fdopen(stdout, "rb", buffering=0)
        self._stderr = stderr
        self._status = status
        self.pid = int(json.loads(status.recv(MESSAGE_BYTES)))

    def poll(self) -> int | None:
        """The exit code, or minus the number of the signal; None while the child runs."""
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self) -> int:
        """The exit code once the child has ended."""
        if self.returncode is None:
            self.returncode = int(json.loads(self._status.recv(MESSAGE_BYTES)))
            self._status.close()
        return self.returncode

    def read_line(self) -> str:
        """The next line of stdout."""
        return self._stdout.readline().decode()

    def communicate(self, timeout: float = 60) -> tuple[str, str]:
        """Close stdin; stdout and stderr up to the end of the child, even if workers of it run on."""
        self.stdin.close()
        out, open_ones, until = b"", [self._stdout, self._status], time.monotonic() + timeout
        while self.poll() is None:
            ready, _, _ = select.select(open_ones, [], [], max(0, until - time.monotonic()))
            if not ready:
                raise subprocess.TimeoutExpired("a forked program", timeout)
            if self._stdout in ready:
                part = self._stdout.read(2**16)
                out += part
                open_ones = open_ones if part else [self._status]
        with self._stdout as stdout, self._stderr as stderr:
            os.set_blocking(stdout.fileno(), False)
            stderr.seek(0)
            return (out + (stdout.read() or b"")).decode(), stderr.read()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        if not self._stdout.closed:
            self.communicate()


class ForkServer:
    """A process that has imported the libraries; it ends with this one."""

    def __init__(self, prefix: Sequence[str] = ()) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        program = [*prefix, sys.executable, "-c", f"import forked; forked.serve({theirs.fileno()})"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        with theirs:
            self._process = subprocess.Popen(
                program, env=environment, pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                cwd=Path(__file__).parent,  # the folder of a test is removed after it
            )  # fmt: skip
        self.pid = self._process.pid

    def start(
        self,
        program: Program,
        *arguments: Any,
        folder: Path | None = None,
        malloc: Mapping[int, int] = NO_OPTIONS,
        finalizes: bool = False,
        **environment: str,
    ) -> Forked:
        """Start a program. Arguments of a function are what JSON holds; ``malloc`` is for mallopt.

        Unless it ``finalizes``, the interpreter ends at once when the program has ended.
        """
        order = {
            "program": program if isinstance(program, str) else None,
            "function": None if isinstance(program, str) else [program.__module__, program.__qualname__],
            "arguments": [str(one) for one in arguments] if isinstance(program, str) else arguments,
            "folder": str(folder or Path.cwd()),
            "environment": {**os.environ, **environment},
            "path": sys.path,
            "malloc": [*malloc.items()],
            "finalizes": finalizes,
            "syncs": os.fsync is SYNC,
        }
        stderr = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 - closed by communicate
        ours, status = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        (input_, stdin), (stdout, output) = os.pipe(), os.pipe()
        message = json.dumps(order).encode()
        socket.send_fds(self._channel, [message], [status.fileno(), input_, output, stderr.fileno()])
        status.close()
        os.close(input_)
        os.close(output)
        return Forked(ours, stdin, stdout, stderr)

    def run(self, program: Program, *arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a program to its end: its exit code, stdout and stderr."""
        with self.start(program, *arguments, **options) as process:
            out, err = process.communicate(100)
            return subprocess.CompletedProcess([], process.wait(), out, err)

    def close(self) -> None:
        self._channel.close()
        self._process.wait()


_servers: list[ForkServer] = []  # at most one


def server() -> ForkServer:
    """The one of this session, which is started when it is first needed."""
    if not _servers:
        _servers.append(ForkServer())
    return _servers[0]


def server_pids() -> set[int]:
    """A process that is no leftover of a test, though its children are."""
    return {one.pid for one in _servers}


def close() -> None:
    while _servers:
        _servers.pop().close()


def start(program: Program, *arguments: Any, **options: Any) -> Forked:
    return server().start(program, *arguments, **options)


def run(program: Program, *arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    return server().run(program, *arguments, **options)


# The other side


def serve(channel_number: int) -> None:
    """Fork a child for each message, and send its number, and its exit code when it has ended."""
    channel = socket.socket(fileno=channel_number)
    channel.set_inheritable(False)
    for name in IMPORTED:
        importlib.import_module(name)
    assert threading.active_count() == 1
    woken, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakes)
    running: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([channel, woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
            _report_ended(running)
        if channel in ready:
            message, numbers, _, _ = socket.recv_fds(channel, MESSAGE_BYTES, 4)
            if not message:
                break
            order = json.loads(message)
            sys.path[:] = order.pop("path")
            if order["function"]:
                importlib.import_module(order["function"][0])  # once, for the children to come
            status, *streams = numbers
            if (child := os.fork()) == 0:
                _become(streams, **order)
            running[child] = socket.socket(fileno=status)
            running[child].send(json.dumps(child).encode())
            for number in streams:
                os.close(number)
    for child in running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)


def _report_ended(running: dict[int, socket.socket]) -> None:
    for child in list(running):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            with running.pop(child) as client, contextlib.suppress(OSError):  # the client may be gone
                client.send(json.dumps(os.waitstatus_to_exitcode(status)).encode())


def _become(
    streams: list[int],
    program: str | None,
    function: tuple[str, str],
    arguments: list[Any],
    folder: str,
    environment: dict[str, str],
    malloc: list[tuple[int, int]],
    finalizes: bool,
    syncs: bool,
) -> NoReturn:
    code = 1
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for target, number in enumerate(streams):
            os.dup2(number, target)
        os.closerange(3, max(map(int, os.listdir("/proc/self/fd"))) + 1)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        if not syncs:
            os.fsync = lambda handle: None
        for parameter, value in malloc:
            assert ctypes.CDLL(None).mallopt(parameter, value)
        tempfile.tempdir = None  # it was found in the other environment
        code = _outcome(program, function, arguments)
        if finalizes:
            sys.exit(code)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        if not finalizes:
            os._exit(code)


def _outcome(program: str | None, function: tuple[str, str], arguments: list[Any]) -> int:
    """The exit code of a program, which has printed its error."""
    try:
        if program is None:
            module, name = function
            getattr(sys.modules[module], name)(*arguments)
        else:
            sys.argv = ["-c", *arguments]
            exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)  # noqa: T201 - as Python does
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
