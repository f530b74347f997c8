"""Images, subjects and patches as TorchIO 0.18 to 1.x has them; ``torchio1`` describes all of its API."""

from __future__ import annotations

import functools
import itertools
import operator
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self, SupportsIndex

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from zpatch.compat.generation_errors import WrongTypeError
from zpatch.compat.nifti_cache import save_image
from zpatch.compat.torchio1_images import AFFINE, CLASSES, DATA, TYPE, TYPES, Image
from zpatch.compat.transforms import PatchTransform, as_function, torchio_on_patches
from zpatch.errors import OptionError
from zpatch.geometry.boxes import PatchLocation, Triple
from zpatch.images import image
from zpatch.images.image import Image as NativeImage
from zpatch.images.subject import Subject as NativeSubject
from zpatch.loading.queue_subjects import SubjectTransform
from zpatch.sampling.patch import Patch as NativePatch
from zpatch.sampling.patch_sampler import read_patches

LOCATION = "location"
NUM_SAMPLES = "num_samples"
CHANNELS_DIMENSION = 1  # of a batch

SPACE_TOLERANCE = 1e-3  # mm; affines that differ by less are the same, for convert too


class Subject(NativeSubject, Mapping[str, Any]):
    """Images and other entries by name: ``Subject(t1=ScalarImage(path), age=45)``.

    A queue takes ``num_samples`` patches of a subject that has an entry of that name.
    """

    transform: PatchTransform | SubjectTransform | None = None  # of the dataset that gave the subject

    def __init__(self, *args: Mapping[str, Any], **items: Any) -> None:
        if len(args) > 1:
            raise OptionError("Only one dictionary as positional argument is allowed; name the other items")
        items = dict(*args) | items
        images = {name: item for name, item in items.items() if isinstance(item, image.Image)}
        others = {name: item for name, item in items.items() if name not in images}
        if not images:
            raise WrongTypeError("A subject without images cannot be created")
        own = {n: i if isinstance(i, Image) else CLASSES[TYPES[i.kind]](i) for n, i in images.items()}
        self._set(own, others.get("name", "subject"), others.get("split"), others)

    def __getitem__(self, name: str) -> Any:
        return self.metadata[name] if name in self.metadata else super().__getitem__(name)

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)

    def __iter__(self) -> Iterator[str]:
        return itertools.chain(self.images, self.metadata)

    def __len__(self) -> int:
        return len(self.images) + len(self.metadata)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(C, I, J, K) of the first image."""
        return self.get_first_image().shape

    def get_images(self, intensity_only: bool = True) -> list[image.Image]:
        """The images: those of intensities only, or all."""
        return [i for i in self.images.values() if i.kind == "scalar" or not intensity_only]

    def add_image(self, image: image.Image, image_name: str) -> None:
        """Add an image, or replace the one of that name."""
        if not isinstance(image, NativeImage):
            raise OptionError(f"Image must be an instance of torchio.Image, but its type is {type(image)}")
        changed = Subject({**self, image_name: image})
        self._set(changed.images, self.name, self.split, self.metadata)

    def plot(self, **options: Any) -> None:
        """Three planes of each image, drawn by the installed TorchIO and matplotlib."""
        for one in self.images.values():
            assert isinstance(one, Image)
            one.plot(**options)

    def get_first_image(self) -> image.Image:
        """The first image."""
        return next(iter(self.images.values()))

    def with_transform(self, transform: PatchTransform | SubjectTransform) -> Subject:
        """A copy of the subject after a transform: its images are lazy, and patches are transformed later."""
        changed = transform.of_subject(self) if isinstance(transform, SubjectTransform) else self
        images = {name: CLASSES[TYPES[one.kind]](one) for name, one in changed.images.items()}
        copy = Subject({**images, **self.metadata})
        copy.transform = transform
        voxels = functools.cache(copy._whole_patch)  # one draw of random numbers for all images
        for name, one in images.items():
            one.whole = functools.partial(_data_of, voxels, name)
        return copy

    def transformed(self, patch: NativePatch) -> NativePatch:
        """A patch of the subject, after the transform of its dataset, with which it is read with a margin."""
        if not isinstance(self.transform, SubjectTransform):
            return patch if self.transform is None else self.transform(patch)
        margin = self.transform.margin(self, patch.location.size)
        wider = patch.location.widened(margin, self.spatial_shape)
        [read] = [patch] if wider == patch.location else read_patches(self, [wider])
        return self.transform.on_patch(read, patch.location)

    def _whole_patch(self) -> NativePatch:
        [patch] = read_patches(self, [PatchLocation((0, 0, 0), self.spatial_shape)])
        return self.transformed(patch)

    def whole(self) -> Patch:
        """All voxels of the subject, as one patch."""
        return Patch.of(self._whole_patch(), self, (0, 0, 0))

    def in_one_space(self) -> Self:
        """The subject itself; an OptionError where its images have different affines."""
        affines = {name: image.affine for name, image in self.images.items()}
        (first, affine), *others = affines.items()
        for name, other in others:
            if not np.allclose(other, affine, rtol=SPACE_TOLERANCE, atol=SPACE_TOLERANCE):
                raise OptionError(
                    f"{first!r} and {name!r} of subject {self.name!r} have different affines; resample them "
                    f"to one grid, or give the affine that is right to both"
                )
        return self


def apply_in_memory(transform: Any, data: Any) -> Any:
    """What a transform of TorchIO 1 makes of a subject or an image, which is loaded whole for it."""
    if isinstance(data, NativeImage):
        return apply_in_memory(transform, Subject(image=data)).image
    subject = as_subject(data)
    changed = torchio_on_patches(transform)(subject._whole_patch()).images
    images = {n: CLASSES[TYPES[i.kind]](tensor=i.data, affine=i.affine) for n, i in changed.items()}
    return Subject({**images, **subject.metadata})


def _data_of(patch: Callable[[], NativePatch], name: str) -> torch.Tensor:
    return patch()[name].data


def as_subject(subject: NativeSubject) -> Subject:
    """A subject of zpatch as one of these: its images and its name."""
    if isinstance(subject, Subject):
        return subject
    if _is_of_torchio(subject):
        return _of_torchio(subject)
    if not isinstance(subject, NativeSubject):
        raise WrongTypeError(f"a subject must be a Subject, not {type(subject).__name__}")
    return Subject(subject.images, name=subject.name)


def _is_of_torchio(subject: Any) -> bool:
    return type(subject).__module__.startswith("torchio.")


def _of_torchio(subject: Any) -> Subject:
    """A subject of TorchIO itself, such as ``Colin27()``: its files are opened as lazy images."""
    images = subject.get_images_dict(intensity_only=False)
    entries = {
        name: Image(path=one.path, type=one.type)
        if isinstance(one.path, str | os.PathLike)
        else Image(tensor=one.data, affine=one.affine, type=one.type)
        for name, one in images.items()
    }
    return Subject({**{key: value for key, value in subject.items() if key not in images}, **entries})


class Entries(dict[str, Any]):
    """A mapping whose entries are attributes too, also in a batch that torch's DataLoader makes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no {name!r} here (there are: {', '.join(self)})") from None

    @property
    def spatial_shape(self) -> tuple[int, ...]:
        """Extent along I, J, K in voxels."""
        return tuple(self.shape[-3:])


