"""The plan of a benchmark: patches, processes, time and memory, from the manifest alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from zpatch.bench.packing import STORED, Packing, distinct_sides, parts_of_patch, stored_options
from zpatch.bench.patch_group import PatchGroup, array_of, record_of
from zpatch.chunks.codec import CODECS
from zpatch.errors import OptionError
from zpatch.geometry.boxes import Triple, check_patch_fits, patch_size_triple
from zpatch.images.cohort import Cohort
from zpatch.images.image import Image
from zpatch.images.subject import Subject
from zpatch.runtime.byte_sizes import format_bytes
from zpatch.runtime.tasks import core_count
from zpatch.sampling.randomness import Purpose, rng

PATCH_VOXELS = 96
GROUP_PATCHES = 32  # as many as a queue reads together
MOST_SUBJECTS = 400
CHUNKS = (32, 16, 64)  # of sides that give small volumes the same chunks, only the first is tried
TRIAL_SHARE = 1 / 3  # of the time of a measurement
TRIAL_OVERHEAD_S = 0.3
PROCESS_BYTES = 64 * 2**20
PART_BYTES = 1024  # of planning, for each part of a chunk in a patch
TRIAL_BYTES = 32 * 2**20
LISTED = 3  # texts of an image


@dataclass(frozen=True, slots=True)
class BenchmarkPlan:
    """The reads of a benchmark, as text if printed.

    ``subjects`` are drawn from the store; ``group`` patches of a subject are read together. ``jobs`` are the
    numbers of processes to measure, each for about ``seconds`` cold and as long warm. ``stored_bytes`` is the
    size of the files of all images that patches may be drawn from. ``stored`` are the options of convert that
    give the store's own chunks and codecs. ``packings`` are tried on a sample; the store's own is the first.
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
        """Whether packings other than the store's own are tried."""
        return len(self.packings) > 1

    @property
    def group_bytes(self) -> int:
        """Bytes of the patches that are read together, of the subject with the largest voxels."""
        return self.group * math.prod(self.patch_size) * max(map(_voxel_bytes, self.subjects))

    @property
    def peak_bytes(self) -> int:
        """Predicted peak memory of all processes together, beyond the interpreter and its libraries.

        It does not depend on the size of the store.
        """
        images = [image for subject in self.subjects for image in subject.images.values()]
        chunk_bytes = max(array_of(image).chunk_bytes for image in images)
        parts = self.group * max(parts_of_patch(self.patch_size, image) for image in images)
        each = PROCESS_BYTES + self.group_bytes + PART_BYTES * parts + chunk_bytes
        trial = TRIAL_BYTES + 4 * chunk_bytes if self.is_tried else 0
        return max(self.jobs) * each + trial

    @property
    def speed_s(self) -> float:
        """About how long one number of processes is measured, in seconds."""
        return 3 * self.seconds

    @property
    def trial_s(self) -> float:
        """About how long one packing is tried, in seconds."""
        return self.seconds * TRIAL_SHARE + TRIAL_OVERHEAD_S if self.is_tried else 0.0

    @property
    def about_s(self) -> float:
        """About how long the benchmark takes, in seconds."""
        return len(self.jobs) * self.speed_s + len(self.packings) * self.trial_s

    def groups(self, count: int, patches: int) -> list[PatchGroup]:
        """``count`` groups of ``patches`` patches; the same groups on each call."""
        subjects = itertools.islice(itertools.cycle(self.subjects), count)
        return [
            PatchGroup.drawn(subject, self.patch_size, patches, rng(0, subject=number))
            for number, subject in enumerate(subjects)
        ]

    def images(self) -> dict[str, dict[str, list[str]]]:
        """The types, codecs and chunks of each image, by name."""
        found: dict[str, dict[str, list[str]]] = {}
        for subject in self.subjects:
            for name, image in subject.images.items():
                record, chunks = record_of(image), array_of(image).chunks[:0:-1]
                lists = found.setdefault(name, {"types": [], "codecs": [], "chunks": []})
                texts = (np.dtype(record.dtype).name, record.codec, shape_text(chunks))
                for values, value in zip(lists.values(), texts, strict=True):
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
    """Bytes of one voxel of all images, as delivered."""
    return sum(image.num_channels * image.dtype.itemsize for image in subject.images.values())


def shape_text(shape: Sequence[int]) -> str:
    """A shape as text.

    >>> shape_text((96, 96, 32))
    '96x96x32'
    """
    return "x".join(map(str, shape))


def _listed(values: Sequence[str]) -> str:
    return ", ".join(values[:LISTED]) + (", ..." if len(values) > LISTED else "")


def plan_benchmark(
    cohort: Cohort,
    *,
    images: Sequence[str] = (),
    patch_size: int | Sequence[int] | None = None,
    patches_per_volume: int = 10,
    jobs: int | None = None,
    seconds: float = 2.0,
) -> BenchmarkPlan:
    """Plan a benchmark of a cohort. Only the manifest is read.

    ``images`` are names of images, by default all images of a subject. ``patch_size`` is 96 voxels a side by
    default, or as many voxels as fit into all volumes. ``jobs`` is the largest number of processes, by
    default the number of cores. ``seconds`` is about how long each measurement runs.

    Raises OptionError for a cohort without images and for options out of range, PatchSizeError for patches
    larger than a volume, and UnknownNameError for an image that a subject lacks.
    """
    _check_options(cohort, patches_per_volume, jobs, seconds)
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
    most = core_count() if jobs is None else jobs
    known = set(cohort.names)
    records = [record for (name, _), record in cohort.store.records.items() if name in known]
    return BenchmarkPlan(
        store=cohort.store.path,
        subjects=subjects,
        patch_size=size,
        group=min(patches_per_volume, GROUP_PATCHES),
        jobs=tuple(sorted({1, min(core_count(), most), most})),
        seconds=seconds,
        stored_bytes=sum(r.stored_bytes for r in records if not images or r.image in images),
        stored=stored,
        packings=_packings(images_read, stored),
    )


def _check_options(cohort: Cohort, patches_per_volume: int, jobs: int | None, seconds: float) -> None:
    counts = {"patches_per_volume": patches_per_volume, "jobs": 1 if jobs is None else jobs}
    for name, count in counts.items():
        if count < 1:
            raise OptionError(f"{name} must be at least 1, not {count}", option=name)
    if not seconds > 0:
        raise OptionError(f"seconds must be above 0, not {seconds}", option="seconds")
    if not len(cohort):
        raise OptionError(f"{cohort.store.path}: it holds no images, so there is nothing to read")


def _with_images(subject: Subject, names: Sequence[str]) -> Subject:
    if not names:
        return subject
    return Subject.of({name: subject[name] for name in names}, name=subject.name)


def _packings(images: Sequence[Image], stored: Packing) -> tuple[Packing, ...]:
    """The store's own packing, and the others that ``zpatch convert`` offers if it made the store."""
    if any(record_of(image).source is None for image in images):
        return (STORED,)
    sides = [*([] if stored.chunk else [None]), *distinct_sides(images, CHUNKS)]
    codecs = [*([] if stored.codec else [None]), *CODECS]
    others = [Packing(*options) for options in itertools.product(sides, codecs)]
    return (STORED, *(packing for packing in others if packing != stored))
