"""Patches and batches of them, as torch sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray

from zpatch.errors import OptionError, UnknownNameError
from zpatch.geometry import Affine, PatchLocation
from zpatch.schema import Kind

# Types that torch stores but hardly computes with, and what holds all their values.
_WIDER = {
    np.dtype(np.uint16): np.int32,
    np.dtype(np.uint32): np.int64,
    np.dtype(np.uint64): np.int64,
}


def to_tensor(voxels: NDArray[Any]) -> torch.Tensor:
    """A tensor of some voxels, in a type that torch computes with; shares memory where it can."""
    return torch.from_numpy(voxels.astype(_WIDER.get(voxels.dtype, voxels.dtype), copy=False))


@dataclass(frozen=True, slots=True)
class PatchImage:
    """One image of a patch.

    ``data`` is (C, I, J, K), a view of (c, z, y, x) memory; in a batch (B, C, I, J, K). ``affine`` is
    4 x 4 with its origin at the patch's corner; in a batch (B, 4, 4).
    """

    data: torch.Tensor
    affine: Affine
    kind: Kind = "scalar"


class _ByName:
    """Images by attribute and by item."""

    images: Mapping[str, PatchImage]

    def map_data(self, fn: Callable[[Any], Any]) -> Self:
        """The same with ``fn`` applied to the data of each image."""
        images = {name: replace(image, data=fn(image.data)) for name, image in self.images.items()}
        return replace(self, images=images)  # type: ignore[type-var]

    def __getitem__(self, name: str) -> PatchImage:
        try:
            return self.images[name]
        except KeyError:
            raise UnknownNameError.among("image", name, self.images, "the patch") from None

    def __getattr__(self, name: str) -> PatchImage:
        images = self.__dict__.get("images", {})
        if name in images:
            return cast(PatchImage, images[name])
        raise AttributeError(f"no {name!r} here (images: {', '.join(images)})")

    def __iter__(self) -> Iterator[str]:
        return iter(self.images)


@dataclass(frozen=True)
class Patch(_ByName):
    """A patch of one subject: ``patch.t1.data``, ``patch.t1.affine``, ``patch.location``.

    ``subject`` is the subject's name.
    """

    images: Mapping[str, PatchImage]
    location: PatchLocation
    subject: str

    def with_data(self, **tensors: torch.Tensor) -> Patch:
        """The same patch with other voxels in some images."""
        changed = {name: replace(self[name], data=tensor) for name, tensor in tensors.items()}
        return replace(self, images={**self.images, **changed})


@dataclass(frozen=True)
class PatchBatch(_ByName):
    """Some patches with a batch axis: ``batch.t1.data`` is (B, C, I, J, K).

    ``patch_location`` and ``subjects`` have an entry for each patch.
    """

    images: Mapping[str, PatchImage]
    patch_location: list[PatchLocation]
    subjects: list[str]

    def __len__(self) -> int:
        return len(self.patch_location)


def collate(patches: Sequence[Patch]) -> PatchBatch:
    """Stack patches into a batch, as ``collate_fn`` of any DataLoader."""
    names = list(patches[0].images)
    for patch in patches:
        if list(patch.images) != names:
            raise OptionError(
                f"a batch needs the same images in each patch: {patch.subject!r} has "
                f"{', '.join(patch.images)}, {patches[0].subject!r} has {', '.join(names)}"
            )
    images = {name: _stacked(name, patches) for name in names}
    return PatchBatch(images, [p.location for p in patches], [p.subject for p in patches])


def _stacked(name: str, patches: Sequence[Patch]) -> PatchImage:
    parts = [patch[name] for patch in patches]
    shapes = {tuple(part.data.shape) for part in parts}
    if len(shapes) > 1:
        raise OptionError(
            f"a batch needs patches of one shape: {name!r} has {', '.join(map(str, sorted(shapes)))}"
        )
    # Stacked in memory order (c, z, y, x), so that the copy runs along the memory it reads.
    stored = torch.stack([part.data.permute(0, 3, 2, 1) for part in parts])
    return PatchImage(stored.permute(0, 1, 4, 3, 2), np.stack([part.affine for part in parts]), parts[0].kind)
