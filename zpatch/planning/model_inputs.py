"""The images of a subject as a network is fed them: checked, normalised, on the model's grid; its mask."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from zpatch.digests import Json
from zpatch.errors import OptionError, SourceError
from zpatch.geometry.affines import Affine
from zpatch.geometry.boxes import Bools, Integers, PatchLocation
from zpatch.geometry.patch_grid import PatchGrid
from zpatch.images.image import Image
from zpatch.images.normalization import Normalize, computed_statistics, lacks_statistics
from zpatch.images.subject import Subject
from zpatch.planning.prediction_options import PredictOptions
from zpatch.sampling.patch_views import PatchView, level_view

Measure = Callable[[Image, str], Json]


def measured(image: Image, name: str) -> Json:
    """The statistics of an image that has none, for ``normalize``: its voxels are read once."""
    return computed_statistics(image)


@dataclass(frozen=True, slots=True, eq=False)
class ModelInputs:
    """The images of a subject that a network is fed, on the grid that it sees.

    Attributes:
        subject: The subject.
        views: What a patch is stacked of: its images, all of one shape, and coarser levels of them.
        native: The image whose own grid the output is on, unless it is asked for on the model's.
    """

    subject: Subject
    views: tuple[PatchView, ...]
    native: Image

    @classmethod
    def of(cls, subject: Subject, options: PredictOptions, measure: Measure = measured) -> Self:
        """The images that some options name. ``measure`` gives statistics of an image that has none."""
        images = []
        for name in options.image:
            text = f"image {name!r} of subject {subject.name!r}"
            _check_usable(subject[name], text)
            image = subject[name] if options.strict else filling(subject[name])
            images.append(_normalized(image, text, options.normalize, measure))
        native = images[0] if options.align is None else subject[options.align]
        if options.align in options.image:
            native = images[options.image.index(options.align)]
        placed = [_placed(image, native, options) for image in images]
        if len({image.spatial_shape for image in placed}) > 1:
            shapes = ", ".join(str(image.spatial_shape) for image in placed)
            raise OptionError(
                f"the images {', '.join(options.image)} of {subject.name!r} differ in shape: {shapes}; "
                f"align= puts them on the grid of one",
                option="image",
            )
        mode = options.reading_mode
        named = dict(zip(options.image, placed, strict=True))
        views = [PatchView(name, image, padding_mode=mode) for name, image in named.items()]
        views += [
            level_view(name, image, width, mode, subject.name)
            for width in options.context
            for name, image in named.items()
        ]
        return cls(subject, tuple(views), native)

    @property
    def images(self) -> list[Image]:
        """The images of the views."""
        return [view.image for view in self.views]

    def outside(self, grid: PatchGrid, options: PredictOptions) -> Bools | None:
        """Which patches of the model's grid are wholly outside the mask; None without a mask.

        A mask is on the native grid. A patch is inside if a voxel of the mask is that any of its voxels is
        made from, or that is made from any of them.
        """
        mask, subject = options.mask, self.subject
        if mask is None:
            return None
        if callable(mask):
            of_model = subject.on_grid_of(self.images[0]) if options.changes_grid else subject
            found = np.ones(grid.counts, dtype=bool)
            for position in np.ndindex(grid.counts):
                found[position] = not mask(of_model, grid.at(position))
            return found
        placed = _mask(subject, mask, self.native, options)
        matrix = placed.grid.matrix_from(self.images[0].grid)
        image, sources = placed.root
        for source in sources:  # not by the affine of the root, which may have been given another one
            matrix = source.matrix @ matrix
        return _outside(image, grid, matrix)


def are_slides(subjects: Any) -> bool:
    """Whether the first subject is a slide."""
    is_list = isinstance(subjects, Sequence) and len(subjects) > 0
    return is_list and isinstance(subjects[0], Subject) and subjects[0].is_slide


def filling(image: Image) -> Image:
    """The image, with 0 in place of tiles of a slide that cannot be decoded."""
    source = image.source.filling()
    return image if source is image.source else image.with_source(source)


def _placed(image: Image, native: Image, options: PredictOptions) -> Image:
    """An image on the model's grid; itself, if it is there already."""
    if options.align is None:
        native = image
    model = native
    if options.orientation is not None:
        model = model.oriented(options.orientation)
    if options.spacing is not None:
        model = model.resampled(options.spacing)
    if image.grid.is_same(model.grid):
        return image
    return model if image is native else image.on_grid_of(model)


