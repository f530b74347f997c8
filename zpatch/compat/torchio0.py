"""The patch API of TorchIO about 0.13: ``import zpatch.compat.torchio0 as torchio`` instead of ``torchio``.

Sources, patches as mappings, transforms and random numbers are as in ``zpatch.compat.torchio1``. In this
generation an image has a name, ``Subject(Image("t1", path, INTENSITY), ...)``. ``ImageSampler`` and
``LabelSampler`` take a subject and are iterated without end; a queue takes one of the two classes. Patches
have their first voxel in ``index_ini``. In ``GridSampler`` and ``GridAggregator`` the overlap is a border on
each side of a patch, which the aggregator cuts off: the step is the patch without both borders.

Where TorchIO differed from its documentation, this module follows the documentation:

- The border of the volume is part of the result, where TorchIO left it 0.
- All channels of the network's output are in the result, (C, I, J, K), where TorchIO kept the first; with one
  channel it is (I, J, K), as in TorchIO.
- The last location of a patch on each axis is drawn too, where TorchIO never drew it.
- An iteration of a queue is an epoch, as in ``zpatch.compat.torchio1``.

These differences are intended:

- A patch of ``LabelSampler`` has a labelled voxel at its centre, not just anywhere. The label map is the one
  called ``label``, else the first.
- Patches of a grid are in order, the first axis slowest, and no third is added where an axis has two.
- A border must be smaller than half a patch, and voxels that no patch covered are an error.
- Samplers and queues refuse images of one subject whose affines differ.
- Transforms have the names of TorchIO 1 (``RescaleIntensity`` was ``Rescale``), and a pipeline of them is its
  ``Compose``, not torchvision's.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, IterableDataset

from zpatch.blending.aggregator import PatchAggregator
from zpatch.compat import torchio1
from zpatch.compat.torchio1 import AFFINE, DATA, INTENSITY, LABEL, LOCATION, SAMPLING_MAP, TYPE
from zpatch.compat.torchio1_samplers import PatchSampler
from zpatch.compat.torchio1_subjects import Patch, as_subject
from zpatch.errors import OptionError
from zpatch.geometry.boxes import PatchLocation, Triple, triple
from zpatch.images import image
from zpatch.images.subject import Subject as NativeSubject
from zpatch.sampling.grid_sampler import GridSampler as NativeGridSampler
from zpatch.sampling.patch_sampler import PatchSize

__all__ = [
    "AFFINE",
    "DATA",
    "IMAGE",
    "INTENSITY",
    "LABEL",
    "LOCATION",
    "SAMPLING_MAP",
    "TYPE",
    "GridAggregator",
    "GridSampler",
    "Image",
    "ImageSampler",
    "ImagesDataset",
    "LabelSampler",
    "Queue",
    "Subject",
]

IMAGE = "image"
INDEX = "index_ini"
LABEL_NAME = "label"

data = inference = sampler = sys.modules[__name__]  # torchio.data.GridSampler is torchio.GridSampler
__getattr__ = torchio1.__getattr__  # torchio.RandomFlip is TorchIO's


@dataclass(frozen=True, slots=True, eq=False)
class Image:
    """An image and its name; ``path`` is a source of ``torchio1.Image``, ``type`` INTENSITY or LABEL."""

    name: str
    path: Any
    type: str = INTENSITY


class Subject(torchio1.Subject):
    """Images, one by one or in a list."""

    def __init__(self, *images: Image | Sequence[Image], name: str = "subject") -> None:
        listed = [one for part in images for one in ([part] if isinstance(part, Image) else part)]
        named = {one.name: torchio1.Image(one.path, one.type) for one in listed}
        if len(named) < len(listed):
            raise OptionError(f"the images of subject {name!r} need names that differ")
        super().__init__(named, name=name)


class ImagesDataset(torchio1.SubjectsDataset):
    """Subjects, with a transform; see ``torchio1.SubjectsDataset``."""

    def __init__(self, subjects: Sequence[NativeSubject], transform: Any = None) -> None:
        super().__init__(subjects, transform)


class ImageSampler(IterableDataset[Patch]):
    """Patches of a subject without end; each location is equally likely."""

    @classmethod
    def of_size(cls, patch_size: PatchSize, label_name: str | None) -> PatchSampler:
        """The sampler that draws the patches."""
        return torchio1.UniformSampler(patch_size)

    def __init__(self, sample: NativeSubject, patch_size: PatchSize) -> None:
        self.sample = as_subject(sample)
        self.patch_size = np.array(triple(patch_size, "patch_size"))
        self._sampler = self.of_size(patch_size, _label_name([self.sample]))

    def __iter__(self) -> Iterator[Patch]:
        return map(_with_index, self._sampler(self.sample))


class LabelSampler(ImageSampler):
    """Patches of a subject without end, each with a labelled voxel at its centre."""

    @classmethod
    def of_size(cls, patch_size: PatchSize, label_name: str | None) -> PatchSampler:
        """The sampler that draws the patches."""
        return torchio1.LabelSampler(patch_size, label_name)


def _label_name(subjects: Any) -> str | None:
    return LABEL_NAME if LABEL_NAME in subjects[0].images else None


def _with_index(patch: Patch) -> Patch:
    patch[INDEX] = patch.pop(LOCATION)[:3]
    return patch


class Queue(IterableDataset[Patch]):
    """Patches of a dataset of subjects, drawn by ``sampler_class``; iterate it once for each epoch.

    As ``torchio1.Queue``. ``verbose`` has no effect, and warns.
    """

    def __init__(
        self,
        subjects_dataset: torchio1.SubjectsDataset | Sequence[NativeSubject],
        max_length: int,
        samples_per_volume: int,
        patch_size: PatchSize,
        sampler_class: type[ImageSampler],
        num_workers: int = 0,
        shuffle_subjects: bool = True,
        shuffle_patches: bool = True,
        verbose: bool = False,
    ) -> None:
        if not (isinstance(sampler_class, type) and issubclass(sampler_class, ImageSampler)):
            raise OptionError(f"sampler_class must be ImageSampler or LabelSampler, not {sampler_class!r}")
        self._queue = torchio1.Queue(
            subjects_dataset,
            max_length,
            samples_per_volume,
            sampler_class.of_size(patch_size, _label_name(subjects_dataset)),
            num_workers=num_workers,
            shuffle_subjects=shuffle_subjects,
            shuffle_patches=shuffle_patches,
            verbose=verbose,
        )

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[Patch]:
        return map(_with_index, self._queue)

    def close(self) -> None:
        """End the workers, as the garbage collector does when the queue is no longer used."""
        self._queue.close()


class GridSampler(Dataset[dict[str, Any]]):
    """All patches of a grid over an array or tensor (I, J, K), or over a source of ``torchio1.Image``.

    ``patch_overlap`` is the border of a patch on each side, so that neighbours overlap by twice as much.
    """

    def __init__(self, data: Any, patch_size: PatchSize, patch_overlap: PatchSize) -> None:
        subject = NativeSubject(image=_as_image(data))
        self._grid = NativeGridSampler(subject, patch_size, _both_borders(patch_overlap))

    @property
    def locations(self) -> NDArray[np.int64]:
        """First voxel and one past the last of each patch, (N, 6)."""
        return np.array([_ends(location) for location in self._grid.locations])

    def __len__(self) -> int:
        return len(self._grid)

    def __getitem__(self, index: int) -> dict[str, Any]:
        patch = self._grid[index]
        return {IMAGE: patch[IMAGE].data, LOCATION: torch.tensor(_ends(patch.location))}


class GridAggregator:
    """The outputs of a network at all patches of a grid, put together without their borders.

    ``data`` is the array or tensor that the grid was over; only its shape is used.
    """

    def __init__(self, data: Any, patch_overlap: PatchSize) -> None:
        shape = _as_image(data).spatial_shape
        self._native = PatchAggregator(shape, "crop", _both_borders(patch_overlap))

    def add_batch(self, patches: torch.Tensor, locations: torch.Tensor) -> None:
        """Add a batch (B, C, I, J, K) at the locations of its patches, (B, 6)."""
        ends = np.asarray(locations.cpu() if isinstance(locations, torch.Tensor) else locations)
        sizes = ends[:, 3:] - ends[:, :3]
        places = [
            PatchLocation((i, j, k), (p, q, r))
            for (i, j, k), (p, q, r) in zip(ends[:, :3].tolist(), sizes.tolist(), strict=True)
        ]
        for place in places:
            torchio1.check_size(patches, place.size)
        self._native.add_batch(patches, places)

    def get_output_tensor(self) -> torch.Tensor:
        """The volume (I, J, K), or (C, I, J, K) of several channels."""
        output = self._native.get_output()
        assert isinstance(output, torch.Tensor)
        return output[0] if len(output) == 1 else output


def _as_image(data: Any) -> image.Image:
    is_voxels = isinstance(data, np.ndarray | torch.Tensor)
    return torchio1.ScalarImage(tensor=data) if is_voxels else torchio1.ScalarImage(data)


def _both_borders(patch_overlap: PatchSize) -> Triple:
    i, j, k = triple(patch_overlap, "patch_overlap")
    return 2 * i, 2 * j, 2 * k


def _ends(location: PatchLocation) -> tuple[int, ...]:
    return location.index_ini + location.index_fin
