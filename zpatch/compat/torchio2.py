"""The patch API of TorchIO 2 on zpatch: ``import zpatch.compat.torchio2 as tio``.

Samplers, queue, loader and aggregator have TorchIO's signatures. Subjects are those of a cohort, or made from
files as in TorchIO; NIfTI files are converted on first use, into a cache. Transforms are those of the
installed TorchIO: ``tio.Flip`` is its Flip; called with a subject or an image, it loads that, as in TorchIO.

Where TorchIO 2.0.0a2 differs from its documentation, this module follows the documentation::

    overlap_mode="hann"    2.x divides by weights clamped to 1, which darkens voxels that few patches cover
    samplers by map        2.x leaves out the last centre around which a patch of even size fits
    label_probabilities    2.x weighs voxels, so that large classes are drawn more; here classes are drawn
    num_patches            2.x gives that many in each worker of a DataLoader; here workers share them
    max_length of a Queue  2.x holds more, with workers up to a whole epoch; here it is a bound
    output_shape           2.x rounds corners and sizes apart, which leaves gaps if the ratio is no integer
    batch.patch_location   2.x has only batch.metadata["patch_location"]; here there are both

These differences are intended::

    transform of a Queue   makes lazy images of volumes, and random ones run on patches, read with a margin
                           where they move voxels; what needs the volume in memory is refused by name
    workers of a Queue     are processes, and give the same stream in any number; seed= chooses another
    a Queue and ranks      shares subjects out under torch.distributed, without a subject_sampler too
    num_subjects           counts the subjects of all ranks, patches_per_epoch the patches of this rank
    max_memory             is the size of the buffers, not an estimate
    padding_mode           locations stay relative to the volume, and the aggregator crops: pass it the
                           shape of the volume, as without padding
    state_dict of a Queue  has no epoch of a subject_sampler: set that before the queue is resumed
    images of a patch      have data and affine only: save with ScalarImage(data, affine=affine).save(path)
    save of an image       writes .nii and .nii.gz only
    errors                 a patch larger than the volume, and a voxel that no patch covered, are errors
    random numbers         samplers that are iterated follow torch.manual_seed, as in TorchIO; maps are not
                           loaded, so the numbers differ from TorchIO's
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from zpatch.blending.aggregator import PatchAggregator
from zpatch.compat.epoch_queues import EpochQueue
from zpatch.compat.generation_errors import (
    WrongTypeError,
    check_subject_sampler,
    raised_as_in_torchio,
)
from zpatch.compat.torchio2_subjects import (
    LabelMap,
    ScalarImage,
    Subject,
    SubjectPatch,
    SubjectsBatch,
    apply_in_memory,
    collate_subjects,
    named_apart,
    with_lists,
    with_metadata,
)
from zpatch.compat.transforms import as_function, transform_class
from zpatch.digests import Json
from zpatch.errors import OptionError
from zpatch.geometry.boxes import PatchLocation
from zpatch.images.cohort import Cohort
from zpatch.images.subject import Subject as NativeSubject
from zpatch.loading.queue_subjects import check_sequence
from zpatch.loading.subjects_loader import SubjectsLoader as NativeLoader
from zpatch.sampling import samplers
from zpatch.sampling.grid_sampler import GridSampler as NativeGridSampler
from zpatch.sampling.patch_sampler import PatchSampler, PatchSize, RandomSampler, RandomSource

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
    return transform_class(name, 2, apply_in_memory)


class _SubjectSampler(RandomSampler, IterableDataset[SubjectPatch]):
    """A random sampler of one subject: iterating it gives patches of that subject."""

    subject: NativeSubject
    num_patches: int | None

    def __call__(
        self, subject: NativeSubject, num_patches: int | None = None, *, rng: RandomSource = None
    ) -> Iterator[SubjectPatch]:
        """Patches of any subject: ``num_patches``, or the number of the sampler; without both, without end.

        Without ``rng`` they follow from torch's global generator.
        """
        count = self.num_patches if num_patches is None else num_patches
        rng = int(torch.randint(2**63 - 1, ())) if rng is None else rng
        with raised_as_in_torchio(f"Probability map {getattr(self, 'probability_map', '')!r} is all zeros"):
            for patch in super().__call__(subject, count, rng=rng):
                yield with_metadata(patch, subject.metadata)

    def __iter__(self) -> Iterator[SubjectPatch]:
        worker, count = get_worker_info(), self.num_patches
        if worker is not None and count is not None:
            count = len(range(worker.id, count, worker.num_workers))
        return self(self.subject, count)


class UniformSampler(_SubjectSampler, samplers.UniformSampler):
    """Patches at locations that are all equally likely."""

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
    """Patches whose centres are of a class drawn by ``label_probabilities``; None is all labels but 0."""

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
        return with_metadata(super().__getitem__(index), self._own_subject().metadata)

    def __iter__(self) -> Iterator[SubjectPatch]:
        metadata = self._own_subject().metadata
        for patch in super().__iter__():
            yield with_metadata(patch, metadata)


class Queue(EpochQueue):
    """Patches of many subjects, shuffled in a bounded buffer; see ``zpatch.Queue``.

    Each iteration is the next epoch, also where the last one was broken off; the caller sets the epoch of a
    ``subject_sampler``. Each subject gives ``patches_per_volume`` patches, or the ``num_patches`` of the
    sampler if those are fewer. ``transform`` is one of TorchIO's, or a function of patches. ``seed`` chooses
    the stream.
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
        check_sequence(subjects, patch_sampler)
        check_subject_sampler(
            subject_sampler,
            shuffle_subjects,
            "shuffle_subjects must be False when subject_sampler is provided",
            WrongTypeError(
                "subject_sampler must have a __len__ method: it is iterated anew for each epoch; give a "
                "list, or a Sampler"
            ),
        )
        own_number = getattr(patch_sampler, "num_patches", None)
        super().__init__(
            named_apart(subjects),
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
            yield with_metadata(patch, self.metadata_of(patch.subject))


class SubjectsLoader(DataLoader[SubjectsBatch]):
    """A DataLoader of patches, or of whole subjects: ``batch.t1.data``.

    ``options`` are torch's; ``collate_fn`` is set here. Patches of a Queue are copied once, into their batch.
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
            yield with_lists(batch, [queue.metadata_of(subject) for subject in batch.subjects])
