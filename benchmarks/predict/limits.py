"""Predictions under a limit of memory: the peak of the whole tree of processes of ``zpatch predict``.

All memory counts, with the interpreter and libraries, but the pages of the input's and the output's files,
which the system takes back when it needs them. It is sampled, so a shorter peak may be missed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import POLL_S, ROOT, tree_of

MIB = 2**20
REFUSED = 1
ARGMAX = ("--reduce", "argmax")


@dataclass(frozen=True, slots=True)
class LimitedRun:
    """A prediction, by the command line.

    ``shape`` is that of the volume, ``network`` a factory of ``benchmarks.predict.networks``, ``patch`` and
    ``overlap`` are voxels, ``jobs`` local processes.
    """

    shape: tuple[int, int, int]
    network: str
    patch: int
    overlap: int
    limit_mib: int
    jobs: int = 1
    options: Sequence[str] = ARGMAX

    def __str__(self) -> str:
        shape = " x ".join(map(str, self.shape))
        more = f" {' '.join(self.options)}" if self.options else ""
        return f"{shape}, {self.network}, patch {self.patch}, overlap {self.overlap}, jobs {self.jobs}{more}"


CUBE, LONG, FLAT = (224, 224, 224), (96, 128, 640), (400, 300, 80)
RUNS = tuple(
    LimitedRun(*run)
    for run in (
        (CUBE, "bands", 64, 16, 320),
        (CUBE, "bands", 96, 32, 360),
        (CUBE, "bands", 96, 32, 512),
        (CUBE, "bands", 64, 32, 400, 1, ("--blend", "crop")),
        (CUBE, "unet", 48, 16, 340),
        (CUBE, "unet", 64, 16, 400),
        (CUBE, "unet", 96, 16, 512),
        (CUBE, "unet", 64, 16, 512, 1, ("--batch-size", "4", *ARGMAX)),
        (CUBE, "two_heads", 64, 16, 340, 1, ("--reduce", "seg=argmax", "--reduce", "coarse=none")),
        (CUBE, "two_heads", 96, 32, 400, 1, ("--reduce", "seg=softmax", "--reduce", "coarse=none")),
        (CUBE, "larger", 32, 8, 340, 1, ()),
        (CUBE, "larger", 64, 16, 480, 1, ()),
        (LONG, "bands", 64, 16, 340),
        (LONG, "bands", 64, 16, 340, 1, ("--batch-size", "3", *ARGMAX)),
        (LONG, "unet", 64, 32, 400),
        (LONG, "unet", 32, 8, 320, 1, ("--tta", *ARGMAX)),
        (LONG, "two_heads", 48, 16, 320, 1, ("--blend", "gaussian")),
        (LONG, "larger", 48, 16, 400, 1, ("--padding-mode", "reflect")),
        (LONG, "bands", 96, 0, 512, 1, ("--reduce", "softmax")),
        (FLAT, "bands", 64, 16, 320),
        (FLAT, "unet", 64, 16, 400),
        (FLAT, "unet", 80, 16, 512, 1, ("--model-axes", "zyx", *ARGMAX)),
        (FLAT, "two_heads", 64, 16, 400, 1, ()),
        (FLAT, "larger", 40, 8, 360, 1, ()),
        (CUBE, "bands", 64, 16, 520, 2),
        (CUBE, "unet", 48, 16, 520, 2),
        (LONG, "unet", 64, 16, 640, 2),
        (LONG, "two_heads", 64, 16, 560, 2, ()),
        (FLAT, "bands", 64, 32, 640, 3),
        (FLAT, "unet", 64, 16, 800, 3),
    )
)


@dataclass(frozen=True, slots=True)
class Peak:
    """The most bytes that a run held; ``refused`` is what it said instead, if no plan fitted its limit."""

    bytes: int
    refused: str = ""


def peak_of(run: LimitedRun, store: Path, output: Path) -> Peak:
    """Run the command on a store whose volume has the run's shape; its output is removed."""
    command: list[object] = [Path(sys.executable).with_name("zpatch"), "predict", store, output, "-q"]
    command += ["--model", f"benchmarks.predict.networks:{run.network}", "--patch-size", run.patch]
    command += ["--overlap", run.overlap, "--jobs", run.jobs, "--device", "cpu", *run.options]
    command += ["--max-memory", f"{run.limit_mib} MiB"]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with subprocess.Popen(
        list(map(str, command)),
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        peak = 0
        while process.poll() is None:
            peak = max(peak, sum(_held_bytes(pid, store.parent) for pid in tree_of(process.pid)))
            time.sleep(POLL_S)
        assert process.stderr is not None
        said = process.stderr.read().strip()
    shutil.rmtree(output, ignore_errors=True)
    if process.returncode == REFUSED and "the limit is" in said:
        return Peak(peak, said)
    if process.returncode:
        raise RuntimeError(f"{run}: exit code {process.returncode}: {said}")
    return Peak(peak)


def _held_bytes(pid: int, files: Path) -> int:
    """The proportional share of a process, without mapped files below a folder; 0 once it has ended."""
    total, counts = 0, False
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
            key, *rest = line.split(maxsplit=5)
            if not key.endswith(":"):
                counts = not (rest[4:] and rest[4].startswith(f"{files}/"))
            elif key == "Pss:" and counts:
                total += int(rest[0]) * 1024
    return total
