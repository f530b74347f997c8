"""Samplers that draw the locations of patches: uniformly, by weight, or by class.

A sampler chooses locations; images read the voxels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from zpatch.errors import OptionError, SamplingError, UnknownNameError
from zpatch.geometry.boxes import (
    PatchLocation,
    allowed_centres,
    check_patch_fits,
    patch_size_triple,
)
from zpatch.images.image import Image, LabelMap
from zpatch.images.subject import Subject
from zpatch.sampling.centre_draws import draw_centres
from zpatch.sampling.centre_maps import label_classes, weight_map
from zpatch.sampling.patch import Patch, PatchImage, to_tensor
from zpatch.sampling.patch_views import checked_context, views_of
from zpatch.sampling.randomness import as_generator
from zpatch.sources.group_read import read_together

READ_TOGETHER = 16

PatchSize = int | Sequence[int]
RandomSource = np.random.Generator | int | None


def read_patches(
    subject: Subject,
    locations: Sequence[PatchLocation],
    *,
    context: Sequence[int] = (),
    padding_mode: str | None = None,
    fill: float = 0,
) -> list[Patch]:
    """The patches of a subject at some locations, with their context; all images are read as one group.

    ``fill`` is the padding of images that are intensities, if it is constant; that of others is 0.
    """
    if not locations:
        return []
    views = views_of(subject, context, padding_mode)
    voxels = read_together([view.read(locations, fill=fill) for view in views], [None] * len(views))
    patches = []
    for n, location in enumerate(locations):
        images = {
            view.name: PatchImage(to_tensor(of_view[n]), view.affine(location), view.image.kind)
            for view, of_view in zip(views, voxels, strict=True)
        }
        patches.append(Patch(images, location, subject.name))
    return patches


class RandomSampler(ABC):
    """A sampler that draws locations at random; ``sampler(subject, num_patches)`` yields patches.

    ``patch_size`` is in voxels, one integer or three (I, J, K). A patch larger than the volume is a
    PatchSizeError.

    With ``context=(2, 4)`` a patch with the image ``t1`` also has ``t1_x2`` and ``t1_x4``: as many voxels
    around the same centre, 2 and 4 times as wide, from the coarser levels that `zpatch convert --pyramid`
    stores. The centre is kept to half a coarse voxel, and beyond the border the edge voxel is repeated. An
    image without these levels is an OptionError.
    """

    def __init__(self, patch_size: PatchSize, *, context: Sequence[int] = ()) -> None:
        self.patch_size = patch_size_triple(patch_size)
        self.context = checked_context(context)

    def __call__(
        self, subject: Subject, num_patches: int | None = None, *, rng: RandomSource = None
    ) -> Iterator[Patch]:
        """Patches of a subject, without end unless there is a number.

        ``rng`` is a numpy Generator or an integer seed; None is a new generator with a seed from the system.
        """
        generator = as_generator(rng)
        left = num_patches
        while left is None or left > 0:
            group = READ_TOGETHER if left is None else min(left, READ_TOGETHER)
            locations = self.locations(subject, group, generator)
            yield from read_patches(subject, locations, context=self.context)
            left = None if left is None else left - group

    def locations(self, subject: Subject, num_patches: int, rng: RandomSource = None) -> list[PatchLocation]:
        """The locations of ``num_patches`` patches; of the images, only a map is read, and only in part."""
        if num_patches < 0:
            raise OptionError(f"num_patches must be at least 0, not {num_patches}")
        check_patch_fits(self.patch_size, subject.spatial_shape, subject.name)
        starts = self._starts(subject, num_patches, as_generator(rng))
        return [PatchLocation((i, j, k), self.patch_size) for i, j, k in starts.tolist()]

    @abstractmethod
    def _starts(self, subject: Subject, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """First voxels (count, 3) of the patches."""

    def _start_of(self, centres: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.asarray(centres - np.array(self.patch_size) // 2)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(patch_size={self.patch_size}{self._context_text})"

    @property
    def _context_text(self) -> str:
        return f", context={self.context}" if self.context else ""


class UniformSampler(RandomSampler):
    """Every first voxel from 0 to n - p on each axis is equally likely.

    >>> from zpatch.images.image import ScalarImage
    >>> subject = Subject(t1=ScalarImage(np.zeros((8, 8, 8))))
    >>> [tuple(patch.t1.data.shape) for patch in UniformSampler(4)(subject, 2, rng=0)]
    [(1, 4, 4, 4), (1, 4, 4, 4)]
    """

    def _starts(self, subject: Subject, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        allowed = allowed_centres(subject.spatial_shape, self.patch_size)
        return rng.integers(0, allowed.size, size=(count, 3))


class WeightedSampler(RandomSampler):
    """P(centre = v) is proportional to the value at v of the image ``probability_map``.

    Centres are the voxels around which the whole patch fits: all but the first ``p // 2`` and the last
    ``(p - 1) // 2`` of each axis. Negative, NaN or all-zero maps are a SamplingError.

    >>> from zpatch.images.image import SamplingMap
    >>> weights = np.zeros((8, 8, 8))
    >>> weights[4, 5, 3] = 1
    >>> subject = Subject(where=SamplingMap(weights))
    >>> WeightedSampler(4, "where").locations(subject, 1)[0].index  # the centre is voxel 4 // 2 of the patch
    (2, 3, 1)
    """

    def __init__(self, patch_size: PatchSize, probability_map: str, *, context: Sequence[int] = ()) -> None:
        super().__init__(patch_size, context=context)
        self.probability_map = probability_map

    def _starts(self, subject: Subject, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        image = subject[self.probability_map]
        where = f"the map {self.probability_map!r} of subject {subject.name!r}"
        weights = weight_map(image, where)
        allowed = allowed_centres(subject.spatial_shape, self.patch_size)
        [centres] = draw_centres([(weights.allowed_mass(allowed), count)], weights.read, rng)
        if centres is None:
            raise SamplingError(
                f"{where} is zero wherever a patch of {self.patch_size} fits; all of its weight is near "
                f"the border; use a smaller patch_size"
            )
        return self._start_of(centres)

    def __repr__(self) -> str:
        return (
            f"WeightedSampler(patch_size={self.patch_size}, probability_map={self.probability_map!r}"
            f"{self._context_text})"
        )


class LabelSampler(RandomSampler):
    """The class of a patch's centre is drawn first, then the centre among the voxels of that class.

    A class has probability ``label_probabilities[c] / sum`` over the classes present among the allowed
    centres (see WeightedSampler). None makes all values but 0 one class. In a label map of several channels
    the keys are channel numbers, and a channel is present where it is not zero. ``label_name=None`` takes
    the subject's first label map. A subject in which no class is present is a SamplingError.

    >>> from zpatch.images.image import LabelMap
    >>> labels = np.zeros((8, 8, 8), np.uint8)
    >>> labels[4, 5, 3] = 2
    >>> subject = Subject(seg=LabelMap(labels))
    >>> LabelSampler(4, "seg", {2: 1.0}).locations(subject, 1)[0].index
    (2, 3, 1)
    """

    def __init__(
        self,
        patch_size: PatchSize,
        label_name: str | None = None,
        label_probabilities: Mapping[int, float] | None = None,
        *,
        context: Sequence[int] = (),
    ) -> None:
        super().__init__(patch_size, context=context)
        self.label_name = label_name
        if label_probabilities is not None:
            _check_probabilities(label_probabilities)
        self.label_probabilities = label_probabilities
        self._wanted: dict[int | None, float] = {None: 1.0}  # None: all but 0 together
        if label_probabilities is not None:
            self._wanted = {label: float(p) for label, p in label_probabilities.items()}

    def _starts(self, subject: Subject, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        name, image = self._label_map(subject)
        classes = label_classes(image)
        allowed = allowed_centres(subject.spatial_shape, self.patch_size)
        present = {label: p for label, p in self._wanted.items() if p > 0 and classes.has(label)}
        centres = np.empty((count, 3), dtype=np.int64)
        pending = np.arange(count)  # the rows of centres that are not drawn yet
        while pending.size and present:
            shares = np.array(list(present.values())) / sum(present.values())
            drawn = rng.choice(len(present), size=pending.size, p=shares)
            rows_of = {label: pending[drawn == number] for number, label in enumerate(present)}
            parts = [(classes.allowed_mass(label, allowed), len(rows)) for label, rows in rows_of.items()]
            missed = [pending[:0]]
            found = draw_centres(parts, classes.read, rng)
            for (label, rows), voxels in zip(rows_of.items(), found, strict=True):
                if voxels is not None:
                    centres[rows] = voxels
                elif rows.size:  # no voxel of the class is allowed: it is not present
                    missed.append(rows)
                    del present[label]
            pending = np.concatenate(missed)
        if pending.size:
            raise SamplingError(
                f"no voxel of the wanted classes ({self._wanted_names()}) of {name!r} of subject "
                f"{subject.name!r} can be the centre of a patch of {self.patch_size}; "
                f"use a smaller patch_size or other label_probabilities"
            )
        return self._start_of(centres)

    def _wanted_names(self) -> str:
        return ", ".join("all but 0" if c is None else str(c) for c, p in self._wanted.items() if p > 0)

    def _label_map(self, subject: Subject) -> tuple[str, Image]:
        if self.label_name is not None:
            return self.label_name, subject[self.label_name]
        for name, image in subject.images.items():
            if isinstance(image, LabelMap):
                return name, image
        raise UnknownNameError(
            f"subject {subject.name!r} has no label map (it has: {', '.join(subject.images)}); "
            f"say label_name="
        )

    def __repr__(self) -> str:
        return (
            f"LabelSampler(patch_size={self.patch_size}, label_name={self.label_name!r}, "
            f"label_probabilities={self.label_probabilities}{self._context_text})"
        )


def _check_probabilities(probabilities: Mapping[int, float]) -> None:
    values = np.array(list(probabilities.values()), dtype=np.float64)
    if not np.isfinite(values).all() or (values < 0).any() or not values.sum() > 0:
        raise OptionError(
            f"label_probabilities must be at least 0, finite, and not all 0: {dict(probabilities)}"
        )
