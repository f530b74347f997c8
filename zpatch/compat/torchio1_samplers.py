"""Samplers as TorchIO 0.18 to 1.x has them; ``torchio1`` describes all of its API."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from zpatch.compat.generation_errors import raised_as_in_torchio
from zpatch.compat.torchio1_subjects import Patch, Subject, as_subject
from zpatch.errors import OptionError
from zpatch.geometry.boxes import Triple
from zpatch.images.subject import Subject as NativeSubject
from zpatch.sampling import samplers
from zpatch.sampling.grid_sampler import GridSampler as NativeGridSampler
from zpatch.sampling.patch import Patch as NativePatch
from zpatch.sampling.patch_sampler import PatchSampler as NativePatchSampler
from zpatch.sampling.patch_sampler import PatchSize, RandomSampler


class PatchSampler:
    """A sampler of subjects. ``native`` is the sampler of zpatch that draws the locations."""

    def __init__(self, native: NativePatchSampler) -> None:
        self.native = native
        self.patch_size = np.array(native.patch_size)

    def offset(self, subject: Subject) -> Triple:
        """The first voxel of the padding, which locations are relative to."""
        return (0, 0, 0)

    def __call__(self, subject: NativeSubject, num_patches: int | None = None) -> Iterator[Patch]:
        """Patches of a subject, without end unless there is a number."""
        own = as_subject(subject).in_one_space()
        with raised_as_in_torchio("Empty probability map found"):
            yield from (self.of(own.transformed(patch), own) for patch in self._draw(own, num_patches))

    def of(self, patch: NativePatch, subject: Subject) -> Patch:
        """A patch of a subject as a mapping."""
        return Patch.of(patch, subject, self.offset(subject))

    def _draw(self, subject: Subject, num_patches: int | None) -> Iterator[NativePatch]:
        assert isinstance(self.native, RandomSampler)
        return self.native(subject, num_patches, rng=drawn_seed())


class UniformSampler(PatchSampler):
    """Each location of a patch is equally likely."""

    def __init__(self, patch_size: PatchSize) -> None:
        super().__init__(samplers.UniformSampler(patch_size))


class WeightedSampler(PatchSampler):
    """A voxel is the centre of a patch in proportion to its value in the image ``probability_map``."""

    def __init__(self, patch_size: PatchSize, probability_map: str) -> None:
        super().__init__(samplers.WeightedSampler(patch_size, probability_map))


class LabelSampler(PatchSampler):
    """The class of a patch's centre is drawn by ``label_probabilities``, then a voxel of that class."""

    def __init__(
        self,
        patch_size: PatchSize,
        label_name: str | None = None,
        label_probabilities: Mapping[int, float] | None = None,
    ) -> None:
        super().__init__(samplers.LabelSampler(patch_size, label_name, label_probabilities))


class GridSampler(PatchSampler, Dataset[Patch]):
    """All patches of a grid over a subject, as a dataset. Without a subject it is for a queue.

    ``padding_mode`` (a number is the value of the padding) pads half the overlap on each side; locations are
    then relative to the first voxel of the padding.
    """

    native: NativeGridSampler

    def __init__(
        self,
        subject: NativeSubject | None = None,
        patch_size: PatchSize | None = None,
        patch_overlap: PatchSize = (0, 0, 0),
        padding_mode: str | float | None = None,
    ) -> None:
        mode, fill = (
            (padding_mode, 0.0) if isinstance(padding_mode, str | None) else ("constant", padding_mode)
        )
        self.subject = None if subject is None else as_subject(subject)
        super().__init__(NativeGridSampler(self.subject, patch_size, patch_overlap, mode, fill))
        self.patch_overlap = np.array(self.native.patch_overlap)
        self.padding_mode = padding_mode

    def offset(self, subject: Subject) -> Triple:
        """The first voxel of the padding, which locations are relative to."""
        i, j, k = self.native.grid_of(subject).pad_before
        return -i, -j, -k

    @property
    def locations(self) -> NDArray[np.int64]:
        """First voxel and one past the last of each patch, (N, 6)."""
        first = np.array([location.index for location in self.native.locations]) + self.native.grid.pad_before
        return np.hstack([first, first + self.patch_size])

    def __len__(self) -> int:
        return len(self.native)

    def __getitem__(self, index: int) -> Patch:
        patch, subject = self.native[index], self.subject
        assert subject is not None
        return self.of(subject.transformed(patch), subject)

    def __call__(
        self, subject: NativeSubject | None = None, num_patches: int | None = None
    ) -> Iterator[Patch]:
        """All patches of a subject in order; of the subject of the grid if none is given."""
        if num_patches is not None:
            raise OptionError(
                "GridSampler does not support limiting the number of patches; leave out num_patches"
            )
        subject = self.subject if subject is None else subject
        if subject is None:
            raise OptionError("this GridSampler has no subject; give it one")
        return super().__call__(subject)

    def __iter__(self) -> Iterator[Patch]:
        return self()

    def _draw(self, subject: Subject, num_patches: int | None) -> Iterator[NativePatch]:
        return self.native(subject)


def drawn_seed() -> int:
    """A seed from torch's global generator."""
    return int(torch.randint(2**63 - 1, ()))
