"""The patch API of TorchIO 0.18 to 1.x: ``import zpatch.compat.torchio1 as tio`` instead of ``torchio``.

Images are NIfTI paths (each converted once into a cache, see ``nifti_cache``), paths of stored images,
arrays or tensors; subjects of a cohort go wherever a Subject does, and carry their images and their ``name``.
Nothing is loaded whole. Transforms are TorchIO's own, where it is installed: ``tio.RandomFlip()``.

Patches are mappings, with entries that are attributes too: ``patch["t1"][DATA]`` or ``patch.t1.data`` is a
tensor (C, I, J, K), ``patch[LOCATION]`` a tensor of 6, first voxel and one past the last. Random numbers
follow from torch's global generator: one is drawn for each call of a sampler, and for each queue.

Where TorchIO does not do what it says, this does what it says:

- An iteration of a queue is an epoch: each subject once, no patch left over from the one before, also where
  the one before was broken off.
- ``downsampling_factor`` counts in all modes of the aggregator, and in ``crop`` for the overlap as well.
- ``LabelSampler`` without probabilities takes all channels of a label map, not only the first.
- A ``WeightedSampler`` reaches each voxel of a map of any size, exactly in proportion.
- A queue with a ``subject_sampler`` needs no ``shuffle_subjects=False``: the sampler decides the order.

And in these ways it is not TorchIO:

- Transforms run on patches, not on volumes, in whatever takes patches of a dataset's subjects. A subject that
  a loader gives whole is one patch, with its LOCATION, and its images have one shape.
- ``save`` of an image, or of that of a patch, writes .nii and .nii.gz only, with channels as a fourth axis.
- Images come out of a queue as float32 (label maps in their own type), out of a sampler in their own type.
- A queue is iterated, not indexed. A subject repeated by its sampler is drawn from anew.
- A volume smaller than the patch is padded up to it where a GridSampler has a ``padding_mode``; modes are
  constant, a number, edge, reflect, symmetric and wrap.
- Voxels that no patch covered are an error, where TorchIO gave 0 or NaN; int64 stays int64.
- Names of images hold letters, digits, ``.``, ``_`` and ``-`` only. ``None`` in LabelSampler means all but 0.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, IterableDataset

from zpatch.blending.aggregator import PatchAggregator
from zpatch.compat.epoch_queues import CountedQueue, subject_number
from zpatch.compat.torchio1_subjects import (
    AFFINE,
    CHANNELS_DIMENSION,
    DATA,
    INTENSITY,
    LABEL,
    LOCATION,
    SAMPLING_MAP,
    TYPE,
    Image,
    LabelMap,
    Patch,
    ScalarImage,
    Subject,
    SubjectsDataset,
    SubjectsLoader,
    as_subject,
)
from zpatch.compat.transforms import transform_class
from zpatch.errors import ModelError, OptionError
from zpatch.geometry.boxes import PatchLocation, Triple, triple
from zpatch.images.subject import Subject as NativeSubject
from zpatch.loading.queue_options import QueueOptions
from zpatch.runtime.byte_sizes import format_bytes
from zpatch.sampling import samplers
from zpatch.sampling.grid_sampler import GridSampler as NativeGridSampler
from zpatch.sampling.grid_sampler import PatchSampler as NativePatchSampler
from zpatch.sampling.patch import Patch as NativePatch
from zpatch.sampling.samplers import PatchSize

__all__ = [
    "AFFINE",
    "CHANNELS_DIMENSION",
    "DATA",
    "INTENSITY",
    "LABEL",
    "LOCATION",
    "SAMPLING_MAP",
    "TYPE",
    "GridAggregator",
    "GridSampler",
    "Image",
    "LabelMap",
    "LabelSampler",
    "Queue",
    "ScalarImage",
    "Subject",
    "SubjectsDataset",
    "SubjectsLoader",
    "UniformSampler",
    "WeightedSampler",
]

RECENT_SUBJECTS = 256  # those of a cohort take a while to make

data = inference = sampler = sys.modules[__name__]  # tio.data.UniformSampler is tio.UniformSampler


def __getattr__(name: str) -> Any:
    """A transform of TorchIO 1, where that is installed."""
    return transform_class(name, generation=1)


class PatchSampler:
    """What samplers share: ``native`` is the one of zpatch that does the work."""

    def __init__(self, native: NativePatchSampler) -> None:
        self.native = native
        self.patch_size = np.array(native.patch_size)

    def offset(self, subject: Subject) -> Triple:
        """The first voxel of padding, from which locations are told."""
        return (0, 0, 0)

    def __call__(self, subject: NativeSubject, num_patches: int | None = None) -> Iterator[Patch]:
        """Patches of a subject, endless without a number."""
        own = as_subject(subject).in_one_space()
        for patch in self._draw(own, num_patches):
            yield self.of(own.transformed(patch), own)

    def of(self, patch: NativePatch, subject: Subject) -> Patch:
        """A patch of a subject as a mapping."""
        return Patch.of(patch, subject, self.offset(subject))

    def _draw(self, subject: Subject, num_patches: int | None) -> Iterator[NativePatch]:
        assert isinstance(self.native, samplers.RandomSampler)
        return self.native(subject, num_patches, rng=_drawn_seed())


class UniformSampler(PatchSampler):
    """Each place of a patch is equally likely."""

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

    ``padding_mode`` (a number pads with it) pads half the overlap on each side; locations are then told from
    the first voxel of the padding.
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
        """The first voxel of padding, from which locations are told."""
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
        """All patches of a subject, by default its own, in order."""
        if num_patches is not None:
            raise OptionError("a GridSampler gives all patches of a subject; leave out num_patches")
        subject = self.subject if subject is None else subject
        if subject is None:
            raise OptionError("this GridSampler has no subject; give it one")
        return super().__call__(subject)

    def __iter__(self) -> Iterator[Patch]:
        return self()

    def _draw(self, subject: Subject, num_patches: int | None) -> Iterator[NativePatch]:
        return self.native(subject)


class GridAggregator:
    """The outputs of a network at all patches of a GridSampler, blended into a volume.

    ``overlap_mode`` is crop, average, hann or gaussian. ``downsampling_factor`` is how many times smaller the
    network makes its patches on each axis.
    """

    def __init__(
        self, sampler: GridSampler, overlap_mode: str = "crop", downsampling_factor: int = 1
    ) -> None:
        grid, self._factor = sampler.native.grid, downsampling_factor
        self._first = np.array(grid.pad_before)
        self._patch_size = triple([n // self._factor for n in grid.patch_size], "patch_size")
        if self._factor == 1:
            self._native = PatchAggregator(grid.spatial_shape, overlap_mode, grid=sampler.native)
        else:
            shape = [n // self._factor for n in grid.spatial_shape]
            overlap = [n // self._factor // 2 * 2 for n in grid.patch_overlap]
            self._native = PatchAggregator(shape, overlap_mode, overlap)

    def add_batch(self, batch_tensor: torch.Tensor, locations: torch.Tensor) -> None:
        """Take in a batch (B, C, I, J, K) and where its patches lie, (B, 6)."""
        check_size(batch_tensor, self._patch_size, ", or downsampling_factor= must say how it scales")
        starts = (np.asarray(locations.cpu())[:, :3] - self._first) // self._factor
        places = [PatchLocation((i, j, k), self._patch_size) for i, j, k in starts.tolist()]
        self._native.add_batch(batch_tensor, places)

    def get_output_tensor(self) -> torch.Tensor:
        """The volume (C, I, J, K)."""
        output = self._native.get_output()
        assert isinstance(output, torch.Tensor)
        return output


def check_size(batch: torch.Tensor, size: Triple, unless: str = "") -> None:
    """Refuse the patches of a network that has not kept their size."""
    if batch.ndim == 5 and batch.shape[2:] != size:
        raise ModelError(
            f"the patches are {tuple(batch.shape[2:])} where the output has room for {size}; "
            f"the network must keep the patch's shape{unless}"
        )


class Queue(IterableDataset[Patch]):
    """Patches of a dataset of subjects; iterate it, or a DataLoader of it, once for each epoch.

    Of each subject ``samples_per_volume`` patches are taken, or as many as its ``num_samples`` says; of a
    GridSampler, the first ones. At most ``max_length`` wait in memory. ``num_workers`` processes read them,
    from the first iteration on: ``start_background`` has no effect. Nor has ``verbose``, which warns. Under
    torch.distributed a ``subject_sampler`` deals out the subjects; without one each process gets all.
    """

    max_length = property(attrgetter("_native.max_length"))
    num_workers = property(attrgetter("_native.num_workers"))
    shuffle_patches = property(attrgetter("_native.shuffle_patches"))
    subject_sampler = property(attrgetter("_native.subject_sampler"))

    def __init__(
        self,
        subjects_dataset: SubjectsDataset | Sequence[NativeSubject],
        max_length: int,
        samples_per_volume: int,
        sampler: PatchSampler,
        subject_sampler: Iterable[int] | None = None,
        num_workers: int = 0,
        shuffle_subjects: bool = True,
        shuffle_patches: bool = True,
        start_background: bool = True,
        verbose: bool = False,
    ) -> None:
        if verbose:
            warnings.warn("verbose has no effect: a queue of zpatch prints nothing", stacklevel=2)
        if not isinstance(sampler, PatchSampler):
            raise OptionError(f"a queue needs a sampler of this module, not {sampler!r}")
        if not isinstance(subjects_dataset, SubjectsDataset):
            subjects_dataset = SubjectsDataset(subjects_dataset)
        self.subjects_dataset = subjects_dataset
        self.samples_per_volume = samples_per_volume
        self.sampler = sampler
        self.shuffle_subjects = shuffle_subjects
        rank, world_size = (0, 1) if subject_sampler is None else (None, None)  # not torch.distributed's
        options = QueueOptions(
            max_length=max_length,
            num_workers=num_workers,
            shuffle_subjects=shuffle_subjects and subject_sampler is None,
            shuffle_patches=shuffle_patches,
            transform=subjects_dataset.transform,
            subject_sampler=subject_sampler,
            seed=_drawn_seed(),
            rank=rank,
            world_size=world_size,
        )
        counts = subjects_dataset.num_samples(samples_per_volume)
        self._native = CountedQueue(subjects_dataset, counts, sampler.native, options)

    @property
    def num_subjects(self) -> int:
        """Number of subjects in an epoch."""
        return len(self.subjects_dataset if self.subject_sampler is None else list(self.subject_sampler))

    @property
    def iterations_per_epoch(self) -> int:
        """Number of patches in an epoch."""
        return len(self._native)

    def __len__(self) -> int:
        return self.iterations_per_epoch

    def __iter__(self) -> Iterator[Patch]:
        subject_of = functools.lru_cache(RECENT_SUBJECTS)(lambda n: self.subjects_dataset[n].in_one_space())
        for patch in self._native:
            yield self.sampler.of(patch, subject_of(subject_number(patch)))

    def get_max_memory(self, subject: NativeSubject | None = None) -> int:
        """Bytes that the queue's patches take at most; or that they would if all were of one subject."""
        if subject is None:
            return self._native.max_memory
        options = replace(self._native.options, subject_sampler=None, rank=0, world_size=1)
        return CountedQueue([subject], [self.samples_per_volume], self.sampler.native, options).max_memory

    def get_max_memory_pretty(self, subject: NativeSubject | None = None) -> str:
        """``get_max_memory`` for people."""
        return format_bytes(self.get_max_memory(subject))

    def close(self) -> None:
        """End the workers, as happens when the queue is no longer used."""
        self._native.close()

    def __repr__(self) -> str:
        return (
            f"Queue(max_length={self.max_length}, num_subjects={self.num_subjects}, "
            f"samples_per_volume={self.samples_per_volume}, iterations_per_epoch={len(self)})"
        )


def _drawn_seed() -> int:
    return int(torch.randint(2**63 - 1, ()))
