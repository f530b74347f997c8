"""Samplers that draw the locations of patches: uniformly, by weight or by class."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from zpatch.errors import NothingToDrawError, OptionError, UnknownNameError
from zpatch.images.image import Image, LabelMap
from zpatch.images.subject import Subject
from zpatch.sampling.centre_draws import draw_centres
from zpatch.sampling.centre_maps import label_classes, recorded_labels, weight_map
from zpatch.sampling.patch_sampler import MAX_REJECTIONS, Accept, PatchSize, RandomSampler


class UniformSampler(RandomSampler):
    """Every first voxel from 0 to n - p on each axis is equally likely.

    >>> from zpatch.images.image import ScalarImage
    >>> subject = Subject(t1=ScalarImage(np.zeros((8, 8, 8))))
    >>> [tuple(patch.t1.data.shape) for patch in UniformSampler(4)(subject, 2, rng=0)]
    [(1, 4, 4, 4), (1, 4, 4, 4)]
    """

    def starts(self, subject: Subject, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """The first voxels (count, 3) of patches of a subject."""
        allowed = self.allowed(subject)
        return self.around(allowed.index + rng.integers(0, allowed.size, size=(count, 3)), subject)


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

    def __init__(
        self,
        patch_size: PatchSize,
        probability_map: str,
        *,
        context: Sequence[int] = (),
        padding_mode: str | None = None,
        fill: float = 0,
        accept: Accept | None = None,
        max_rejections: int = MAX_REJECTIONS,
    ) -> None:
        super().__init__(
            patch_size,
            context=context,
            padding_mode=padding_mode,
            fill=fill,
            accept=accept,
            max_rejections=max_rejections,
        )
        self.probability_map = probability_map

    def check(self, subject: Subject) -> None:
        """Refuse a subject that no patch can be taken of, as far as that is known without reading voxels."""
        super().check(subject)
        subject[self.probability_map]

    def starts(self, subject: Subject, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """The first voxels (count, 3) of patches of a subject."""
        image = subject[self.probability_map]
        where = f"the map {self.probability_map!r} of subject {subject.name!r}"
        weights = weight_map(image, where)
        allowed = self.allowed(subject)
        [centres] = draw_centres([(weights.allowed_mass(allowed), count)], weights.read, rng)
        if centres is None:
            raise NothingToDrawError(
                f"{where} is zero wherever a patch of {self.patch_size} fits; all of its weight is near "
                f"the border; use a smaller patch_size"
            )
        return self.around(centres, subject)

    def _options(self) -> dict[str, object]:
        patch_size, *others = super()._options().items()
        return dict([patch_size, ("probability_map", self.probability_map), *others])


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
        padding_mode: str | None = None,
        fill: float = 0,
        accept: Accept | None = None,
        max_rejections: int = MAX_REJECTIONS,
    ) -> None:
        super().__init__(
            patch_size,
            context=context,
            padding_mode=padding_mode,
            fill=fill,
            accept=accept,
            max_rejections=max_rejections,
        )
        self.label_name = label_name
        if label_probabilities is not None:
            _check_probabilities(label_probabilities)
        self.label_probabilities = label_probabilities

    @property
    def _wanted(self) -> dict[int | None, float]:
        """The probability of each class, not normalised; None is all but 0 together."""
        if self.label_probabilities is None:
            return {None: 1.0}
        return {label: float(p) for label, p in self.label_probabilities.items()}

    def with_classes(self, label_name: str, probabilities: Mapping[int, float]) -> LabelSampler:
        """The sampler with these probabilities, if it is of this map, or of the first one, and has none."""
        if self.label_probabilities is not None or self.label_name not in (None, label_name):
            return self
        changed = copy.copy(self)
        changed.label_name, changed.label_probabilities = label_name, dict(probabilities)
        return changed

    def check(self, subject: Subject) -> None:
        """Refuse a subject that no patch can be taken of, as far as that is known without reading voxels."""
        super().check(subject)
        name, _ = self._label_map(subject)
        classes = self.classes(subject)
        if classes and not any(classes.values()):
            raise NothingToDrawError(
                f"{name!r} of subject {subject.name!r} has no voxel of the wanted classes "
                f"({self._wanted_names()})"
            )

    def classes(self, subject: Subject) -> dict[str, bool]:
        """Whether the subject has each class that is drawn, by its description, where that is known."""
        name, image = self._label_map(subject)
        labels = recorded_labels(image)
        if labels is None:
            return {}
        wanted = [label for label, p in self._wanted.items() if p > 0]
        return {
            f"{'any class but 0' if label is None else f'class {label}'} in {name!r}": (
                bool(labels - {0}) if label is None else label in labels
            )
            for label in wanted
        }

    def starts(self, subject: Subject, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """The first voxels (count, 3) of patches of a subject."""
        name, image = self._label_map(subject)
        classes = label_classes(image)
        allowed = self.allowed(subject)
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
            raise NothingToDrawError(
                f"no voxel of the wanted classes ({self._wanted_names()}) of {name!r} of subject "
                f"{subject.name!r} can be the centre of a patch of {self.patch_size}; "
                f"use a smaller patch_size or other label_probabilities"
            )
        return self.around(centres, subject)

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

    def _options(self) -> dict[str, object]:
        patch_size, *others = super()._options().items()
        own = ("label_name", self.label_name), ("label_probabilities", self.label_probabilities)
        return dict([patch_size, *own, *others])


def _check_probabilities(probabilities: Mapping[int, float]) -> None:
    if not isinstance(probabilities, Mapping):
        raise OptionError(
            f"label_probabilities must be a dictionary by class, as {{0: 1, 1: 3}}, not {probabilities!r}"
        )
    values = np.array(list(probabilities.values()), dtype=np.float64)
    if not np.isfinite(values).all() or (values < 0).any() or not values.sum() > 0:
        raise OptionError(
            f"label_probabilities must be at least 0, finite, and not all 0: {dict(probabilities)}"
        )
