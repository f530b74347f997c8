"""The patch API of TorchIO 2 on zpatch: ``import zpatch.compat.torchio2 as tio``.

Samplers, queue, loader and aggregator have TorchIO's signatures, and subjects are either those of a cohort or
made of files as before; NIfTI files are converted on first use, into a cache. Transforms are TorchIO's own
(``tio.Flip`` here is its Flip), where it is installed.

Where TorchIO 2.0.0a2 is not what its documentation says, this is::

    overlap_mode="hann"    2.x divides by weights clamped to 1, which darkens what few patches cover
    samplers by map        2.x leaves out the last centre around which a patch of even size fits
    label_probabilities    2.x weighs voxels, so that large classes get more; here each class has its share
    num_patches            2.x counts in each worker of a DataLoader; here workers share them
    max_length of a Queue  2.x holds more, with workers up to a whole epoch; here it is a bound
    output_shape           2.x rounds corners and sizes apart, which leaves gaps where the ratio is not whole
    batch.patch_location   2.x has only batch.metadata["patch_location"]; here both are there

And this is otherwise on purpose::

    transform of a Queue   works on patches, not on subjects: a volume is never loaded whole
    workers of a Queue     are processes, and give the same stream in any number; seed= chooses another
    a Queue and ranks      shares subjects out under torch.distributed, without a subject_sampler too
    num_subjects           counts those of all ranks, patches_per_epoch the patches of this one
    max_memory             is what the buffers take, not an estimate
    padding_mode           locations stay in the volume's own frame, and the aggregator crops: pass it
                           the shape of the volume, as without padding
    state_dict of a Queue  does not hold the epoch of a subject_sampler: set that before the queue goes on
    images of a patch      have data and affine only: save with ScalarImage(data, affine=affine).save(path)
    save of an image       writes .nii and .nii.gz only
    errors                 a patch larger than the volume, and a voxel that no patch covered, are refused
    random numbers         samplers that are iterated follow torch.manual_seed, as before; maps are not
                           loaded, so the numbers are others than TorchIO's
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from zpatch.blending.aggregator import PatchAggregator
from zpatch.compat.epoch_queues import EpochQueue
from zpatch.compat.nifti_cache import cached_image, save_image
from zpatch.compat.transforms import as_function, transform_class
from zpatch.digests import Json
from zpatch.errors import OptionError
from zpatch.geometry.boxes import PatchLocation, Triple
from zpatch.images import image
from zpatch.images.cohort import Cohort
from zpatch.images.subject import Subject as NativeSubject
from zpatch.loading.patch_batch import PatchBatch, collate
from zpatch.loading.subjects_loader import SubjectsLoader as NativeLoader
from zpatch.sampling import samplers
from zpatch.sampling.grid_sampler import GridSampler as NativeGridSampler
from zpatch.sampling.grid_sampler import PatchSampler
from zpatch.sampling.patch import Patch, to_tensor
from zpatch.sampling.samplers import PatchSize, RandomSource, read_patches

__all__ = [
    "GridSampler",
    "LabelMap",
    "LabelSampler",
    "PatchAggregator",
    "PatchLocation",
    "Queue",
    "ScalarImage",
    "Subject",
    "SubjectsLoader",
    "UniformSampler",
    "WeightedSampler",
    "collate_subjects",
]


data = loader = sys.modules[__name__]  # tio.loader.SubjectsLoader is tio.SubjectsLoader
sys.modules[f"{__name__}.loader"] = loader  # so that it can be imported from, as with os.path


def __getattr__(name: str) -> Any:
    """A transform of TorchIO 2."""
    return transform_class(name, generation=2)


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
    """Intensities: a NIfTI file, a zpatch image, whatever that may be made of, or a tensor (C, I, J, K).

    ``affine`` is 4 x 4; None is what the source says.
    """


class LabelMap(_Image, image.LabelMap):
    """Classes, of the same sources."""


class Subject(NativeSubject):
    """Images by name, and metadata: ``Subject(t1=ScalarImage("t1.nii.gz"), age=45)``."""

    def __init__(self, **entries: Any) -> None:
        images = {key: value for key, value in entries.items() if isinstance(value, image.Image)}
        metadata = {key: value for key, value in entries.items() if key not in images}
        self._set(images, metadata.get("name", "subject"), metadata.get("split"), metadata)

    def __getattr__(self, name: str) -> Any:
        metadata = self.__dict__.get("metadata", {})
        return metadata[name] if name in metadata else super().__getattr__(name)


@dataclass(frozen=True)
class SubjectPatch(Patch):
    """A patch under TorchIO's names: ``patch.patch_location``, ``patch.metadata``."""

    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def patch_location(self) -> PatchLocation:
        """Where the patch lies in its volume."""
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

    ``metadata`` has a list for each key of the first one's, with None where there is nothing, and a list of
    the locations under ``patch_location``.
    """

    metadata: Mapping[str, list[Any]]

    @property
    def batch_size(self) -> int:
        """Number of patches."""
        return len(self)


def collate_subjects(batch: Sequence[Patch | NativeSubject]) -> SubjectsBatch:
    """Stack patches, or whole subjects of one shape, into a batch: ``collate_fn`` of a DataLoader."""
    patches = [_whole(one) if isinstance(one, NativeSubject) else one for one in batch]
    return _named(collate(patches), [getattr(one, "metadata", {}) for one in patches])


def _named(batch: PatchBatch, metadata: Sequence[Mapping[str, Any]]) -> SubjectsBatch:
    lists: dict[str, list[Any]] = {key: [one.get(key) for one in metadata] for key in metadata[0]}
    lists["patch_location"] = batch.patch_location
    return SubjectsBatch(batch.images, batch.patch_location, batch.subjects, lists)


def _named_patch(patch: Patch, metadata: Mapping[str, Any]) -> SubjectPatch:
    return SubjectPatch(patch.images, patch.location, patch.subject, metadata)


def _whole(subject: NativeSubject) -> SubjectPatch:
    [patch] = read_patches(subject, [PatchLocation((0, 0, 0), subject.spatial_shape)])
    return _named_patch(patch, subject.metadata)


class _SubjectSampler(samplers.RandomSampler, IterableDataset[SubjectPatch]):
    """What random samplers have in common: a subject of their own, which they can be iterated over."""

    subject: NativeSubject
    num_patches: int | None

    def __call__(
        self, subject: NativeSubject, num_patches: int | None = None, *, rng: RandomSource = None
    ) -> Iterator[SubjectPatch]:
        """Patches of any subject, ``num_patches`` or the sampler's own number, endless where there is none.

        Without ``rng`` they follow from torch's generator.
        """
        count = self.num_patches if num_patches is None else num_patches
        rng = int(torch.randint(2**63 - 1, ())) if rng is None else rng
        for patch in super().__call__(subject, count, rng=rng):
            yield _named_patch(patch, subject.metadata)

    def __iter__(self) -> Iterator[SubjectPatch]:
        worker, count = get_worker_info(), self.num_patches
        if worker is not None and count is not None:
            count = len(range(worker.id, count, worker.num_workers))
        return self(self.subject, count)


class UniformSampler(_SubjectSampler, samplers.UniformSampler):
    """Patches at places of which each is equally likely."""

    def __init__(self, subject: NativeSubject, patch_size: PatchSize, num_patches: int | None = None) -> None:
        super().__init__(patch_size)
        self.subject, self.num_patches = subject, num_patches


class WeightedSampler(_SubjectSampler, samplers.WeightedSampler):
    """Patches whose centres are drawn in proportion to the image ``probability_map``."""

    def __init__(
        self,
        subject: NativeSubject,
        patch_size: PatchSize,
        probability_map: str,
        num_patches: int | None = None,
    ) -> None:
        samplers.WeightedSampler.__init__(self, patch_size, probability_map)
        self.subject, self.num_patches = subject, num_patches


class LabelSampler(_SubjectSampler, samplers.LabelSampler):
    """Patches whose centres are of classes drawn by ``label_probabilities``; None: any but 0."""

    def __init__(
        self,
        subject: NativeSubject,
        patch_size: PatchSize,
        label_name: str,
        label_probabilities: Mapping[int, float] | None = None,
        num_patches: int | None = None,
    ) -> None:
        samplers.LabelSampler.__init__(self, patch_size, label_name, label_probabilities)
        self.subject, self.num_patches = subject, num_patches


class GridSampler(NativeGridSampler):
    """All patches of a regular grid, as a map-style dataset; see ``zpatch.GridSampler``."""

    def __getitem__(self, index: int) -> SubjectPatch:
        return _named_patch(super().__getitem__(index), self._own_subject().metadata)

    def __iter__(self) -> Iterator[SubjectPatch]:
        metadata = self._own_subject().metadata
        for patch in super().__iter__():
            yield _named_patch(patch, metadata)


class Queue(EpochQueue):
    """Patches of many subjects, shuffled in a bounded buffer; see ``zpatch.Queue``.

    Each iteration is an epoch, also where the last one was broken off; the epoch of a ``subject_sampler`` is
    set by its owner. Of each subject come ``patches_per_volume``, or as few as the sampler's ``num_patches``.
    ``transform`` is one of TorchIO's, or a function of patches. ``seed`` chooses the stream.
    """

    def __init__(
        self,
        subjects: Sequence[NativeSubject],
        patch_sampler: PatchSampler,
        max_length: int = 300,
        patches_per_volume: int = 10,
        num_workers: int = 0,
        shuffle_subjects: bool = True,
        shuffle_patches: bool = True,
        transform: Any = None,
        subject_sampler: Iterable[int] | None = None,
        *,
        seed: int = 0,
    ) -> None:
        own_number = getattr(patch_sampler, "num_patches", None)
        super().__init__(
            _told_apart(subjects),
            patch_sampler,
            max_length,
            patches_per_volume if own_number is None else min(patches_per_volume, own_number),
            num_workers,
            shuffle_subjects,
            shuffle_patches,
            as_function(transform),
            subject_sampler,
            seed=seed,
        )
        self._metadata: dict[str, Json] = {}
        if not isinstance(self.subjects, Cohort):
            self._metadata = {subject.name: subject.metadata for subject in self.subjects}

    def metadata_of(self, subject: str) -> Json:
        """The metadata of a subject, by its name."""
        if subject not in self._metadata:
            self._metadata[subject] = cast(Cohort, self.subjects)[subject].metadata
        return self._metadata[subject]

    def __iter__(self) -> Iterator[SubjectPatch]:
        """The patches of an epoch."""
        for patch in super().__iter__():
            yield _named_patch(patch, self.metadata_of(patch.subject))


def _told_apart(subjects: Sequence[NativeSubject]) -> Sequence[NativeSubject]:
    """The subjects, each with a name of its own: TorchIO's have none."""
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


class SubjectsLoader(DataLoader[SubjectsBatch]):
    """A DataLoader of patches, or of whole subjects: ``batch.t1.data``.

    ``options`` are torch's; ``collate_fn`` is set here. Batches of a Queue come without a copy in between.
    """

    def __init__(self, dataset: Any, **options: Any) -> None:
        if "collate_fn" in options:
            raise OptionError("SubjectsLoader sets collate_fn; give another one to torch's DataLoader")
        super().__init__(dataset, collate_fn=collate_subjects, **options)

    def __iter__(self) -> Any:
        """Batches of an epoch."""
        dataset: Any = self.dataset
        if isinstance(dataset, Queue) and not self.num_workers and self.batch_size is not None:
            return self._of_queue(dataset, self.batch_size)
        return super().__iter__()

    def _of_queue(self, queue: Queue, batch_size: int) -> Iterator[SubjectsBatch]:
        pinned = self.pin_memory and torch.cuda.is_available()
        for batch in NativeLoader(queue, batch_size, drop_last=self.drop_last, pin_memory=pinned):
            yield _named(batch, [queue.metadata_of(subject) for subject in batch.subjects])
