"""The figures of a benchmark: speeds of reading the store, and the figures of other chunks and codecs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from zpatch.bench.benchmark_plan import BenchmarkPlan
from zpatch.bench.reading_speed import Speed
from zpatch.digests import Json


@dataclass(frozen=True, slots=True)
class PackingFigures:
    """The figures of one packing.

    ``chunk`` and ``codec`` are its options of convert; None for the store's own if no single option gives
    them. ``decoded_per_delivered`` is bytes decoded for each byte delivered if patches are read in groups,
    ``patch_by_patch`` if they are read one by one. ``patches_per_s`` is the rate of one process, warm, and
    ``size`` the size of the files relative to the store's; both are None if the packing was not tried.
    """

    chunk: int | None
    codec: str | None
    decoded_per_delivered: float
    patch_by_patch: float
    patches_per_s: float | None = None
    size: float | None = None


@dataclass(frozen=True, slots=True)
class BenchmarkReport:
    """The figures of a benchmark.

    ``patch_bytes`` is the size of a patch of all images, as stored. ``speeds`` are the measurements, one for
    each number of processes; ``packings`` starts with the store's own. ``decoded_by_group`` is bytes decoded
    for each byte delivered, by the number of patches read together. ``memory_bytes`` is the machine's memory,
    and ``load`` the number of running processes of any program on each core before the benchmark.
    """

    plan: BenchmarkPlan
    patch_bytes: int
    speeds: tuple[Speed, ...]
    packings: tuple[PackingFigures, ...]
    decoded_by_group: dict[int, float]
    memory_bytes: int
    load: float = 0.0

    def warm_with(self, processes: int) -> float:
        """Patches per second of this number of processes, interpolated between the measured numbers."""
        counts, rates = zip(*((speed.processes, speed.warm) for speed in self.speeds), strict=True)
        return float(np.interp(processes, counts, rates))

    def to_json(self) -> Json:
        """The figures as plain JSON."""
        return {
            "store": str(self.plan.store),
            "subjects": len(self.plan.subjects),
            "images": self.plan.images(),
            "patch_size": list(self.plan.patch_size),
            "patches_together": self.plan.group,
            "patch_bytes": self.patch_bytes,
            "stored_bytes": self.plan.stored_bytes,
            "memory_bytes": self.memory_bytes,
            "load": self.load,
            "speeds": [dataclasses.asdict(speed) for speed in self.speeds],
            "packings": [dataclasses.asdict(figures) for figures in self.packings],
            "decoded_by_group": {str(count): ratio for count, ratio in self.decoded_by_group.items()},
        }
