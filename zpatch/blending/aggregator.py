"""``PatchAggregator``: the outputs of a network, blended back into a volume."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import torch

from zpatch.blending.blend import add_batch
from zpatch.blending.grid_blend import GridBlend
from zpatch.blending.reduction import (
    STORED_AS,
    Reduction,
    as_stored,
    check_reduction,
    kind_of,
    reduce_channels,
)
from zpatch.blending.scattered_blend import ScatteredBlend
from zpatch.blending.sinks import ImageSink, TensorSink
from zpatch.blending.tiling import Tiling
from zpatch.blending.windows import check_overlap_mode
from zpatch.errors import IncompleteCoverageError, OptionError, StoreExistsError, UnknownNameError
from zpatch.geometry.boxes import PatchLocation, Triple, patch_overlap_triple, triple
from zpatch.images.image import Image, stored_image
from zpatch.runtime.byte_sizes import parse_bytes
from zpatch.sampling.grid_sampler import GridSampler
from zpatch.store.image_record import Kind
from zpatch.store.lock import writing_to
from zpatch.store.names import check_name, check_names_differ
from zpatch.store.staged_image import StagedImage

T = TypeVar("T")
Head = tuple[GridBlend | ScatteredBlend, TensorSink | ImageSink]
Output = torch.Tensor | Image


class PatchAggregator:
    """Blends the outputs of a network into a volume.

    ``spatial_shape`` is that of the input volume; ``output_shape`` that of the result where a network
    makes its patches smaller or larger. Modes are ``crop`` (half the overlap is cut from each side),
    ``average``, ``hann`` (sin^2(pi (n + 1) / (p + 1))) and ``gaussian`` (sigma = p / 8).

    With ``grid`` (a GridSampler) each part of the result is final when its last patch arrives, and a missing
    or repeated patch is an error; the order in which patches arrive changes nothing. Without it, locations
    are arbitrary, ``patch_overlap`` says what ``crop`` trims, and a voxel that no patch covered is an
    IncompleteCoverageError unless ``fill`` is given, which stands there after ``reduce``. Where patches
    overlap, the last bits then depend on the order; in ``crop`` mode the last patch wins.

    ``output`` is None for a tensor, or a path where an OME-Zarr image is written shard by shard (a folder of
    images, one for each key, where batches are dicts); it appears there when it is complete. ``reduce`` is
    applied to final voxels: ``"argmax"``, ``"softmax"``, ``"sigmoid"``, ``("threshold", t)`` or a function
    (C, I, J, K) -> (C', I, J, K); ``dtype`` is what they are kept in. Accumulation is float32 or wider;
    integers in crop mode stay exact. Where batches are dicts, ``output_shape``, ``reduce``, ``dtype`` and
    ``fill`` may each be a dict by key as well.

    ``max_memory`` ("2 GiB", or bytes) bounds what is held of patches, for all keys together. With a grid
    patches that come before their turn wait, and where those take more it is a MemoryLimitError. Without
    one sums move to a scratch file beside the output, or in the system's temporary folder. The batch, the
    tile being worked on, the shards being filled and a result that is a tensor come on top.

    An error that stops a batch half-way leaves an aggregator that refuses all but ``close``. As a context
    manager it closes itself, which removes what was written of an output that is not complete.
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
        reduce: Reduction | Mapping[str, Reduction] = None,
        dtype: torch.dtype | Mapping[str, torch.dtype | None] | None = None,
        fill: float | Mapping[str, float | None] | None = None,
        max_memory: int | str | None = None,
    ) -> None:
        check_overlap_mode(overlap_mode)
        self.spatial_shape = _extent(spatial_shape, "spatial_shape")
        self.output_shape = _each(
            self.spatial_shape if output_shape is None else output_shape,
            lambda shape: _extent(shape, "output_shape"),
        )
        self.overlap_mode = overlap_mode
        self.patch_overlap = patch_overlap_triple(patch_overlap, (sys.maxsize,) * 3)
        self.reduce = _each(reduce, _checked_reduction)
        self.dtype = _each(dtype, lambda one: _checked_dtype(one, is_stored=output is not None))
        self.fill = fill
        self.max_bytes = None if max_memory is None else parse_bytes(max_memory)
        if self.max_bytes is not None and self.max_bytes < 0:
            raise OptionError(f"max_memory must be at least 0 bytes, not {max_memory}")
        if grid is not None:
            self._check_grid(grid)
        if output is not None and Path(output).exists():
            raise StoreExistsError(f"{output}: it exists already; choose another name")
        self._grid = grid
        self._output = None if output is None else Path(output).absolute()
        self._staging = self._output and self._output.with_name(f".{self._output.name}.{uuid.uuid4().hex}")
        self._heads: dict[str | None, Head] = {}
        self._outputs: dict[str | None, Output] = {}
        self._refusal: str | None = None

    def _check_grid(self, grid: GridSampler) -> None:
        if grid.grid.spatial_shape != self.spatial_shape:
            raise OptionError(
                f"the grid is over a volume of {grid.grid.spatial_shape}, not of {self.spatial_shape}"
            )
        if self.patch_overlap not in ((0, 0, 0), grid.grid.patch_overlap):
            raise OptionError(
                f"patch_overlap is {self.patch_overlap} where the grid's is {grid.grid.patch_overlap}; "
                f"leave it out"
            )
        if self.fill is not None:
            raise OptionError("fill goes with arbitrary locations: of a grid every patch must come")

    def add_batch(
        self,
        batch: torch.Tensor | Mapping[str, torch.Tensor],
        locations: Sequence[PatchLocation],
    ) -> None:
        """Take in a batch (B, C, I, J, K), or one for each key, and where its patches lie."""
        self._check_usable()
        tensors: Mapping[Any, torch.Tensor] = batch if isinstance(batch, Mapping) else {None: batch}
        self._heads = self._heads or self._start(tensors, locations)
        if tensors.keys() != self._heads.keys():
            raise OptionError(
                f"batches must be all tensors or all dicts of the same keys: one has {_told(tensors)} "
                f"where those before had {_told(self._heads)}"
            )
        with self._at_work():
            for key, tensor in tensors.items():
                add_batch(self._heads[key][0], tensor, locations)

    def _start(
        self, tensors: Mapping[Any, torch.Tensor], locations: Sequence[PatchLocation]
    ) -> dict[str | None, Head]:
        if not tensors:
            raise OptionError("a batch is a dict without keys; it must hold a tensor for each output")
        names = [key for key in tensors if key is not None and self._output is not None]
        for name in names:
            check_name(name, "output")
        check_names_differ(names, "output")
        share = None if self.max_bytes is None else self.max_bytes // len(tensors)
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
        shape = _for_key(self.output_shape, key, "output_shape")
        reduce = _for_key(self.reduce, key, "reduce")
        dtype = _for_key(self.dtype, key, "dtype")
        fill = _for_key(self.fill, key, "fill")
        sink = self._sink(key, shape, kind_of(reduce))

        def finalise(voxels: torch.Tensor) -> torch.Tensor:
            final = reduce_channels(voxels, reduce, dtype)
            return final if self._output is None else as_stored(final)

        if self._grid is not None:
            tiling = Tiling.over(
                self._grid.grid, self.overlap_mode, output_shape=shape, patch_shape=patch_shape
            )
            return GridBlend(tiling, sink, finalise, max_held_bytes=max_bytes), sink
        blend = ScatteredBlend(
            self.spatial_shape,
            self.overlap_mode,
            self.patch_overlap,
            sink,
            finalise,
            output_shape=shape,
            patch_size=patch_size,
            patch_shape=patch_shape,
            fill=fill,
            max_bytes=max_bytes,
            scratch_folder=self._output and self._output.parent,
        )
        return blend, sink

    def _sink(self, key: str | None, shape: Triple, kind: Kind) -> TensorSink | ImageSink:
        if self._output is None or self._staging is None:
            return TensorSink(shape)
        folder = self._staging / (key or "")
        with writing_to(self._output):
            folder.mkdir(parents=True, exist_ok=True)
        subject = self._grid.subject if self._grid else None
        affine = next(iter(subject.images.values())).affine if subject else np.eye(4)
        scale = [n / m for n, m in zip(self.spatial_shape, shape, strict=True)]
        affine[:3, 3] += affine[:3, :3] @ ((np.array(scale) - 1) / 2)
        affine[:3, :3] *= scale
        return ImageSink(
            StagedImage(folder),
            subject=subject.name if subject else "output",
            name=key or self._output.name,
            kind=kind,
            spatial_shape=shape,
            affine=affine,
        )

    def get_output(self, key: str | None = None) -> Output:
        """The result: a tensor (C, I, J, K), or the image that was written; of a dict, that of ``key``.

        Where patches are missing it is an IncompleteCoverageError, after which they may still be added.
        """
        if not self._outputs:
            self._finish()
        if key not in self._outputs:
            raise UnknownNameError.among("output", key, map(str, self._outputs), "the aggregator")
        return self._outputs[key]

    def _finish(self) -> None:
        self._check_usable()
        if not self._heads:
            raise IncompleteCoverageError("no patch was added; nothing is there to be blended")
        for blend, _ in self._heads.values():
            blend.check_complete() if isinstance(blend, ScatteredBlend) else blend.finish()
        with self._at_work():
            for blend, _ in self._heads.values():
                if isinstance(blend, ScatteredBlend):
                    blend.finish()
            self._outputs = self._collected()
        self._refusal = "the output was taken already"

    def _collected(self) -> dict[str | None, Output]:
        outputs: dict[str | None, Output] = {}
        for key, (_, sink) in self._heads.items():
            if isinstance(sink, TensorSink):
                assert sink.tensor is not None
                outputs[key] = sink.tensor
            else:
                assert self._output is not None
                outputs[key] = stored_image(self._output / (key or ""), sink.finish())
        if self._output is not None and self._staging is not None:
            self._staging.rename(self._output)
        return outputs

    def _check_usable(self) -> None:
        if self._refusal:
            raise OptionError(f"{self._refusal}; make a new aggregator")

    @contextlib.contextmanager
    def _at_work(self) -> Iterator[None]:
        """Refuse to go on after whatever fails here; what the disk says names the output.

        The caller may be in inference mode now and not later: tensors made here are ordinary ones.
        """
        self._refusal = "an earlier call failed half-way"
        disk = contextlib.nullcontext() if self._output is None else writing_to(self._output)
        with disk, torch.inference_mode(False), torch.no_grad():
            yield
        self._refusal = None

    def close(self) -> None:
        """Free what is held, and remove what was written of an output that is not complete."""
        for blend, _ in self._heads.values():
            if isinstance(blend, ScatteredBlend):
                blend.close()
        self._heads = {}
        if self._staging is not None:
            shutil.rmtree(self._staging, ignore_errors=True)
        if not self._outputs:
            self._refusal = "the aggregator is closed"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _extent(value: int | Sequence[int], name: str) -> Triple:
    shape = triple(value, name)
    if min(shape) < 1:
        raise OptionError(f"{name} must be at least 1 voxel on every axis, not {value!r}")
    return shape