class PatchImage(Entries):
    """An image of a patch, or of a batch of them: ``DATA``, ``AFFINE`` and ``TYPE``."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, I, J, K), of a batch (B, C, I, J, K)."""
        return tuple(self[DATA].shape)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the image to a NIfTI file."""
        save_image(path, np.asarray(self[DATA]), self[AFFINE])


class Patch(Entries):
    """A patch, or a batch of them: images by name, ``LOCATION``, and the other entries of the subject."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the first image."""
        return next(entry.shape for entry in self.values() if isinstance(entry, PatchImage))

    @classmethod
    def of(cls, patch: NativePatch, subject: Subject, offset: Triple) -> Self:
        """A patch of zpatch as a mapping, its location relative to ``offset``, the first voxel of padding."""
        images = {
            name: PatchImage({DATA: found.data, AFFINE: found.affine, TYPE: TYPES[found.kind]})
            for name, found in patch.images.items()
        }
        ini = [n - first for n, first in zip(patch.location.index, offset, strict=True)]
        fin = [n + size for n, size in zip(ini, patch.location.size, strict=True)]
        return cls({**images, **subject.metadata, LOCATION: torch.tensor(ini + fin)})


class SubjectsDataset(Dataset[Subject]):
    """The subjects of a list or a cohort, with a transform.

    A transform of TorchIO does what it does to volumes, without loading them: see ``from_torchio`` in
    ``zpatch.compat.transforms``. Any other one is a function of patches of zpatch, and runs on each of them.
    ``load_getitem`` has no effect: voxels are read when a patch needs them.
    """

    def __init__(
        self,
        subjects: Sequence[NativeSubject],
        transform: Callable[[Any], Any] | None = None,
        load_getitem: bool = True,
    ) -> None:
        if not len(subjects):
            raise OptionError("Subjects list is empty; a dataset needs at least one subject")
        if getattr(subjects[0], "transform", None) is not None:
            raise OptionError(
                "these subjects belong to a dataset with a transform; split the list of subjects instead, "
                "and make a dataset of each part"
            )
        are_foreign = _is_of_torchio(subjects[0])
        if not (are_foreign or isinstance(subjects[0], NativeSubject)):
            raise WrongTypeError(
                f"Subjects list must contain instances of torchio.Subject, not {type(subjects[0]).__name__}"
            )
        self._subjects = [as_subject(subject) for subject in subjects] if are_foreign else subjects
        self.set_transform(transform)

    def __len__(self) -> int:
        return len(self._subjects)

    def __getitem__(self, index: int) -> Subject:
        subject = as_subject(self._subjects[int(index)])
        return subject if self.transform is None else subject.with_transform(self.transform)

    def __getitems__(self, numbers: Sequence[int]) -> list[Patch]:
        """Whole subjects: torch's DataLoader calls this for those of a batch."""
        return [self[number].whole() for number in numbers]

    def set_transform(self, transform: Callable[[Any], Any] | None) -> None:
        """Replace the transform; None removes it."""
        if transform is not None and not callable(transform):
            raise OptionError(
                f"The transform must be a callable object, but it has type {type(transform).__name__}"
            )
        self.transform: PatchTransform | SubjectTransform | None = as_function(transform)

    def num_samples(self, default: int) -> list[int]:
        """How many patches a queue takes of each subject."""
        given = [subject.metadata.get(NUM_SAMPLES) for subject in self._subjects]
        for number, count in enumerate(given):
            if count is not None and not (isinstance(count, SupportsIndex) and operator.index(count) > 0):
                raise OptionError(f"num_samples of subject {number} must be at least 1, not {count!r}")
        return [default if count is None else operator.index(count) for count in given]

    def dry_iter(self) -> Sequence[NativeSubject]:
        """The subjects as they were given."""
        return self._subjects


class SubjectsLoader(DataLoader[Any]):
    """A DataLoader of patches, or of the whole subjects of a dataset.

    Entries that are neither numbers nor tensors are lists in a batch.
    """

    def __init__(self, dataset: Any, collate_fn: Any = None, **options: Any) -> None:
        super().__init__(dataset, collate_fn=collate_fn or _collate, **options)


def _collate(patches: Sequence[Mapping[str, Any]]) -> Any:
    first: Any = patches[0]
    return type(first)({key: _stack([patch[key] for patch in patches]) for key in first})


def _stack(values: list[Any]) -> Any:
    if isinstance(values[0], Mapping):
        return _collate(values)
    is_stackable = isinstance(values[0], torch.Tensor | np.ndarray | int | float)
    return default_collate(values) if is_stackable else values
