"""The patch API of TorchIO 0.18 to 1.x: ``import zpatch.compat.torchio1 as tio`` instead of ``torchio``.

Images are NIfTI paths (each converted once into a cache, see ``nifti_cache``), paths of stored images,
arrays or tensors. Subjects of a cohort are accepted wherever a Subject is; they have images and a ``name``.
No volume is loaded whole. Transforms are those of the installed TorchIO: ``tio.RandomFlip()``; called with a
subject or an image, they load it, as in TorchIO.

Patches are mappings, with entries that are attributes too: ``patch["t1"][DATA]`` or ``patch.t1.data`` is a
tensor (C, I, J, K), ``patch[LOCATION]`` a tensor of 6, first voxel and one past the last. Random numbers
follow from torch's global generator: one is drawn for each call of a sampler, and for each queue.

Where TorchIO differs from its documentation, this module follows the documentation:

- An iteration of a queue is an epoch: each subject once, without patches left over from the epoch before,
  also where that one was broken off.
- ``downsampling_factor`` applies in all modes of the aggregator, and in ``crop`` to the overlap as well.
- ``LabelSampler`` without probabilities takes all channels of a label map, not only the first.
- A queue with a ``subject_sampler`` needs no ``shuffle_subjects=False``: the sampler decides the order. Both
  together are an error.
- A ``WeightedSampler`` draws every voxel of a map of any size, exactly in proportion.

These differences are intended:

- A transform of a dataset makes lazy images of volumes, and random ones run on patches, read with a margin
  where they move voxels; transforms that need the volume in memory are refused by name. A subject that a
  loader gives whole is one patch, with its LOCATION, and its images have one shape.
- ``save`` of an image, or of an image of a patch, writes .nii and .nii.gz only, with channels as fourth axis.
- A queue gives images as float32 (label maps in their stored type), a sampler in their stored type.
- A queue is iterated, not indexed. A subject that its sampler repeats gives other patches each time.
- A volume smaller than the patch is padded up to it where a GridSampler has a ``padding_mode``; modes are
  constant, a number, edge, reflect, symmetric and wrap.
- Voxels that no patch covered are an error, where TorchIO gives 0 or NaN; int64 stays int64.
- Names of images have letters, digits, ``.``, ``_`` and ``-`` only. ``None`` in LabelSampler is all but 0.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from zpatch.blending.aggregator import PatchAggregator
from zpatch.compat.epoch_queues import CountedQueue, subject_number
from zpatch.compat.generation_errors import check_subject_sampler, raised_as_in_torchio
from zpatch.compat.torchio1_images import (
    AFFINE,
    DATA,
    INTENSITY,
    LABEL,
    SAMPLING_MAP,
    TYPE,
    Image,
    LabelMap,
    ScalarImage,
)
from zpatch.compat.torchio1_samplers import (
    GridSampler,
    LabelSampler,
    PatchSampler,
    UniformSampler,
    WeightedSampler,
    drawn_seed,
)
from zpatch.compat.torchio1_subjects import (
    CHANNELS_DIMENSION,
    LOCATION,
    Patch,
    Subject,
    SubjectsDataset,
    SubjectsLoader,
    apply_in_memory,
)
from zpatch.compat.transforms import transform_class
from zpatch.errors import ModelError, OptionError
from zpatch.geometry.boxes import PatchLocation, Triple, triple
from zpatch.images.subject import Subject as NativeSubject
from zpatch.loading.queue_options import QueueOptions
from zpatch.loading.queue_subjects import check_sequence
from zpatch.runtime.byte_sizes import format_bytes

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

RECENT_SUBJECTS = 256  # a subject of a cohort takes a while to make

data = inference = sampler = sys.modules[__name__]  # tio.data.UniformSampler is tio.UniformSampler


def __getattr__(name: str) -> Any:
    """A transform of TorchIO 1, if that is installed."""
    return transform_class(name, 1, apply_in_memory)


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
        """Add a batch (B, C, I, J, K) at the locations of its patches, (B, 6)."""
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
    """Refuse patches (B, C, I, J, K) whose size the network has changed."""
    if batch.ndim == 5 and batch.shape[2:] != size:
        raise ModelError(
            f"the patches are {tuple(batch.shape[2:])} where the output has room for {size}; "
            f"the network must keep the patch's shape{unless}"
        )


class Queue(IterableDataset[Patch]):
    """Patches of a dataset of subjects; iterate it, or a DataLoader of it, once for each epoch.

    Each subject gives ``samples_per_volume`` patches, or as many as its ``num_samples`` says; with a
    GridSampler, the first ones. At most ``max_length`` wait in memory. ``num_workers`` processes read them,
    from the first iteration on. ``start_background`` has no effect; nor has ``verbose``, which warns. Under
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
        shuffle_subjects: bool | None = None,
        shuffle_patches: bool = True,
        start_background: bool = True,
        verbose: bool = False,
    ) -> None:
        if verbose:
            warnings.warn("verbose has no effect: a queue of zpatch prints nothing", stacklevel=2)
        if not isinstance(sampler, PatchSampler):
            raise OptionError(f"a queue needs a sampler of this module, not {sampler!r}")
        if not isinstance(subjects_dataset, SubjectsDataset):
            check_sequence(subjects_dataset, sampler.native)
            subjects_dataset = SubjectsDataset(subjects_dataset)
        self.subjects_dataset = subjects_dataset
        self.samples_per_volume = samples_per_volume
        self.sampler = sampler
        self.shuffle_subjects = subject_sampler is None if shuffle_subjects is None else shuffle_subjects
        check_subject_sampler(
            subject_sampler,
            bool(shuffle_subjects),
            "The flag shuffle_subjects cannot be set when a subject sampler is passed",
            OptionError(
                "The subject sampler passed to the queue must have a __len__ method: it is iterated anew for "
                "each epoch; give a list, or a Sampler"
            ),
        )
        rank, world_size = (0, 1) if subject_sampler is None else (None, None)  # not torch.distributed's
        options = QueueOptions(
            max_length=max_length,
            num_workers=num_workers,
            shuffle_subjects=self.shuffle_subjects,
            shuffle_patches=shuffle_patches,
            transform=subjects_dataset.transform,
            subject_sampler=subject_sampler,
            seed=drawn_seed(),
            rank=rank,
            world_size=world_size,
        )
        counts = subjects_dataset.num_samples(samples_per_volume)
        with raised_as_in_torchio("Empty probability map found"):
            self._native = CountedQueue(subjects_dataset.dry_iter(), counts, sampler.native, options)

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
        """Bytes of the queue's patches at most; with a ``subject``, if all were patches of it."""
        if subject is None:
            return self._native.max_memory
        options = replace(self._native.options, subject_sampler=None, rank=0, world_size=1)
        return CountedQueue([subject], [self.samples_per_volume], self.sampler.native, options).max_memory

    def get_max_memory_pretty(self, subject: NativeSubject | None = None) -> str:
        """``get_max_memory`` for people."""
        return format_bytes(self.get_max_memory(subject))

    def close(self) -> None:
        """End the workers, as the garbage collector does when the queue is no longer used."""
        self._native.close()

    def __repr__(self) -> str:
        return (
            f"Queue(max_length={self.max_length}, num_subjects={self.num_subjects}, "
            f"samples_per_volume={self.samples_per_volume}, iterations_per_epoch={len(self)})"
        )