def _patch_shape(batch: torch.Tensor) -> Triple | None:
    """The extent of the patches in a batch (B, C, I, J, K); of anything else None."""
    if not isinstance(batch, torch.Tensor) or batch.ndim != 5:
        return None
    i, j, k = batch.shape[2:]
    return i, j, k


def _checked_reduction(reduce: Reduction) -> Reduction:
    check_reduction(reduce)
    return reduce


def _checked_dtype(dtype: torch.dtype | None, *, is_stored: bool) -> torch.dtype | None:
    if not isinstance(dtype, torch.dtype | None):
        raise OptionError(f"dtype must be one of torch's, such as torch.float32, not {dtype!r}")
    if is_stored and dtype in STORED_AS:
        raise OptionError(f"an image on disk cannot be of {dtype}; choose {STORED_AS[dtype]}")
    return dtype


def _each(value: Any, function: Callable[[Any], T]) -> T | dict[str, T]:
    """A function of an option, or of what it says for each key."""
    if isinstance(value, Mapping):
        return {key: function(one) for key, one in value.items()}
    return function(value)


def _for_key(value: T | Mapping[str, T], key: str | None, option: str) -> T:
    """What an option says for a key of the batches."""
    if not isinstance(value, Mapping):
        return value
    if key is None or key not in value:
        raise UnknownNameError.among("output", key, value, option)
    return value[key]


def _told(keys: Collection[str | None]) -> str:
    return "no keys" if None in keys else f"the keys {', '.join(map(str, keys))}"
