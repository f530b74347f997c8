"""What samplers have in common: a strategy chooses locations, and images read the voxels there."""

from __future__ import annotations

import copy
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from zpatch.errors import OptionError, PatchLocationError
from zpatch.geometry.boxes import (
    AXIS_NAMES,
    PatchLocation,
    allowed_centres,
    check_patch_fits,
    patch_size_triple,
    starts_around,
)
from zpatch.geometry.padding import check_padding_mode
from zpatch.images.cohort import first_alike
from zpatch.images.subject import Subject
from zpatch.sampling import patch_batch  # noqa: F401 - it lets torch's default_collate know patches
from zpatch.sampling.patch import Patch, PatchImage, to_tensor
from zpatch.sampling.patch_views import checked_context, views_of
from zpatch.sampling.randomness import Purpose, as_generator, rng
from zpatch.sources.group_read import read_together
from zpatch.work_counts import Work, count

READ_TOGETHER = 16
MAX_REJECTIONS = 20

PatchSize = int | Sequence[int]
RandomSource = np.random.Generator | int | None
Accept = Callable[[Patch], Any]


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
    reads = [view.read(locations, fill=fill) for view in views]
    voxels = read_together(reads, [read.new_memory(contiguous=True) for read in reads])
    patches = []
    for n, location in enumerate(locations):
        images = {
            view.name: PatchImage(to_tensor(of_view[n]), view.affine(location), view.image.kind)
            for view, of_view in zip(views, voxels, strict=True)
        }
        patches.append(Patch(images, location, subject.name))
    return patches


class PatchSampler(ABC):
    """A strategy that says where the patches of a subject are, and how patches are padded and read.

    ``patch_size`` is in voxels, one integer or three (I, J, K), or two (I, J) for images of one plane. One
    integer is ``p x p x 1`` for subjects of slides. See ``RandomSampler`` and ``GridSampler`` for
    ``padding_mode`` and ``fill``, and the first for ``context``.
    """

    def __init__(
        self,
        patch_size: PatchSize,
        *,
        context: Sequence[int] = (),
        padding_mode: str | None = None,
        fill: float = 0,
    ) -> None:
        self.patch_size = patch_size_triple(patch_size)
        self._is_cube = isinstance(patch_size, int)
        self.context = checked_context(context)
        check_padding_mode(padding_mode)
        self.padding_mode = padding_mode
        self.fill = fill

    def fitted(self, subject: Subject) -> Self:
        """The sampler, with patches of one plane if its size is one integer and the subject is a slide."""
        if not (self._is_cube and subject.is_slide):
            return self
        flat = copy.copy(self)
        flat._flatten()
        return flat

    def _flatten(self) -> None:
        """Take patches of one plane."""
        self.patch_size = *self.patch_size[:2], 1
        self._is_cube = False

    @abstractmethod
    def counts(self, subjects: Sequence[Subject], patches_per_volume: int) -> NDArray[np.int64]:
        """How many patches a queue takes of each subject in an epoch, (N,)."""

    @abstractmethod
    def numbered(
        self, subject: Subject, numbers: Sequence[int], patches_per_volume: int, rng: np.random.Generator
    ) -> list[PatchLocation]:
        """The locations of some of the patches that a queue takes of a subject in a visit, by number."""

    def read(self, subject: Subject, locations: Sequence[PatchLocation]) -> list[Patch]:
        """The patches of a subject at some locations, padded beyond the border."""
        return read_patches(
            subject, locations, context=self.context, padding_mode=self.padding_mode, fill=self.fill
        )

    def check(self, subject: Subject) -> None:
        """Refuse a subject that no patch can be taken of, as far as that is known without reading voxels."""
        self.check_fits(subject)
        views_of(subject, self.context, self.padding_mode)

    def alike(self, subjects: Sequence[Subject]) -> NDArray[np.int64]:
        """For each subject the first one of which ``check`` and ``classes`` say the same, (N,)."""
        return first_alike(subjects)

    def classes(self, subject: Subject) -> dict[str, bool]:
        """Whether the subject has each class that is drawn, by its description, where that is known."""
        return {}

    def with_classes(self, label_name: str, probabilities: Mapping[int, float]) -> PatchSampler:
        """The sampler whose LabelSamplers of a map have these probabilities, if they have none."""
        return self

    @property
    def subject_names(self) -> Collection[str]:
        """Names of the subjects that a queue must have."""
        return ()

    def check_fits(self, subject: Subject) -> None:
        """Refuse a subject that is smaller than the patch, unless it is padded."""
        if self.padding_mode is None:
            check_patch_fits(self.patch_size, subject.spatial_shape, subject.name)


