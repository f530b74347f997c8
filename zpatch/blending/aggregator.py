"""``PatchAggregator``: the outputs of a network for patches, blended into a volume."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from zpatch.blending.aggregator_options import AggregatorOptions, HeadOptions
from zpatch.blending.blend import Blend, add_batch
from zpatch.blending.grid_blend import GridBlend
from zpatch.blending.reduction import Finaliser, Reductions, check_channels, kind_of
from zpatch.blending.scattered_blend import ScatteredBlend
from zpatch.blending.sinks import FinalisingSink, ImageSink, Output, OutputSink, TensorSink
from zpatch.errors import IncompleteCoverageError, OptionError, UnknownNameError
from zpatch.geometry.affines import resized_affine
from zpatch.geometry.boxes import PatchLocation, Triple
from zpatch.records.names import check_name, check_names_differ
from zpatch.sampling.grid_sampler import GridSampler
from zpatch.store.lock import writing_to
from zpatch.store.staged_image import StagedImage
from zpatch.tiling.volume_tiles import Tiling


@dataclass(frozen=True, slots=True)
class Head:
    """One output of a network: the blend of its patches, and the sink of its final voxels."""

    blend: Blend
    sink: OutputSink


class PatchAggregator:
    """Blends the outputs of a network for patches into a volume.

    ``spatial_shape`` is the shape (I, J, K) of the input volume, and ``output_shape`` that of the result
    where the network makes patches smaller or larger. On an axis of p voxels, voxel n of a patch has a weight
    of 1 in the mode ``average``, of sin^2(pi (n + 1) / (p + 1)) in ``hann`` and of a Gaussian with a sigma of
    p / 8 in ``gaussian``; ``crop`` cuts half the overlap from each side.

    With ``grid`` (a GridSampler) each part of the result is final when its last patch arrives. The order in
    which patches arrive changes no bit, and a missing or repeated patch raises IncompleteCoverageError.
    Without it locations are arbitrary, and ``patch_overlap`` is the overlap that ``crop`` cuts. A voxel that
    no patch covers gets the value ``fill`` after ``reduce``, or raises IncompleteCoverageError if there is
    none. Where patches overlap, the order changes the last bits; in ``crop`` mode the last patch wins.

    ``output`` is None for a tensor, or the path of an OME-Zarr image that is written shard by shard and
    appears there when it is complete; where batches are dicts, the path of a folder with an image for each
    key. ``reduce`` is applied to final voxels: ``"argmax"``, ``"softmax"``, ``"sigmoid"``,
    ``("threshold", t)`` or a function (C, I, J, K) -> (C', I, J, K), where C' must not depend on the values;
    the result is cast to ``dtype``. Sums are float32 or wider; integers in crop mode stay exact. Where
    batches are dicts, ``output_shape``, ``reduce``, ``dtype`` and ``fill`` may be dicts of the same keys.

    ``max_memory`` ("2 GiB", or bytes) limits the memory of patches and sums, for all keys together. With a
    grid, patches that arrive before their turn wait, and raise MemoryLimitError if they take more. Without
    one, sums are moved to a scratch file beside the output, or in the system's folder of temporary files. The
    batch, one tile, the shards that are incomplete and a result that is a tensor are not counted.

    After an error inside a batch all methods but ``close`` raise OptionError. Leaving the context manager
    closes the aggregator, which removes an output that is not complete.

    >>> aggregator = PatchAggregator(spatial_shape=(6, 4, 4), overlap_mode="average")
    >>> aggregator.add_batch(torch.ones(1, 1, 4, 4, 4), [PatchLocation((0, 0, 0), (4, 4, 4))])
    >>> aggregator.add_batch(torch.zeros(1, 1, 4, 4, 4), [PatchLocation((2, 0, 0), (4, 4, 4))])
    >>> aggregator.get_output()[0, :, 0, 0].tolist()
    [1.0, 1.0, 0.5, 0.5, 0.0, 0.0]
    """

    def __init__(
        self,
        spatial_shape: int | Sequence[int],
        overlap_mode: str = "crop",
        patch_overlap: int | Sequence[int] = 0,
        output_shape: int | Sequence[int] | Mapping[str, int | Sequence[int]] | None = None,
        *,
        grid: GridSampler | None = None,
        output: str | os.PathLike[str] | None = None,
        reduce: Reductions = None,
        dtype: torch.dtype | Mapping[str, torch.dtype | None] | None = None,
        fill: float | Mapping[str, float | None] | None = None,
        max_memory: int | str | None = None,
    ) -> None:
        self.options = AggregatorOptions.of(
            spatial_shape,
            overlap_mode=overlap_mode,
            patch_overlap=patch_overlap,
            output_shape=output_shape,
            grid=grid,
            output=output,
            reduce=reduce,
            dtype=dtype,
            fill=fill,
            max_memory=max_memory,
        )
        place = self.options.output
        self._staging = place and place.with_name(f".{place.name}.{uuid.uuid4().hex}")
        self._heads: dict[str | None, Head] = {}
        self._outputs: dict[str | None, Output] = {}
        self._refusal: str | None = None

    def add_batch(
        self,
        batch: torch.Tensor | Mapping[str, torch.Tensor],
        locations: Sequence[PatchLocation],
    ) -> None:
        """Take in a batch (B, C, I, J, K), or a dict of one for each key; one location for each patch.

        Raises ModelError if its shape or channels do not fit, and PatchLocationError if a location is not of
        the grid.
        """
        self._check_usable()
        tensors: Mapping[Any, torch.Tensor] = batch if isinstance(batch, Mapping) else {None: batch}
        self._heads = self._heads or self._start(tensors, locations)
        if tensors.keys() != self._heads.keys():
            raise OptionError(
                f"batches must be all tensors or all dicts of the same keys: one has {_as_text(tensors)} "
                f"where earlier batches had {_as_text(self._heads)}"
            )
        with self._at_work():
            for key, tensor in tensors.items():
                add_batch(self._heads[key].blend, tensor, locations)

    def _start(
        self, tensors: Mapping[Any, torch.Tensor], locations: Sequence[PatchLocation]
    ) -> dict[str | None, Head]:
        if not tensors:
            raise OptionError("a batch is a dict without keys; it must hold a tensor for each output")
        self.options.check_keys(tensors.keys())
        for key, tensor in tensors.items():
            if isinstance(tensor, torch.Tensor) and tensor.ndim == 5:
                check_channels(self.options.of_head(key).reduce, tensor.shape[1], key)
        names = [key for key in tensors if key is not None and self.options.output is not None]
        for name in names:
            check_name(name, "output")
        check_names_differ(names, "output")
        max_bytes = self.options.max_bytes
        share = None if max_bytes is None else max_bytes // len(tensors)
        patch_size = locations[0].size if len(locations) else None
        return {
            key: self._head(key, patch_size, _patch_shape(tensor), share) for key, tensor in tensors.items()
        }

    def _head(
        self,
        key: str | None,
        patch_size: Triple | None,
        patch_shape: Triple | None,
        max_bytes: int | None,
    ) -> Head:
        options, head = self.options, self.options.of_head(key)
        sink = self._sink(key, head)
        finalise = Finaliser(head.reduce, head.dtype, is_stored=options.output is not None)
        if options.grid is not None:
            tiling = Tiling.over(
                options.grid.grid, options.overlap_mode, output_shape=head.shape, patch_shape=patch_shape
            )
            return Head(GridBlend(tiling, FinalisingSink(finalise, sink), max_held_bytes=max_bytes), sink)
        blend = ScatteredBlend(
            options.spatial_shape,
            options.overlap_mode,
            options.patch_overlap,
            sink,
            finalise,
            output_shape=head.shape,
            patch_size=patch_size,
            patch_shape=patch_shape,
            fill=head.fill,
            max_bytes=max_bytes,
            scratch_folder=options.output and options.output.parent,
        )
        return Head(blend, sink)

    def _sink(self, key: str | None, head: HeadOptions) -> OutputSink:
        output = self.options.output
        if output is None or self._staging is None:
            return TensorSink(head.shape)
        folder = self._staging / (key or "")
        with writing_to(output):
            folder.mkdir(parents=True, exist_ok=True)
        subject = self.options.grid.subject if self.options.grid else None
        affine = next(iter(subject.images.values())).affine if subject else np.eye(4)
        return ImageSink(
            StagedImage(folder),
            output / (key or ""),
            subject=subject.name if subject else "output",
            name=key or output.name,
            kind=kind_of(head.reduce),
            spatial_shape=head.shape,
            affine=resized_affine(affine, self.options.spatial_shape, head.shape),
        )

    def get_output(self, key: str | None = None) -> Output:
        """The result: a tensor (C, I, J, K), or the image that was written; of dicts, the result of ``key``.

        Raises IncompleteCoverageError if patches are missing; they may still be added then.
        """
        if not self._outputs:
            self._finish()
        if key not in self._outputs:
            raise UnknownNameError.among("output", key, map(str, self._outputs), "the aggregator")
        return self._outputs[key]

    def _finish(self) -> None:
        self._check_usable()
        if not self._heads:
            raise IncompleteCoverageError("no patch was added, so there is nothing to blend")
        for head in self._heads.values():
            head.blend.check_complete()
        with self._at_work():
            for head in self._heads.values():
                head.blend.finish()
            self._outputs = {key: head.sink.finish() for key, head in self._heads.items()}
            if self.options.output is not None and self._staging is not None:
                self._staging.rename(self.options.output)
        self._refusal = "the output was taken already"
        for key, head in self._heads.items():
            if head.sink.not_finite:
                of_key = "" if key is None else f" of {key!r}"
                warnings.warn(
                    f"{head.sink.not_finite} blended voxels{of_key} are NaN or infinite", stacklevel=3
                )

    def _check_usable(self) -> None:
        if self._refusal:
            raise OptionError(f"{self._refusal}; make a new aggregator")

    @contextlib.contextmanager
    def _at_work(self) -> Iterator[None]:
        """Refuse later calls where an error is raised here; errors of the disk name the output.

        The caller may be in inference mode now and not later: tensors that are made here are ordinary ones.
        """
        self._refusal = "an earlier call failed half-way"
        output = self.options.output
        disk = contextlib.nullcontext() if output is None else writing_to(output)
        with disk, torch.inference_mode(False), torch.no_grad():
            yield
        self._refusal = None

    def close(self) -> None:
        """Free the memory, and remove an output that is not complete."""
        for head in self._heads.values():
            head.blend.close()
        self._heads = {}
        if self._staging is not None:
            shutil.rmtree(self._staging, ignore_errors=True)
        if not self._outputs:
            self._refusal = "the aggregator is closed"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _patch_shape(batch: torch.Tensor) -> Triple | None:
    """The extent of the patches in a batch (B, C, I, J, K); None for anything else."""
    if not isinstance(batch, torch.Tensor) or batch.ndim != 5:
        return None
    i, j, k = batch.shape[2:]
    return i, j, k


def _as_text(keys: Collection[str | None]) -> str:
    return "no keys" if None in keys else f"the keys {', '.join(map(str, keys))}"
