"""A benchmark of a store on this machine: what is read, how fast that is, and how fast it might be."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from zpatch.bench.reading_speed import Speed, reading_speed
from zpatch.bench.trial_stores import (
    STORED,
    Packing,
    PatchGroup,
    StandIns,
    array_of,
    can_be_tried,
    decoded_per_delivered,
    distinct_sides,
    parts_of_patch,
    record_of,
    stand_ins,
    stored_options,
    times_as_fast,
)
from zpatch.chunks.codec import CODECS
from zpatch.chunks.mapped_shards import close_shards
from zpatch.digests import Json
from zpatch.errors import OptionError
from zpatch.geometry.boxes import Triple, check_patch_fits, patch_size_triple
from zpatch.images.cohort import Cohort
from zpatch.images.image import Image
from zpatch.images.subject import Subject
from zpatch.runtime.byte_sizes import format_bytes
from zpatch.runtime.task_contract import Progress
from zpatch.sampling.randomness import Purpose, rng

PATCH_VOXELS = 96
GROUP_PATCHES = 32  # as many as a queue reads together
MOST_SUBJECTS = 400
CHUNKS = (32, 16, 64)  # where small volumes have no other chunks with one, the first is told
COUNTED_GROUPS = 24
TRIED_GROUPS = 6
TRIAL_SHARE = 1 / 3  # of the time of a measurement
TRIAL_OVERHEAD_S = 0.3
PROCESS_BYTES = 64 * 2**20
PART_BYTES = 1024  # of planning, for each part of a chunk in a patch
TRIAL_BYTES = 32 * 2**20
MOST_TOLD = 3


@dataclass(frozen=True, slots=True)
class BenchmarkPlan:
    """What will be read; printing it says so.

    Of each of ``subjects``, drawn from the store, ``group`` patches are read together. ``jobs`` are the
    numbers of processes to measure with, each cold and warm for about ``seconds``. ``stored_bytes`` are the
    files of all images that patches could come from. ``stored`` are the options of convert that give what the
    store has; ``packings`` are tried on a sample, what it has first.
    """

    store: Path
    subjects: tuple[Subject, ...]
    patch_size: Triple
    group: int
    jobs: tuple[int, ...]
    seconds: float
    stored_bytes: int
    stored: Packing
    packings: tuple[Packing, ...]

    @property
    def is_tried(self) -> bool:
        """Whether there is anything but the store as it is."""
        return len(self.packings) > 1

    @property
    def group_bytes(self) -> int:
        """Bytes of the patches that are read together, of one subject at most."""
        return self.group * math.prod(self.patch_size) * max(map(_voxel_bytes, self.subjects))

    @property
    def peak_bytes(self) -> int:
        """Predicted peak memory above that of the interpreter and its libraries, of all processes together;
        whatever the size of the store."""
        images = [image for subject in self.subjects for image in subject.images.values()]
        chunk_bytes = max(array_of(image).chunk_bytes for image in images)
        parts = self.group * max(parts_of_patch(self.patch_size, image) for image in images)
        each = PROCESS_BYTES + self.group_bytes + PART_BYTES * parts + chunk_bytes
        trial = TRIAL_BYTES + 4 * chunk_bytes if self.is_tried else 0
        return max(self.jobs) * each + trial

    @property
    def speed_s(self) -> float:
        """How long it takes to measure with some processes, about."""
        return 3 * self.seconds

    @property
    def trial_s(self) -> float:
        """How long it takes to try a packing, about."""
        return self.seconds * TRIAL_SHARE + TRIAL_OVERHEAD_S if self.is_tried else 0.0

    @property
    def about_s(self) -> float:
        """How long all of it takes, about."""
        return len(self.jobs) * self.speed_s + len(self.packings) * self.trial_s

    def groups(self, count: int, patches: int) -> list[PatchGroup]:
        """Some groups of so many patches; always the same."""
        subjects = itertools.islice(itertools.cycle(self.subjects), count)
        return [
            PatchGroup.drawn(subject, self.patch_size, patches, rng(0, subject=number))
            for number, subject in enumerate(subjects)
        ]

    def images(self) -> dict[str, dict[str, list[str]]]:
        """Of each image by its name: types, codecs and chunks."""
        found: dict[str, dict[str, list[str]]] = {}
        for subject in self.subjects:
            for name, image in subject.images.items():
                record, chunks = record_of(image), array_of(image).chunks[:0:-1]
                lists = found.setdefault(name, {"types": [], "codecs": [], "chunks": []})
                told = (np.dtype(record.dtype).name, record.codec, shape_text(chunks))
                for values, value in zip(lists.values(), told, strict=True):
                    if value not in values:
                        values.append(value)
        return found

    def __str__(self) -> str:
        images = [
            f"{name} ({'; '.join(_listed(values) for values in lists.values())})"
            for name, lists in self.images().items()
        ]
        return (
            f"{len(self.subjects)} subjects: patches of {shape_text(self.patch_size)}, {self.group} "
            f"together, of {', '.join(images)}; processes: {', '.join(map(str, self.jobs))}; "
            f"about {self.about_s:.0f} s, peak {format_bytes(self.peak_bytes)} above start-up"
        )


def _voxel_bytes(subject: Subject) -> int:
    """Bytes of a voxel of all images, as it is delivered."""
    return sum(image.num_channels * image.dtype.itemsize for image in subject.images.values())


def shape_text(shape: Sequence[int]) -> str:
    """A shape for people.

    >>> shape_text((96, 96, 32))
    '96x96x32'
    """
    return "x".join(map(str, shape))


def _listed(values: Sequence[str]) -> str:
    return ", ".join(values[:MOST_TOLD]) + (", ..." if len(values) > MOST_TOLD else "")


def plan_benchmark(
    cohort: Cohort,
    *,
    images: Sequence[str] = (),
    patch_size: int | Sequence[int] | None = None,
    patches_per_volume: int = 10,
    jobs: int | None = None,
    seconds: float = 2.0,
) -> BenchmarkPlan:
    """Choose what to read; nothing but the manifest is.

    ``images`` are all of each subject, unless some are named. Patches are 96 voxels a side, or as many as fit
    into all volumes. ``jobs`` is the largest number of processes; as many as there are cores.
    """
    counts = {"patches_per_volume": patches_per_volume, "jobs": 1 if jobs is None else jobs}
    for name, count in counts.items():
        if count < 1:
            raise OptionError(f"{name} must be at least 1, not {count}")
    if not seconds > 0:
        raise OptionError(f"seconds must be above 0, not {seconds}")
    if not len(cohort):
        raise OptionError(f"{cohort.store.path}: it holds no images, so there is nothing to read")
    numbers = rng(0, purpose=Purpose.SUBJECT_ORDER).permutation(len(cohort))[:MOST_SUBJECTS]
    subjects = tuple(_with_images(cohort[int(number)], images) for number in numbers)
    if patch_size is None:
        i, j, k = (min(PATCH_VOXELS, *n) for n in zip(*(s.spatial_shape for s in subjects), strict=True))
        patch_size = i, j, k
    size = patch_size_triple(patch_size)
    for subject in subjects:
        check_patch_fits(size, subject.spatial_shape, subject.name)
    images_read = [image for subject in subjects for image in subject.images.values()]
    stored = stored_options(images_read, CHUNKS)
    most = _cores() if jobs is None else jobs
    known = set(cohort.names)
    records = [record for (name, _), record in cohort.store.records.items() if name in known]
    return BenchmarkPlan(
        store=cohort.store.path,
        subjects=subjects,
        patch_size=size,
        group=min(patches_per_volume, GROUP_PATCHES),
        jobs=tuple(sorted({1, min(_cores(), most), most})),
        seconds=seconds,
        stored_bytes=sum(r.stored_bytes for r in records if not images or r.image in images),
        stored=stored,
        packings=_packings(images_read, stored),
    )


def _with_images(subject: Subject, names: Sequence[str]) -> Subject:
    if not names:
        return subject
    return Subject.of({name: subject[name] for name in names}, name=subject.name)


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _packings(images: Sequence[Image], stored: Packing) -> tuple[Packing, ...]:
    """What the store has, and what else could be had with ``zpatch convert`` if it came from there."""
    if any(record_of(image).source is None for image in images):
        return (STORED,)
    sides = [*([] if stored.chunk else [None]), *distinct_sides(images, CHUNKS)]
    codecs = [*([] if stored.codec else [None]), *CODECS]
    others = [Packing(*options) for options in itertools.product(sides, codecs)]
    return (STORED, *(packing for packing in others if packing != stored))


@dataclass(frozen=True, slots=True)
class PackingFigures:
    """What a packing means for these patches: bytes decoded for each byte delivered, in groups and patch by
    patch; patches per second of one process, warm, and how many times the bytes that the store takes now.

    The last two are tried on a sample, and None where they were not. ``chunk`` and ``codec`` are None for
    those of the store where no option of convert, or no single one, gives them.
    """

    chunk: int | None
    codec: str | None
    decoded_per_delivered: float
    patch_by_patch: float
    patches_per_s: float | None = None
    size: float | None = None


@dataclass(frozen=True, slots=True)
class BenchmarkReport:
    """What was measured, and what was tried. ``packings`` starts with what the store has.

    ``patch_bytes`` are those of a patch of all images, as they are stored; ``decoded_by_group`` is how many
    bytes are decoded for each byte delivered, by how many patches are read together. ``load`` is how many
    processes, of any program, ran on each core before.
    """

    plan: BenchmarkPlan
    patch_bytes: int
    speeds: tuple[Speed, ...]
    packings: tuple[PackingFigures, ...]
    decoded_by_group: dict[int, float]
    memory_bytes: int
    load: float = 0.0

    def warm_with(self, processes: int) -> float:
        """Patches per second of so many processes, read off between those that were measured."""
        counts, rates = zip(*((speed.processes, speed.warm) for speed in self.speeds), strict=True)
        return float(np.interp(processes, counts, rates))

    def to_json(self) -> Json:
        """The report as plain JSON."""
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


def run_benchmark(plan: BenchmarkPlan, progress: Progress = lambda ms: None) -> BenchmarkReport:
    """Measure what was planned. Progress is told in ms, of the ``about_s`` of the plan."""
    load = os.getloadavg()[0] / _cores()
    groups = plan.groups(COUNTED_GROUPS, plan.group)
    speeds = []
    try:
        for processes in plan.jobs:
            speeds.append(
                reading_speed(
                    plan.store,
                    plan.subjects,
                    patch_size=plan.patch_size,
                    group=plan.group,
                    processes=processes,
                    seconds=plan.seconds,
                )
            )
            progress(round(plan.speed_s * 1000))
        packings = tuple(_figures(plan, groups, speeds[0].warm, progress))
    finally:
        close_shards(plan.store)
    counts = sorted({1, plan.group, GROUP_PATCHES})
    return BenchmarkReport(
        plan=plan,
        patch_bytes=sum(group.delivered_bytes for group in groups) // (len(groups) * plan.group),
        speeds=tuple(speeds),
        packings=packings,
        decoded_by_group={n: decoded_per_delivered(plan.groups(COUNTED_GROUPS, n)) for n in counts},
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        load=load,
    )


def _figures(
    plan: BenchmarkPlan, groups: Sequence[PatchGroup], warm: float, progress: Progress
) -> Iterator[PackingFigures]:
    """Of each packing, as it compares with what the store has."""
    alone = [single for group in groups for single in group.singly()]
    affordable = max(1, int(warm * plan.trial_s / plan.group / 4))
    tried = plan.groups(min(TRIED_GROUPS, affordable, len(plan.subjects)), plan.group)
    with contextlib.ExitStack() as stack:
        base = None
        if plan.is_tried and can_be_tried(tried, STORED):
            base = stack.enter_context(stand_ins(tried, STORED, plan.packings))
        for packing in plan.packings:
            gain, size = _tried(plan, tried, packing, base)
            yield PackingFigures(
                chunk=packing.chunk or plan.stored.chunk,
                codec=packing.codec or plan.stored.codec,
                decoded_per_delivered=decoded_per_delivered(groups, packing),
                patch_by_patch=decoded_per_delivered(alone, packing),
                patches_per_s=None if gain is None else warm * gain,
                size=size,
            )
            progress(round(plan.trial_s * 1000))


def _tried(
    plan: BenchmarkPlan, groups: Sequence[PatchGroup], packing: Packing, base: StandIns | None
) -> tuple[float | None, float | None]:
    """How many times as fast a packing is read as what the store has, and how many times as large it is."""
    if packing is STORED and base is not None:
        return 1.0, 1.0
    if base is None or not can_be_tried(groups, packing):
        return None, None
    with stand_ins(groups, packing, plan.packings) as other:
        gain = times_as_fast(other, base, plan.seconds * TRIAL_SHARE)
        return gain, other.stored_bytes / base.stored_bytes