class RandomSampler(PatchSampler):
    """A sampler that draws locations at random; ``sampler(subject, num_patches)`` yields patches.

    ``patch_size`` is in voxels, one integer or three (I, J, K). A patch larger than the volume is a
    PatchSizeError, unless there is a ``padding_mode`` (constant with ``fill``, edge, reflect, symmetric,
    wrap: as numpy.pad). Then an axis that is shorter than the patch is padded up to it on both sides, with an
    odd voxel after it: patches have one place on that axis, and each of its voxels may be the centre that is
    drawn. Other axes are not padded. ``fill`` is an intensity: other images are padded with 0.

    With ``context=(2, 4)`` a patch with the image ``t1`` also has ``t1_x2`` and ``t1_x4``: as many voxels
    around the same centre, 2 and 4 times as wide, from the coarser levels that `zpatch convert --pyramid`
    stores. The centre is kept to half a coarse voxel, and beyond the border the edge voxel is repeated. An
    image without these levels is an OptionError.

    With ``accept``, a function of a patch that gives True or False, a location whose patch is not accepted is
    drawn again, at most ``max_rejections`` times; then the last one drawn is taken. Each patch is drawn again
    from random numbers of its own. Patches are read once more for it, as ``sampler(subject)`` gives them.

    A strategy of one's own is a subclass with one method, ``starts``, and works in a queue like any other. It
    must draw from ``rng`` alone, and if it has options, show them in its ``repr``, by which a queue knows
    whether a state is its own.

    >>> from zpatch.images.image import ScalarImage
    >>> class NearTheMiddle(RandomSampler):
    ...     def starts(self, subject, count, rng):
    ...         allowed = self.allowed(subject)
    ...         middle = allowed.index + np.array(allowed.size) // 2
    ...         return self.around(middle + rng.integers(-1, 2, size=(count, 3)), subject)
    >>> subject = Subject(t1=ScalarImage(np.zeros((20, 20, 20))))
    >>> all(7 <= place.index[0] <= 9 for place in NearTheMiddle(4).locations(subject, 5, rng=0))
    True
    """

    def __init__(
        self,
        patch_size: PatchSize,
        *,
        context: Sequence[int] = (),
        padding_mode: str | None = None,
        fill: float = 0,
        accept: Accept | None = None,
        max_rejections: int = MAX_REJECTIONS,
    ) -> None:
        super().__init__(patch_size, context=context, padding_mode=padding_mode, fill=fill)
        if not (accept is None or callable(accept)):
            raise OptionError(f"accept must be a function of a patch, not {accept!r}")
        if not isinstance(max_rejections, int) or max_rejections < 1:
            raise OptionError(f"max_rejections must be an integer of at least 1, not {max_rejections!r}")
        self.accept, self.max_rejections = accept, max_rejections

    @abstractmethod
    def starts(self, subject: Subject, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """The first voxels (count, 3) of patches of a subject, drawn from ``rng``."""

    def allowed(self, subject: Subject) -> PatchLocation:
        """The box of voxels of a subject that may be the centre of a patch."""
        return allowed_centres(subject.spatial_shape, self.patch_size)

    def around(self, centres: NDArray[np.int64], subject: Subject) -> NDArray[np.int64]:
        """The first voxels of the patches around some centres (count, 3), voxel ``p // 2`` of each patch."""
        return starts_around(centres, subject.spatial_shape, self.patch_size)

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
            yield from self.read(subject, self.locations(subject, group, generator))
            left = None if left is None else left - group

    def locations(self, subject: Subject, num_patches: int, rng: RandomSource = None) -> list[PatchLocation]:
        """The locations of ``num_patches`` patches.

        Of the images, only a map is read, and only in part; with ``accept``, the patches are.
        """
        if num_patches < 0:
            raise OptionError(f"num_patches must be at least 0, not {num_patches}")
        if not isinstance(subject, Subject):
            raise OptionError(f"a sampler draws from one subject, as cohort[0], not from {subject!r}")
        return self.numbered(subject, range(num_patches), num_patches, as_generator(rng))

    def _drawn(self, subject: Subject, count: int, rng: np.random.Generator) -> list[PatchLocation]:
        self.check_fits(subject)
        starts = np.asarray(self.starts(subject, count, rng))
        self._check_starts(starts, count, subject)
        return [PatchLocation((i, j, k), self.patch_size) for i, j, k in starts.tolist()]

    def counts(self, subjects: Sequence[Subject], patches_per_volume: int) -> NDArray[np.int64]:
        """How many patches a queue takes of each subject in an epoch, (N,): ``patches_per_volume``."""
        return np.full(len(subjects), patches_per_volume)

    def numbered(
        self, subject: Subject, numbers: Sequence[int], patches_per_volume: int, rng: np.random.Generator
    ) -> list[PatchLocation]:
        """The locations of some of the ``patches_per_volume`` patches that are drawn in a visit."""
        fitted = self.fitted(subject)
        drawn = fitted._drawn(subject, patches_per_volume, rng)
        chosen = [drawn[number] for number in numbers]
        if self.accept is None:
            return chosen
        seeds = rng.integers(2**63, size=patches_per_volume).tolist()
        return fitted._until_accepted(subject, chosen, [seeds[number] for number in numbers])

    def _until_accepted(
        self, subject: Subject, locations: list[PatchLocation], seeds: Sequence[int]
    ) -> list[PatchLocation]:
        """The locations, of which those that are rejected are drawn again, each by the stream of its seed."""
        streams: dict[int, np.random.Generator] = {}
        pending = self._rejected(subject, locations, range(len(locations)))
        for _ in range(self.max_rejections):
            count(Work.REJECTED, len(pending))
            for n in pending:
                if n not in streams:
                    streams[n] = rng(seeds[n], purpose=Purpose.REDRAW)
                [locations[n]] = self._drawn(subject, 1, streams[n])
            pending = self._rejected(subject, locations, pending)
        count(Work.EXHAUSTED, len(pending))
        return locations

    def _rejected(
        self, subject: Subject, locations: Sequence[PatchLocation], pending: Sequence[int]
    ) -> list[int]:
        """Which of the ``pending`` locations are not accepted; they are read in groups."""
        groups = [pending[n : n + READ_TOGETHER] for n in range(0, len(pending), READ_TOGETHER)]
        return [
            number
            for group in groups
            for number, patch in zip(group, self.read(subject, [locations[n] for n in group]), strict=True)
            if not self._is_accepted(patch)
        ]

    def _is_accepted(self, patch: Patch) -> bool:
        assert self.accept is not None
        try:
            answer = self.accept(patch)
            if getattr(answer, "dtype", type(answer)) not in (bool, np.dtype(bool), torch.bool):
                raise OptionError(f"accept must give True or False, not {answer!r:.200}")
            return bool(answer)
        except Exception as error:
            error.add_note(f"in accept= of the patch at {patch.location.index} of subject {patch.subject!r}")
            raise

    def _check_starts(self, starts: NDArray[np.int64], count: int, subject: Subject) -> None:
        if starts.shape != (count, 3) or starts.dtype.kind not in "iu":
            raise OptionError(
                f"{type(self).__name__}.starts must give integers of shape ({count}, 3), the first voxels of "
                f"patches, not {starts.dtype} of shape {starts.shape}"
            )
        stops = starts + self.patch_size
        outside = (starts < 0) | (stops > subject.spatial_shape)
        if count and self.padding_mode is None and outside.any():
            row, axis = map(int, np.argwhere(outside)[0])
            raise PatchLocationError(
                f"{type(self).__name__}.starts gives a patch from {starts[row, axis]} to {stops[row, axis]} "
                f"on axis {AXIS_NAMES[axis]} of {subject.name!r} ({subject.spatial_shape[axis]} voxels)"
            )

    def __repr__(self) -> str:
        options = [f"{name}={value!r}" for name, value in self._options().items()]
        return f"{type(self).__name__}({', '.join(options)})"

    def _options(self) -> dict[str, object]:
        """The options that are shown: those that a sampler always has, and others that were given."""
        given: dict[str, object] = {"patch_size": self.patch_size}
        if self.context:
            given["context"] = self.context
        if self.padding_mode is not None:
            given |= {"padding_mode": self.padding_mode, "fill": self.fill}
        return given | self._acceptance()

    def _acceptance(self) -> dict[str, object]:
        """The options that are about ``accept``, if it is given, without its address in memory."""
        if self.accept is None:
            return {}
        name = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(self.accept))
        return {"accept": name, "max_rejections": self.max_rejections}
