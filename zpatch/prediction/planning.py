"""Planning a prediction: run the network on one patch, read the mask, keep the first plan that fits."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from zpatch.blending.blend import accumulation_dtype
from zpatch.blending.reduction import as_stored, check_channels, fitting_fill, reduce_channels
from zpatch.errors import MemoryLimitError, ModelError, OptionError, SourceError, ZpatchError
from zpatch.geometry.boxes import Bools, PatchLocation
from zpatch.images.chunk_cache import cached
from zpatch.images.group_read import read_group
from zpatch.images.image import Image
from zpatch.images.normalization import Normalize
from zpatch.images.subject import Subject
from zpatch.networks.network import Network
from zpatch.prediction.peak_memory import region_bytes
from zpatch.prediction.prediction_options import PredictOptions
from zpatch.prediction.prediction_plan import Head, PredictionPlan
from zpatch.prediction.regions import NOT_BEGUN, Shards, grid_over, partitions, planned_heads
from zpatch.runtime.byte_sizes import format_bytes, parse_bytes
from zpatch.runtime.failures import Failures
from zpatch.runtime.process_memory import resident_bytes
from zpatch.store.names import check_name, check_names_differ

ROWS_OF_A_REGION = 4  # rows of patches along the swept axis, at least, where a cluster shares the work


def plan_prediction(
    network: Network,
    subjects: Sequence[Subject],
    options: PredictOptions,
    *,
    begun: Mapping[str, Shards] = MappingProxyType({}),
    failures: Failures | None = None,
) -> list[PredictionPlan]:
    """The plan of each subject. The network is run on one patch of the first subject; nothing is written.

    ``begun`` has the shards of an output that is to be resumed, by subject and output: they are kept.
    ``failures`` notes the subjects that cannot be read, unless none can. Raises MemoryLimitError if no plan
    of a subject fits ``options.max_memory``.
    """
    _check_subjects(subjects)
    failures = failures or Failures()
    heads: tuple[Head, ...] = ()
    limit: int | None = None
    plans: list[PredictionPlan] = []
    for subject in subjects:
        with failures.caught(subject.name, but=ModelError):  # that of a network that fails on its first patch
            if not heads:
                heads = probe(network, subject, options)
                limit = _bytes_left(options)
            slabs, of_subject = _slabs(subject, options, len(subjects)), begun.get(subject.name, NOT_BEGUN)
            found = candidates(subject, heads, options, slabs=slabs, tta=network.tta, begun=of_subject)
            plans.append(first_fitting(found, limit, of_subject))
    if not plans:
        raise failures.error()
    return plans


def candidates(
    subject: Subject,
    heads: Sequence[Head],
    options: PredictOptions,
    *,
    slabs: int = 1,
    tta: bool = False,
    begun: Shards = NOT_BEGUN,
) -> Iterator[PredictionPlan]:
    """Plans of a subject, from the fastest to those that hold less: more regions, then smaller shards.

    Each has at least ``slabs`` regions along the swept axis, if there are as many shards. ``begun`` has the
    stored shapes of shards by output; if it has all outputs, no other shards are tried.
    """
    images = tuple(_images(subject, options))
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
            )
            yield dataclasses.replace(plan, region_bytes=region_bytes(plan))


def first_fitting(
    plans: Iterable[PredictionPlan], limit: int | None, begun: Shards = NOT_BEGUN
) -> PredictionPlan:
    """The first plan whose jobs together hold at most ``limit`` bytes.

    Raises MemoryLimitError about the plan that holds least; ``begun`` are shards that could not be changed.
    """
    least = None
    for plan in plans:
        if limit is None or plan.peak_bytes <= limit:
            return plan
        least = plan if least is None or plan.peak_bytes < least.peak_bytes else least
    assert least is not None
    assert limit is not None
    advice = "use a smaller patch_size, batch_size or number of jobs, or allow more"
    if {head.head.name: head.record.shards for head in least.heads} == begun:
        advice = "it was begun in these shards: allow more, or say overwrite=True to start over"
    raise MemoryLimitError(
        f"the prediction of {least.subject.name!r} needs {format_bytes(least.peak_bytes)} beside the "
        f"network, and {format_bytes(max(limit, 0))} are left of the limit; {advice}"
    )


def _check_subjects(subjects: Sequence[Subject]) -> None:
    given: Any = subjects
    if isinstance(given, Subject):
        raise OptionError("subjects= is one subject; give a list of it")
    if not len(subjects):
        raise OptionError("there is no subject to predict")
    for name, times in Counter(subject.name for subject in subjects).items():
        if times > 1:
            raise OptionError(f"{times} subjects are called {name!r}; give each a different name")
    _check_names([subject.name for subject in subjects], "subject", OptionError)


def _bytes_left(options: PredictOptions) -> int | None:
    """Bytes of the memory limit that this process and its workers do not hold yet."""
    if options.max_memory is None:
        return None
    processes = 1 + (options.jobs if options.jobs > 1 else 0)
    return parse_bytes(options.max_memory) - processes * resident_bytes()


def _slabs(subject: Subject, options: PredictOptions, subjects: int) -> int:
    """The number of regions along the swept axis that lets all jobs, or a cluster, share the work."""
    if options.scheduler is None or options.jobs > 1:
        return math.ceil(options.jobs / subjects)
    grid = grid_over(subject[options.image[0]].spatial_shape, options)
    return max(1, max(grid.counts) // ROWS_OF_A_REGION)


def _check_names(names: Sequence[str], what: str, error: type[ZpatchError]) -> None:
    """Refuse names that are not valid folders everywhere, or the same to some file system."""
    try:
        for name in names:
            check_name(name, what)
        check_names_differ(names, what)
    except SourceError as refusal:
        raise error(str(refusal)) from None


def _images(subject: Subject, options: PredictOptions) -> list[Image]:
    images = [subject[name] for name in options.image]
    for name, image in zip(options.image, images, strict=True):
        _check_usable(image, f"image {name!r} of subject {subject.name!r}")
    shapes = {image.spatial_shape for image in images}
    if len(shapes) > 1:
        raise OptionError(
            f"the images {', '.join(options.image)} of {subject.name!r} differ in shape: {shapes}",
            option="image",
        )
    return images if options.normalize is None else list(map(Normalize(options.normalize), images))


def _check_usable(image: Image, name: str) -> None:
    """Refuse an image that no network can be given."""
    if 0 in image.shape:
        raise SourceError(
            f"{name} has no voxels: its shape (C, I, J, K) is {image.shape}; choose another one"
        )
    if image.dtype.kind == "c":
        raise SourceError(
            f"{name} has complex values ({image.dtype}), and a network is given float32; save its magnitude, "
            f"or its real and imaginary part as two images, and predict from these"
        )


def probe(network: Network, subject: Subject, options: PredictOptions) -> tuple[Head, ...]:
    """The outputs of a network, from running it on the first patch of a subject."""
    images = _images(subject, options)
    location = grid_over(images[0].spatial_shape, options).at((0, 0, 0))
    found = read_group(images, [location], padding_mode=options.reading_mode)
    patches = [voxels[0].astype(np.float32) for voxels in found]
    with network.running():
        outputs = _probed(network, torch.from_numpy(np.concatenate(patches)[None]), subject, location)
        try:
            _check_names(list(outputs), "output", ModelError)
            options.check_outputs(outputs)
            return tuple(_head(name, output, options) for name, output in outputs.items())
        except ModelError as error:
            raise ModelError(f"subject {subject.name!r}: {error}") from error


def _probed(
    network: Network, batch: torch.Tensor, subject: Subject, location: PatchLocation
) -> Mapping[str, torch.Tensor]:
    """The outputs for the first patch; a failure about its shape says what networks usually need."""
    try:
        return network(batch, subject.name, [location])
    except ModelError as error:
        if not re.search(r"\b(sizes?|shapes?|channels|dimensions?)\b", str(error.__cause__)):
            raise
        raise ModelError(
            f"{error}; check that it takes {batch.shape[1]} channels and patches of "
            f"{tuple(batch.shape[2:])} voxels: many networks need a patch_size of multiples of 16 or 32"
        ) from error


def _head(name: str, output: torch.Tensor, options: PredictOptions) -> Head:
    patches, channels, i, j, k = output.shape
    if patches != 1:
        raise ModelError(
            f"the model must give a tensor (B, C, I, J, K) for a batch, not {tuple(output.shape)} for one "
            f"patch"
        )
    if any(q == 0 or (p % q and q % p) for p, q in zip(options.patch_size, (i, j, k), strict=True)):
        raise ModelError(
            f"the model made {(i, j, k)} of a patch of {options.patch_size}; it must keep the patch's "
            f"shape, or make it smaller or larger by whole factors"
        )
    reduce = options.reduction_of(name)
    check_channels(reduce, channels, name)
    dtype = accumulation_dtype(output.dtype, options.overlap_mode)
    kept = as_stored(reduce_channels(output[0].to(dtype), reduce)).cpu()
    fitting_fill(options.fill, kept.dtype)
    return Head(name, channels, dtype.itemsize, (i, j, k), len(kept), kept.numpy().dtype.str)


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
            f"the mask {mask!r} of {subject.name!r} is {image.spatial_shape}, the image {grid.spatial_shape}",
            option="mask",
        )
    i, j, k = map(range, grid.counts)
    source, done = cached(image.source, grid, 0, (i, j, k))
    image = image.with_source(source)
    for position in np.ndindex(grid.counts):
        outside[position] = not image.read(grid.at(position).clipped(grid.spatial_shape)).any()
        done(position)
    return outside
