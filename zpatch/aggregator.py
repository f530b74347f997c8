"""``PatchAggregator``: the outputs of a network, blended back into a volume."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch

from zpatch.accumulation import LooseBlend, SweptBlend, add_checked
from zpatch.blending import check_overlap_mode
from zpatch.errors import IncompleteCoverageError, OptionError, StoreExistsError, UnknownNameError
from zpatch.geometry import PatchLocation, triple
from zpatch.image import Image, stored_image
from zpatch.reduction import Reduction, check_reduction, kind_of, reduce_channels
from zpatch.samplers import GridSampler
from zpatch.schema import check_name
from zpatch.store_writer import StagedImage
from zpatch.volume_sink import ImageSink, TensorSink

Blend = SweptBlend | LooseBlend
Output = torch.Tensor | Image


class PatchAggregator:
    """Blends the outputs of a network into a volume.

    ``spatial_shape`` is that of the input volume; ``output_shape`` that of the result where a network
    makes its patches smaller or larger. Modes are ``crop`` (half the overlap is cut from each side),
    ``average``, ``hann`` (sin^2(pi (n + 1) / (p + 1))) and ``gaussian`` (sigma = p / 8). With ``grid`` (a
    GridSampler) each part of the result is final when its last patch arrives, and a missing or repeated
    patch is an error. Without it, locations are arbitrary, ``patch_overlap`` says what ``crop`` trims, and a
    voxel that no patch covered is an IncompleteCoverageError unless ``fill`` is given.

    ``output`` is None for a tensor, or a path where an OME-Zarr image is written chunk by chunk (a folder of
    images, one for each key, where batches are dicts). ``reduce`` is applied to final voxels: ``"argmax"``,
    ``"softmax"``, ``"sigmoid"``, ``("threshold", t)`` or a function (C, I, J, K) -> (C', I, J, K).
    Accumulation is float32 or wider; integers in crop mode stay exact.
    """

    def __init__(
        self,
        spatial_shape: int | Sequence[int],
        overlap_mode: str = "crop",
        patch_overlap: int | Sequence[int] = 0,
        output_shape: int | Sequence[int] | None = None,
        *,
        grid: GridSampler | None = None,
        output: str | os.PathLike[str] | None = None,
        reduce: Reduction = None,
        dtype: torch.dtype | None = None,
        fill: float | None = None,
    ) -> None:
        check_overlap_mode(overlap_mode)
        check_reduction(reduce)
        self.spatial_shape = triple(spatial_shape, "spatial_shape")
        self.output_shape = (
            self.spatial_shape if output_shape is None else triple(output_shape, "output_shape")
        )
        if grid is not None and grid.grid.spatial_shape != self.spatial_shape:
            raise OptionError(
                f"the grid is over a volume of {grid.grid.spatial_shape}, not of {self.spatial_shape}"
            )
        if grid is not None and fill is not None:
            raise OptionError("fill goes with arbitrary locations: of a grid every patch must come")
        if output is not None and Path(output).exists():
            raise StoreExistsError(f"{output}: it exists already; choose another name")
        self.overlap_mode = overlap_mode
        self.patch_overlap = triple(patch_overlap, "patch_overlap")
        self.reduce = reduce
        self.dtype = dtype
        self.fill = fill
        self._grid = grid
        self._output = None if output is None else Path(output)
        self._blends: dict[str | None, tuple[Blend, TensorSink | ImageSink]] = {}
        self._outputs: dict[str | None, Output] = {}

    def add_batch(
        self,
        batch: torch.Tensor | Mapping[str, torch.Tensor],
        locations: Sequence[PatchLocation],
    ) -> None:
        """Take in a batch (B, C, I, J, K), or one for each key, and where its patches lie."""
        if self._outputs:
            raise OptionError("the output was taken already; make a new aggregator")
        heads = batch if isinstance(batch, Mapping) else {None: batch}
        for key, tensor in heads.items():
            if key not in self._blends:
                self._blends[key] = self._start(key)
            add_checked(self._blends[key][0], tensor, locations)

    def _start(self, key: str | None) -> tuple[Blend, TensorSink | ImageSink]:
        if self._blends and (key is None or None in self._blends):
            raise OptionError("batches must be all tensors or all dicts")
        sink = self._make_sink(key)

        def finalise(voxels: torch.Tensor) -> torch.Tensor:
            return reduce_channels(voxels, self.reduce, self.dtype)

        mode, shape = self.overlap_mode, self.output_shape
        if self._grid is not None:
            return SweptBlend(self._grid.grid, mode, sink, finalise, output_shape=shape), sink
        overlap, fill = self.patch_overlap, self.fill
        blend = LooseBlend(self.spatial_shape, mode, overlap, sink, finalise, output_shape=shape, fill=fill)
        return blend, sink

    def _make_sink(self, key: str | None) -> TensorSink | ImageSink:
        if self._output is None:
            return TensorSink(self.output_shape)
        if key is not None:
            check_name(key, "output")
        folder = self._output.with_name(f".{self._output.name}.{uuid.uuid4().hex}")
        folder.mkdir(parents=True)
        subject = self._grid.subject if self._grid else None
        affine = next(iter(subject.images.values())).affine if subject else np.eye(4)
        scale = [n / m for n, m in zip(self.spatial_shape, self.output_shape, strict=True)]
        affine[:3, 3] += affine[:3, :3] @ ((np.array(scale) - 1) / 2)
        affine[:3, :3] *= scale
        return ImageSink(
            StagedImage(folder),
            subject=subject.name if subject else "output",
            name=key or self._output.name,
            kind=kind_of(self.reduce),
            spatial_shape=self.output_shape,
            affine=affine,
        )

    def get_output(self, key: str | None = None) -> Output:
        """The result: a tensor (C, I, J, K), or the image that was written; of a dict, that of ``key``."""
        if not self._outputs:
            self._finish()
        if key not in self._outputs:
            raise UnknownNameError.among("output", key, map(str, self._outputs), "the aggregator")
        return self._outputs[key]

    def _finish(self) -> None:
        if not self._blends:
            raise IncompleteCoverageError("no patch was added; nothing is there to be blended")
        for blend, _ in self._blends.values():
            blend.finish()
        for key, (_, sink) in self._blends.items():
            self._outputs[key] = sink.tensor if isinstance(sink, TensorSink) else self._publish(key, sink)  # type: ignore[assignment]

    def _publish(self, key: str | None, sink: ImageSink) -> Image:
        assert self._output is not None
        record = sink.finish()
        target = self._output if key is None else self._output / key
        target.parent.mkdir(parents=True, exist_ok=True)
        sink.stage.folder.rename(target)
        return stored_image(target, record)

    def close(self) -> None:
        """Remove what was written of an output that is not complete."""
        for _, sink in self._blends.values():
            if isinstance(sink, ImageSink):
                sink.stage.discard()
        self._blends = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
