"""Programs that are stopped, or that keep others from processors: they start quickly in a forked child."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import Any

import torch
from streams import small_subjects

import zpatch as zp
from zpatch.loading import worker_pool


class Holding:
    """Takes its time over one patch, in short steps: the other side waits for it, and it says so."""

    def __init__(self, note: Path, seconds: float) -> None:
        self._note = note
        self._steps = round(seconds / 0.05)

    def __call__(self, patch: zp.Patch) -> zp.Patch:
        if patch.subject == "sub-03" and not self._note.exists():
            self._note.touch()
            for _ in range(self._steps):
                time.sleep(0.05)
        return patch


def run_queue(note: str, timeout: float, hold_s: float, watch_s: float) -> None:
    """A queue, whose workers are looked at every ``watch_s`` seconds; print how many patches it gave."""
    changed: Any = worker_pool
    changed.WATCH_S, changed.COUNTED_S = watch_s, 2 * watch_s
    options: dict[str, Any] = {"max_length": 3, "patches_per_volume": 3, "shuffle_subjects": False}
    with zp.Queue(
        small_subjects(4),
        zp.UniformSampler(6),
        num_workers=2,
        transform=Holding(Path(note), hold_s),
        timeout=timeout,
        **options,
    ) as queue:
        sys.stdout.write(f"{len(list(queue))}\n")


def run_cluster_worker(address: str) -> None:
    """A worker of a cluster that no other process watches: nobody kills it, or starts it again."""
    from distributed import Worker

    torch.set_num_threads(1)

    async def work() -> None:
        async with Worker(address, nthreads=1) as worker:
            await worker.finished()

    asyncio.run(work())


def keep_busy(seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass
