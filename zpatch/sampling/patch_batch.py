"""Batches: patches stacked along a new axis, each copied once.

Importing this module lets torch's ``default_collate`` know patches, so that a DataLoader of a sampler, a grid
or a queue needs no ``collate_fn``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch.utils.data._utils.collate import default_collate_fn_map

from zpatch.errors import OptionError
from zpatch.geometry.boxes import PatchLocation
from zpatch.sampling.patch import ImagesByName, Patch, PatchImage

NewMemory = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class PatchBatch(ImagesByName):
    """Patches with a batch axis: ``batch.t1.data`` is (B, C, I, J, K), ``batch.t1.affine`` (B, 4, 4).

    ``patch_location`` and ``subjects`` have a location and the name of a subject for each patch. As a mapping
    it has the images, and each of them is a mapping of its tensors: Lightning, accelerate and others find the
    size of a batch there, and ``batch["t1"]["data"]`` is ``batch.t1.data``.

    >>> import numpy as np
    >>> patch = Patch({"t1": PatchImage(torch.ones(1, 2, 2, 2), np.eye(4))}, None, "sub-01")
    >>> batch = collate([patch, patch]).to("cpu")
    >>> batch.batch_size, batch.subjects, batch["t1"]["data"].shape
    (2, ['sub-01', 'sub-01'], torch.Size([2, 1, 2, 2, 2]))
    """

    images: Mapping[str, PatchImage]
    patch_location: list[PatchLocation]
    subjects: list[str]

    @property
    def batch_size(self) -> int:
        """Number of patches."""
        return len(self.patch_location)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """The batch with its data on a device; Lightning and other trainers call it to move batches."""
        return self.map_data(lambda data: data.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The batch in page-locked memory; torch's DataLoader calls it to pin batches."""
        return self.map_data(torch.Tensor.pin_memory)


def collate(patches: Sequence[Patch]) -> PatchBatch:
    """Stack patches into a batch: ``collate_fn`` of any DataLoader, which takes it for patches by itself too.

    Data is contiguous, (B, C, I, J, K). An OptionError if the patches differ in their images, or in the
    shapes or types of their data.

    >>> import numpy as np
    >>> patch = Patch({"t1": PatchImage(torch.ones(1, 2, 2, 2), np.eye(4))}, None, "sub-01")
    >>> batch = collate([patch, patch])
    >>> tuple(batch.t1.data.shape), batch.subjects
    ((2, 1, 2, 2, 2), ['sub-01', 'sub-01'])
    """
    return stack(patches, len(patches))


def stack(patches: Iterable[Patch], count: int, new_memory: NewMemory = torch.empty) -> PatchBatch:
    """A batch of at most ``count`` patches; each patch is copied before the next one is asked for.

    ``new_memory(shape, dtype=)`` allocates the batch (b, c, i, j, k) of one image. Gradients are not copied.
    """
    batch: dict[str, torch.Tensor] = {}
    taken: list[Patch] = []
    for patch in itertools.islice(patches, count):
        if taken:
            _check_alike(patch, taken[0])
        for name, image in patch.images.items():
            if not taken:
                batch[name] = new_memory((count, *image.data.shape), dtype=image.data.dtype)
            batch[name][len(taken)].copy_(image.data.detach())
        taken.append(patch)
    images = {
        name: PatchImage(
            data[: len(taken)],
            np.stack([patch[name].affine for patch in taken]),
            taken[0][name].kind,
            *np.array([(patch[name].slope, patch[name].inter) for patch in taken]).T,
        )
        for name, data in batch.items()
    }
    return PatchBatch(images, [p.location for p in taken], [p.subject for p in taken])


def _check_alike(patch: Patch, first: Patch) -> None:
    if list(patch.images) != list(first.images):
        raise OptionError(
            f"a batch needs the same images in each patch: {patch.subject!r} has "
            f"{', '.join(patch.images)}, {first.subject!r} has {', '.join(first.images)}"
        )
    for name, image in patch.images.items():
        shapes = {tuple(image.data.shape), tuple(first[name].data.shape)}
        if len(shapes) > 1:
            raise OptionError(
                f"a batch needs patches of one shape: {name!r} has {', '.join(map(str, sorted(shapes)))}"
            )
        types = [one[name].data.dtype for one in (patch, first)]
        if types[0] != types[1]:
            raise OptionError(f"a batch needs patches of one type: {name!r} has {types[0]} and {types[1]}")


def _collate_by_default(patches: Sequence[Patch], *, collate_fn_map: object = None) -> PatchBatch:
    return collate(patches)


default_collate_fn_map[Patch] = _collate_by_default