def _normalized(image: Image, name: str, mode: str | None, measure: Measure) -> Image:
    if mode is None:
        return image
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


def _mask(subject: Subject, name: str, native: Image, options: PredictOptions) -> Image:
    """The mask of a subject, on the native grid."""
    image = subject[name]
    if image.record is None and _is_of_time_points(image):
        raise OptionError(
            f"the mask {name!r} of {subject.name!r} has {image.num_channels} time points; give one of them",
            option="mask",
        )
    if options.align is not None and not image.grid.is_same(native.grid):
        return image.on_grid_of(native, interpolation="nearest")
    if image.spatial_shape != native.spatial_shape:
        raise OptionError(
            f"the mask {name!r} of {subject.name!r} has the shape {image.spatial_shape} (I, J, K), the image "
            f"{native.spatial_shape}; give a mask on the image's own grid",
            option="mask",
        )
    return image


def _outside(mask: Image, grid: PatchGrid, matrix: Affine) -> Bools:
    """Which patches of a grid, whose voxels ``matrix`` places in the mask, touch no voxel of the mask.

    The mask is read once, chunk by chunk.
    """
    outside = np.ones(grid.counts, dtype=bool)
    along = np.abs(matrix[:3, :3]).argmax(axis=0).tolist()  # the axis of the mask for each of the grid
    boxes = [_reaches(grid, matrix, axis, mask.spatial_shape[of]) for axis, of in enumerate(along)]
    for chunk in _chunks(mask):
        spans = [(chunk.index[of], chunk.index_fin[of]) for of in along]
        touching = [
            np.flatnonzero((low < stop) & (high > start))
            for (low, high), (start, stop) in zip(boxes, spans, strict=True)
        ]
        if not outside[np.ix_(*touching)].any():
            continue
        voxels = mask.read(chunk)
        for position in itertools.product(*touching):
            part = [slice(None)] * 4
            for of, number, (low, high), (start, _) in zip(along, position, boxes, spans, strict=True):
                part[1 + of] = slice(max(low[number] - start, 0), high[number] - start)
            outside[position] &= not voxels[tuple(part)].any()
    return outside


def _reaches(grid: PatchGrid, matrix: Affine, axis: int, length: int) -> tuple[Integers, Integers]:
    """The voxels of an axis of the mask, from and up to, that each patch touches on an axis of its grid."""
    of = int(np.abs(matrix[:3, axis]).argmax())
    factor, shift = float(matrix[of, axis]), float(matrix[of, 3])
    is_exact = abs(factor) == 1 and shift == round(shift)
    reach = 0 if is_exact else 1  # a voxel in between is made from its neighbours
    starts = grid.starts[axis]
    ends = factor * np.stack([starts - reach, starts + grid.patch_size[axis] - 1 + reach]) + shift
    low, high = np.floor(ends.min(axis=0)).astype(int), np.ceil(ends.max(axis=0)).astype(int) + 1
    return np.clip(low, 0, length), np.clip(high, 0, length)


def _chunks(image: Image) -> Iterator[PatchLocation]:
    steps = list(zip(image.spatial_shape, image.source.chunk_shape, strict=True))
    for first in itertools.product(*(range(0, n, c) for n, c in steps)):
        stop = [min(start + c, n) for start, (n, c) in zip(first, steps, strict=True)]
        yield PatchLocation.between(first, stop)
