"""The CPU time of a prediction, by stage: functions of zpatch are timed, each without those that it calls.

Times are those of threads, so that the stages that run beside each other add up; the rest of the process's
time is Python that belongs to no stage.
"""

from __future__ import annotations

import functools
import importlib
import os
import resource
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import settle
from benchmarks.predict.peers import NETWORKS, contender_of
from benchmarks.predict.runs import remove, seconds_of

REST = "the rest: plans, ledger, Python of patches and tasks"
STAGES = {
    "network": "networks.network:Network.__call__",
    "read: decode, turn and cast chunks": "sources.voxel_sources:gather",
    "add weighted parts to sums": "blending.tile_sums:_compiled_add",
    "classes of scores": "blending.reduction:_compiled",
    "copy classes into shards": "blending.sinks:_OpenShard.fill",
    "cut chunks out of shards": "chunks.shard_writer:_cut",
    "compress chunks": "chunks.shard_writer:encode_chunk",
    "hash and write": "chunks.shard_writer:_SealedStream._write",
    "statistics and index": "store.image_writer:ImageTally.update",
    "tiles: views, sums, order": "blending.grid_blend:GridBlend.add",
}


class _Clock:
    """Seconds of this process's threads by stage; a stage within another one counts for itself only."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._within = threading.local()

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*arguments: Any, **options: Any) -> Any:
            callees = self._within.__dict__.setdefault("callees", [])
            callees.append(0.0)
            begin = time.thread_time()
            try:
                return function(*arguments, **options)
            finally:
                taken = time.thread_time() - begin
                self.seconds[stage] += taken - callees.pop()
                if callees:
                    callees[-1] += taken

        return run


def cpu_by_stage(network: str, head: str, store: str, output: str) -> dict[str, float]:
    """Seconds of CPU by stage of one prediction by zpatch, after another one, on one core."""
    settle(one_core=True)
    torch.set_num_threads(1)
    contender, clock = contender_of("zpatch", NETWORKS[network]), _Clock()
    paths = Path(head), Path(store), Path(output)
    seconds_of(contender, *paths)
    remove(paths[2])
    for stage, place in STAGES.items():
        module, _, names = place.partition(":")
        *within, name = names.split(".")
        owner = functools.reduce(getattr, within, importlib.import_module(f"zpatch.{module}"))
        setattr(owner, name, clock.timed(stage, getattr(owner, name)))
    os.sync()
    before = _cpu_seconds()
    contender.predict(*paths)
    total = _cpu_seconds() - before
    remove(paths[2])
    return {**clock.seconds, REST: max(0.0, total - sum(clock.seconds.values()))}


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
