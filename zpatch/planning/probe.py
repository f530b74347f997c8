"""The network run on the first patch of a subject: its outputs, and the memory and the time that it takes."""

from __future__ import annotations

import contextlib
import itertools
import re
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from zpatch.blending.blend import accumulation_dtype
from zpatch.blending.reduction import as_stored, check_channels, fitting_fill, reduce_channels
from zpatch.errors import ModelError, SourceError, ZpatchError
from zpatch.geometry.boxes import PatchLocation
from zpatch.networks.model_axes import ModelAxes
from zpatch.networks.network import Network
from zpatch.planning.model_inputs import ModelInputs
from zpatch.planning.prediction_options import PredictOptions
from zpatch.planning.prediction_plan import Head, NetworkCost
from zpatch.planning.regions import grid_over
from zpatch.records.names import check_name, check_names_differ
from zpatch.runtime.process_memory import peak_bytes, reset_peak, resident_bytes
from zpatch.sampling.patch_views import PatchView
from zpatch.sources.group_read import read_together


def read_batch(
    views: Sequence[PatchView], locations: Sequence[PatchLocation], axes: ModelAxes
) -> torch.Tensor:
    """Patches of some views, stacked as channels: float32 (B, C, I, J, K).

    They are in memory in the order in which a network with ``axes`` is fed them.
    """
    channels = np.cumsum([0, *(view.image.num_channels for view in views)]).tolist()
    batch = axes.new_batch(len(locations), channels[-1], locations[0].size)
    outs = [[patch[a:b] for patch in batch] for a, b in itertools.pairwise(channels)]
    read_together([view.read(locations) for view in views], outs)
    return torch.from_numpy(batch)


def probe(network: Network, inputs: ModelInputs, options: PredictOptions) -> tuple[Head, ...]:
    """The outputs of a network, from running it on the first patch of a subject."""
    subject = inputs.subject.name
    location = grid_over(inputs.images[0].spatial_shape, options).at((0, 0, 0))
    batch = read_batch(inputs.views, [location], network.axes)
    with network.running():
        outputs = _probed(network, batch, subject, location)
        try:
            check_names(list(outputs), "output", ModelError)
            options.check_outputs(outputs)
            return tuple(_head(name, output, options) for name, output in outputs.items())
        except ModelError as error:
            raise ModelError(f"subject {subject!r}: {error}") from error


def network_cost(network: Network, inputs: ModelInputs, options: PredictOptions) -> NetworkCost:
    """Run a network, which has run before, on a whole batch, and measure what it takes."""
    location = grid_over(inputs.images[0].spatial_shape, options).at((0, 0, 0))
    locations = [location] * options.batch_size
    batch = read_batch(inputs.views, locations, network.axes)
    with network.running(), _threads(1 if options.jobs > 1 else torch.get_num_threads()):
        before = resident_bytes()
        reset_peak()
        start = time.perf_counter()
        network(batch, inputs.subject.name, locations)
        return NetworkCost(max(0, peak_bytes() - before), time.perf_counter() - start)


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _probed(
    network: Network, batch: torch.Tensor, subject: str, location: PatchLocation
) -> Mapping[str, torch.Tensor]:
    """The outputs for the first patch; a failure about its shape says what networks usually need."""
    try:
        return network(batch, subject, [location])
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
    if options.returns and dtype.is_complex:
        raise ModelError(
            f"the output {name!r} is complex ({dtype}), and is not interpolated; say output_grid='model'"
        )
    return Head(
        name,
        channels,
        dtype.itemsize,
        (i, j, k),
        len(kept),
        kept.numpy().dtype.str,
        dtype.is_floating_point,
    )


def check_names(names: Sequence[str], what: str, error: type[ZpatchError]) -> None:
    """Refuse names that are not valid folders everywhere, or the same to some file system."""
    try:
        for name in names:
            check_name(name, what)
        check_names_differ(names, what)
    except SourceError as refusal:
        raise error(str(refusal)) from None
