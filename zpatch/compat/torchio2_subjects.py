"""Images, subjects and patches as TorchIO 2 has them; ``torchio2`` describes all of its API."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data._utils.collate import default_collate_fn_map

from zpatch.compat.nifti_cache import cached_image, save_image
from zpatch.compat.transforms import torchio_on_patches
from zpatch.errors import OptionError
from zpatch.geometry.boxes import PatchLocation, Triple
from zpatch.images import image
from zpatch.images.cohort import Cohort
from zpatch.images.subject import Subject as NativeSubject
from zpatch.sampling.patch import Patch, to_tensor
from zpatch.sampling.patch_batch import PatchBatch, collate
from zpatch.sampling.patch_sampler import read_patches


class _Image(image.Image):
    """An image whose ``data`` is a tensor."""

    def __init__(self, source: Any, *, affine: Any = None) -> None:
        if isinstance(source, str | os.PathLike):
            source = cached_image(source, self.kind)
        if isinstance(source, image.Image):
            affine = source.affine if affine is None else affine
            source = source.opened
        super().__init__(source, affine=affine)

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        """The whole image (C, I, J, K) in memory."""
        return to_tensor(super().data)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the image to a NIfTI file."""
        save_image(path, super().data, self.affine)


class ScalarImage(_Image, image.ScalarImage):
    """Intensities of a NIfTI file, a tensor (C, I, J, K), a zpatch image, or any source of one.

    ``affine`` is 4 x 4; None takes that of the source.
    """


class LabelMap(_Image, image.LabelMap):
    """Classes, from the same sources as ``ScalarImage``."""


class Subject(NativeSubject):
    """Images by name, and metadata: ``Subject(t1=ScalarImage("t1.nii.gz"), age=45)``."""

    def __init__(self, **entries: Any) -> None:
        images = {key: value for key, value in entries.items() if isinstance(value, image.Image)}
        metadata = {key: value for key, value in entries.items() if key not in images}
        if not images:
            raise OptionError("A Subject must contain at least one entry that is an image")
        self._set(images, metadata.get("name", "subject"), metadata.get("split"), metadata)

    def __getattr__(self, name: str) -> Any:
        metadata = self.__dict__.get("metadata", {})
        return metadata[name] if name in metadata else super().__getattr__(name)


@dataclass(frozen=True)
class SubjectPatch(Patch):
    """A patch with TorchIO's names: ``patch.patch_location``, ``patch.metadata``."""

    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def patch_location(self) -> PatchLocation:
        """Where the patch is in its volume."""
        return self.location

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(C, I, J, K) of the first image."""
        c, i, j, k = next(iter(self.images.values())).data.shape
        return c, i, j, k

    @property
    def spatial_shape(self) -> Triple:
        """Extent along I, J, K in voxels."""
        _, i, j, k = self.shape
        return i, j, k


@dataclass(frozen=True)
class SubjectsBatch(PatchBatch):
    """Patches, or whole subjects, with a batch axis: ``batch.t1.data`` is (B, C, I, J, K).

    ``metadata`` has a list for each key of the first patch, with None where a patch lacks the key, and the
    list of locations under ``patch_location``.
    """

    metadata: Mapping[str, list[Any]]


def collate_subjects(batch: Sequence[Patch | NativeSubject]) -> SubjectsBatch:
    """Stack patches, or whole subjects of one shape, into a batch: ``collate_fn`` of a DataLoader."""
    patches = [_whole(one) if isinstance(one, NativeSubject) else one for one in batch]
    return with_lists(collate(patches), [getattr(one, "metadata", {}) for one in patches])


def _collate_by_default(patches: Sequence[SubjectPatch], *, collate_fn_map: object = None) -> SubjectsBatch:
    return collate_subjects(patches)


default_collate_fn_map[SubjectPatch] = _collate_by_default


def with_lists(batch: PatchBatch, metadata: Sequence[Mapping[str, Any]]) -> SubjectsBatch:
    """A batch with the metadata of its patches, as lists by key."""
    lists: dict[str, list[Any]] = {key: [one.get(key) for one in metadata] for key in metadata[0]}
    lists["patch_location"] = batch.patch_location
    return SubjectsBatch(batch.images, batch.patch_location, batch.subjects, lists)


def with_metadata(patch: Patch, metadata: Mapping[str, Any]) -> SubjectPatch:
    """A patch with the metadata of its subject."""
    return SubjectPatch(patch.images, patch.location, patch.subject, metadata)


def _whole(subject: NativeSubject) -> SubjectPatch:
    [patch] = read_patches(subject, [PatchLocation((0, 0, 0), subject.spatial_shape)])
    return with_metadata(patch, subject.metadata)


def apply_in_memory(transform: Any, data: Any) -> Any:
    """What a transform of TorchIO 2 makes of a subject or an image, which is loaded whole for it."""
    if isinstance(data, image.Image):
        return apply_in_memory(transform, NativeSubject(image=data)).image
    changed = torchio_on_patches(transform)(_whole(data)).images
    classes = {"label": LabelMap}
    images = {
        n: classes.get(i.kind, ScalarImage)(i.data.numpy(), affine=i.affine) for n, i in changed.items()
    }
    return Subject(**{**images, **data.metadata})


def named_apart(subjects: Sequence[NativeSubject]) -> Sequence[NativeSubject]:
    """The subjects by different names: TorchIO's subjects have none."""
    if isinstance(subjects, Cohort):
        return subjects
    times = Counter(subject.name for subject in subjects)
    return [
        subject
        if times[subject.name] == 1
        else type(subject).of(
            subject.images, name=f"{subject.name}-{n}", split=subject.split, metadata=subject.metadata
        )
        for n, subject in enumerate(subjects)
    ]
