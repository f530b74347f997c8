"""Planning a prediction: run the network on one patch, read the mask, keep the first plan that fits."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self

import numpy as np

from zpatch.digests import Json
from zpatch.errors import MemoryLimitError, ModelError, OptionError, SourceError
from zpatch.geometry.boxes import Bools
from zpatch.images.image import Image
from zpatch.images.normalization import Normalize, computed_statistics, lacks_statistics
from zpatch.images.subject import Subject
from zpatch.networks.network import Network
from zpatch.prediction.peak_memory import region_bytes
from zpatch.prediction.prediction_options import PredictOptions
from zpatch.prediction.prediction_plan import Head, NetworkCost, PredictionPlan
from zpatch.prediction.probe import check_names, network_cost, probe
from zpatch.prediction.regions import NOT_BEGUN, Shards, grid_over, partitions, planned_heads
from zpatch.runtime.byte_sizes import format_bytes, parse_bytes
from zpatch.runtime.failures import Failures
from zpatch.runtime.process_memory import private_bytes, resident_bytes
from zpatch.sources.chunk_cache import cached
from zpatch.sources.input_files import InputSeal

Measure = Callable[[Image, str], Json]

WORKER_BYTES = 2**26  # that a forked worker copies of this process, mostly to count references
ROWS_OF_A_REGION = 4  # rows of patches along the swept axis, at least, where a cluster shares the work


def measured(image: Image, name: str) -> Json:
    """The statistics of an image that has none, for ``normalize``: its voxels are read once."""
    return computed_statistics(image)


def plan_prediction(
    network: Network,
    subjects: Sequence[Subject],
    options: PredictOptions,
    *,
    begun: Mapping[str, Shards] = MappingProxyType({}),
    failures: Failures | None = None,
    estimate: bool = False,
    measure: Measure = measured,
) -> list[PredictionPlan]:
    """The plan of each subject. The network is run on one patch of the first subject; nothing is written.

    ``begun`` has the shards of an output that is to be resumed, by subject and output: they are kept.
    ``failures`` notes the subjects that cannot be read, unless none can. With a limit of memory, or to
    ``estimate`` the time, the network is run on a whole batch too. ``measure`` gives the statistics that
    ``options.normalize`` needs of an image, by its name, that has none stored. Raises MemoryLimitError if no
    plan of a subject fits ``options.max_memory``.
    """
    _check_subjects(subjects)
    failures = failures or Failures()
    heads: tuple[Head, ...] = ()
    cost: NetworkCost | None = None
    limit: MemoryLimit | None = None
    plans: list[PredictionPlan] = []
    for subject in subjects:
        with failures.caught(subject.name, but=ModelError):  # that of a network that fails on its first patch
            images = _images(subject, options, measure)
            seals = _sealed(subject, images, options)  # before the network runs: files may change
            if not heads:
                heads = probe(network, subject.name, images, options)
                if estimate or options.max_memory is not None:
                    cost = network_cost(network, subject.name, images, options)
                limit = MemoryLimit.of(options, network)
            slabs, of_subject = _slabs(subject, options, len(subjects)), begun.get(subject.name, NOT_BEGUN)
            found = candidates(
                subject, heads, options, images, slabs=slabs, tta=network.tta, begun=of_subject, cost=cost
            )
            plans.append(dataclasses.replace(first_fitting(found, limit, of_subject), seals=seals))
    if not plans:
        raise failures.error()
    return plans


def _sealed(subject: Subject, images: Sequence[Image], options: PredictOptions) -> tuple[InputSeal, ...]:
    return tuple(
        InputSeal.of(f"image {name!r} of subject {subject.name!r}", image.source)
        for name, image in zip(options.image, images, strict=True)
    )


def candidates(
    subject: Subject,
    heads: Sequence[Head],
    options: PredictOptions,
    images: Sequence[Image] = (),
    *,
    slabs: int = 1,
    tta: bool = False,
    begun: Shards = NOT_BEGUN,
    cost: NetworkCost | None = None,
) -> Iterator[PredictionPlan]:
    """Plans of a subject, from the fastest to those that hold less: more regions, then smaller shards.

    ``images`` are the subject's as they are read, normalised; without them, they are looked up. A plan has at
    least ``slabs`` regions along the swept axis, if there are as many shards. ``begun`` has the stored shapes
    of shards by output; if it has all outputs, no other shards are tried. ``cost`` is the network's, if it
    was measured.
    """
    images = tuple(images or _images(subject, options))
    is_measured = options.normalize and any(lacks_statistics(subject[name]) for name in options.image)
    identities = tuple(image.identity() for image in images) if is_measured else ()
    grid = grid_over(images[0].spatial_shape, options)
    skipped = _outside_mask(subject, options)
    for planned in planned_heads(subject.name, heads, images[0], grid, options, begun):
        for regions in partitions(planned, slabs):
            plan = PredictionPlan(
                subject=subject,
                images=images,
                grid=grid,
                batch_size=options.batch_size,
                heads=planned,
                regions=regions,
                skipped=skipped,
                region_bytes=0,
                jobs=options.jobs,
                tta=tta,
                cost=cost,
                identities=identities,
            )
            yield dataclasses.replace(plan, region_bytes=region_bytes(plan))


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """A limit for this process and its workers together, all of whose memory counts.

    Pages of the files that are read do not count: the system takes them back when it needs them.

    Attributes:
        bytes: The limit.
        held: What the processes hold before any region is run: Python, torch, the network, what it keeps.
        processes: The number of processes.
    """

    bytes: int
    held: int
    processes: int = 1

    @classmethod
    def of(cls, options: PredictOptions, network: Network) -> Self | None:
        """The limit of some options, for a process in which the network has run.

        A worker is a copy of this process. It copies the pages that it writes, and unpickles the network.
        """
        if options.max_memory is None:
            return None
        workers, copied = options.jobs if options.jobs > 1 else 0, private_bytes()
        if (weights := network.weight_bytes) is not None:
            copied = min(copied, WORKER_BYTES + weights)
        held = resident_bytes() + workers * copied
        return cls(parse_bytes(options.max_memory), held, 1 + workers)

    def refuse(self, plan: PredictionPlan, *, is_begun: bool) -> MemoryLimitError:
        """The error for a plan that does not fit, and none does that holds less."""
        is_many = self.processes > 1
        who, held = f"{self.processes} processes" if is_many else "the process", format_bytes(self.held)
        if self.held >= self.bytes:
            advice = "allow more, or use fewer jobs" if is_many else "allow more"
            return MemoryLimitError(
                f"{who} alone {'take' if is_many else 'takes'} {held} already, with Python, torch and the "
                f"network, and the limit is {format_bytes(self.bytes)}; {advice}"
            )
        advice = "use a smaller patch_size, batch_size or number of jobs, or allow more"
        if is_begun:
            advice = "it was begun in these shards: allow more, or say overwrite=True to start over"
        return MemoryLimitError(
            f"the prediction of {plan.subject.name!r} needs {format_bytes(plan.peak_bytes)}, of which the "
            f"network {format_bytes(plan.jobs * plan.network_bytes)}, beside the {held} that {who} "
            f"{'hold' if is_many else 'holds'}, and the limit is {format_bytes(self.bytes)}; {advice}"
        )


def first_fitting(
    plans: Iterable[PredictionPlan], limit: MemoryLimit | None, begun: Shards = NOT_BEGUN
) -> PredictionPlan:
    """The first plan with which the processes hold at most the bytes of the limit.

    Raises MemoryLimitError about the plan that holds least; ``begun`` are shards that could not be changed.
    """
    least = None
    for plan in plans:
        if limit is None or limit.held + plan.peak_bytes <= limit.bytes:
            return plan
        least = plan if least is None or plan.peak_bytes < least.peak_bytes else least
    assert least is not None
    assert limit is not None
    raise limit.refuse(least, is_begun={h.head.name: h.record.shards for h in least.heads} == begun)


def _check_subjects(subjects: Sequence[Subject]) -> None:
    given: Any = subjects
    if isinstance(given, Subject):
        raise OptionError("subjects= is one subject; give a list of it")
    if not len(subjects):
        raise OptionError("there is no subject to predict")
    for name, times in Counter(subject.name for subject in subjects).items():
        if times > 1:
            raise OptionError(f"{times} subjects are called {name!r}; give each a different name")
    check_names([subject.name for subject in subjects], "subject", OptionError)


def _slabs(subject: Subject, options: PredictOptions, subjects: int) -> int:
    """The number of regions along the swept axis that lets all jobs, or a cluster, share the work."""
    if options.scheduler is None or options.jobs > 1:
        return math.ceil(options.jobs / subjects)
    grid = grid_over(subject[options.image[0]].spatial_shape, options)
    return max(1, max(grid.counts) // ROWS_OF_A_REGION)


def _images(subject: Subject, options: PredictOptions, measure: Measure = measured) -> list[Image]:
    images = [subject[name] for name in options.image]
    names = [f"image {name!r} of subject {subject.name!r}" for name in options.image]
    for name, image in zip(names, images, strict=True):
        _check_usable(image, name)
    shapes = {image.spatial_shape for image in images}
    if len(shapes) > 1:
        raise OptionError(
            f"the images {', '.join(options.image)} of {subject.name!r} differ in shape: {shapes}",
            option="image",
        )
    if options.normalize is None:
        return images
    return [
        _normalized(image, name, options.normalize, measure)
        for image, name in zip(images, names, strict=True)
    ]


def _normalized(image: Image, name: str, mode: str, measure: Measure) -> Image:
    statistics = measure(image, name) if lacks_statistics(image) else None
    return Normalize(mode, statistics=statistics)(image)


def _check_usable(image: Image, name: str) -> None:
    """Refuse an image that no network can be given, and time points that nobody chose.

    Those of images in a store are channels.
    """
    if 0 in image.shape:
        raise SourceError(
            f"{name} has no voxels: its shape (C, I, J, K) is {image.shape}; choose another one"
        )
    if image.dtype.kind == "c":
        raise SourceError(
            f"{name} has complex values ({image.dtype}), and a network is given float32; save its magnitude, "
            f"or its real and imaginary part as two images, and predict from these"
        )
    if image.record is None and _is_of_time_points(image):
        raise OptionError(
            f"{name} has {image.num_channels} time points; say time=N for one of 0 to "
            f"{image.num_channels - 1}, or channels= to give several of them as channels",
            option="time",
        )


def _is_of_time_points(image: Image) -> bool:
    return image.opened.channel_axis == "t" and image.num_channels > 1


def _outside_mask(subject: Subject, options: PredictOptions) -> Bools | None:
    """Which patches are wholly outside the mask; None without a mask."""
    mask = options.mask
    if mask is None:
        return None
    grid = grid_over(subject[options.image[0]].spatial_shape, options)
    outside = np.ones(grid.counts, dtype=bool)
    if callable(mask):
        for position in np.ndindex(grid.counts):
            outside[position] = not mask(subject, grid.at(position))
        return outside
    image = subject[mask]
    if image.spatial_shape != grid.spatial_shape:
        raise OptionError(
            f"the mask {mask!r} of {subject.name!r} has the shape {image.spatial_shape} (I, J, K), the image "
            f"{grid.spatial_shape}; give a mask on the image's own grid",
            option="mask",
        )
    if image.record is None and _is_of_time_points(image):
        raise OptionError(
            f"the mask {mask!r} of {subject.name!r} has {image.num_channels} time points; give one of them",
            option="mask",
        )
    i, j, k = map(range, grid.counts)
    source, done = cached(image.source, grid, 0, (i, j, k))
    image = image.with_source(source)
    for position in np.ndindex(grid.counts):
        outside[position] = not image.read(grid.at(position).clipped(grid.spatial_shape)).any()
        done(position)
    return outside
