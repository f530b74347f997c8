"""Plans of all subjects: the network is probed on one patch, the mask is looked at."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from zpatch.blending.blend import accumulation_dtype
from zpatch.blending.reduction import as_stored, fitting_fill, reduce_channels
from zpatch.errors import ModelError, OptionError, SourceError, ZpatchError
from zpatch.geometry.boxes import Bools
from zpatch.images.chunk_cache import cached
from zpatch.images.group_read import read_group
from zpatch.images.image import Image
from zpatch.images.normalization import Normalize
from zpatch.images.subject import Subject
from zpatch.prediction.network import Network
from zpatch.prediction.prediction_options import PredictOptions
from zpatch.prediction.prediction_plan import Head, PredictionPlan
from zpatch.prediction.regions import NOT_BEGUN, Shards, grid_over, plan_subject
from zpatch.runtime.byte_sizes import parse_bytes
from zpatch.runtime.process_memory import resident_bytes
from zpatch.store.names import check_name, check_names_differ

ROWS_OF_A_REGION = 4  # rows of patches along the swept axis, at least, where a cluster shares the work


def plan_prediction(
    network: Network,
    subjects: Sequence[Subject],
    options: PredictOptions,
    *,
    begun: Mapping[str, Shards] = MappingProxyType({}),
) -> list[PredictionPlan]:
    """The plan of each subject; nothing is written. The network is run on one patch of the first subject.

    ``begun`` says by subject and head in which shards an output was begun, that is to be gone on with.
    """
    given: Any = subjects
    if isinstance(given, Subject):
        raise OptionError("subjects= is one subject; give a list of it")
    if not len(subjects):
        raise OptionError("there is no subject to predict")
    for name, times in Counter(subject.name for subject in subjects).items():
        if times > 1:
            raise OptionError(f"{times} subjects are called {name!r}; give each a name of its own")
    _check_names([subject.name for subject in subjects], "subject", OptionError)
    heads = probe(network, subjects[0], options)
    limit = None
    if options.max_memory is not None:
        processes = 1 + (options.jobs if options.jobs > 1 else 0)
        limit = parse_bytes(options.max_memory) - processes * resident_bytes()
    plans = []
    for subject in subjects:
        images = _images(subject, options)
        grid = grid_over(images[0].spatial_shape, options)
        slabs = math.ceil(options.jobs / len(subjects))
        if options.scheduler is not None and options.jobs == 1:
            slabs = max(1, max(grid.counts) // ROWS_OF_A_REGION)
        skipped = _outside_mask(subject, options)
        plans.append(
            plan_subject(
                subject,
                images,
                heads,
                options,
                slabs=slabs,
                limit=limit,
                skipped=skipped,
                tta=network.tta,
                begun=begun.get(subject.name, NOT_BEGUN),
            )
        )
    return plans


def _check_names(names: Sequence[str], what: str, error: type[ZpatchError]) -> None:
    """Refuse names that are no folders everywhere, or that some file system cannot tell apart."""
    try:
        for name in names:
            check_name(name, what)
        check_names_differ(names, what)
    except SourceError as refusal:
        raise error(str(refusal)) from None


def _images(subject: Subject, options: PredictOptions) -> list[Image]:
    images = [subject[name] for name in options.image]
    shapes = {image.spatial_shape for image in images}
    if len(shapes) > 1:
        raise OptionError(
            f"the images {', '.join(options.image)} of {subject.name!r} differ in shape: {shapes}",
            option="image",
        )
    return images if options.normalize is None else list(map(Normalize(options.normalize), images))


def probe(network: Network, subject: Subject, options: PredictOptions) -> tuple[Head, ...]:
    """What a network gives for the first patch of a subject: its heads, and what is kept of each."""
    images = _images(subject, options)
    location = grid_over(images[0].spatial_shape, options).at((0, 0, 0))
    mode = options.padding_mode or "edge"
    patches = [found[0].astype(np.float32) for found in read_group(images, [location], padding_mode=mode)]
    with network.running():
        outputs = network(torch.from_numpy(np.concatenate(patches)[None]), subject.name, [location])
        try:
            _check_names(list(outputs), "output", ModelError)
            return tuple(_head(name, output, options) for name, output in outputs.items())
        except ModelError as error:
            raise ModelError(f"subject {subject.name!r}: {error}") from error


def _head(name: str, output: torch.Tensor, options: PredictOptions) -> Head:
    if not isinstance(output, torch.Tensor) or output.ndim != 5 or len(output) != 1:
        got = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise ModelError(f"the model must give a tensor (B, C, I, J, K) for a batch, not {got} for one patch")
    _, channels, i, j, k = output.shape
    if any(q == 0 or (p % q and q % p) for p, q in zip(options.patch_size, (i, j, k), strict=True)):
        raise ModelError(
            f"the model made {(i, j, k)} of a patch of {options.patch_size}; it must keep the patch's "
            f"shape, or make it smaller or larger by whole factors"
        )
    dtype = accumulation_dtype(output.dtype, options.overlap_mode)
    kept = as_stored(reduce_channels(output[0].to(dtype), options.reduce)).cpu()
    fitting_fill(options.fill, kept.dtype)
    return Head(name, channels, dtype.itemsize, (i, j, k), len(kept), kept.numpy().dtype.str)


def _outside_mask(subject: Subject, options: PredictOptions) -> Bools | None:
    """Which patches lie wholly outside the mask."""
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
