"""A patch of a subject, as torch sees it: tensors by the names of images, with affine and location."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray

from zpatch.errors import OptionError, UnknownNameError
from zpatch.geometry.affines import Affine, crop_affine
from zpatch.geometry.boxes import PatchLocation
from zpatch.geometry.padding import PaddedBox
from zpatch.records.image_record import Kind

# Types that torch stores but hardly computes with, and wider types (of uint64, all values below 2**63).
_WIDER = {
    np.dtype(np.uint16): np.int32,
    np.dtype(np.uint32): np.int64,
    np.dtype(np.uint64): np.int64,
}


def torch_dtype(dtype: np.dtype[Any], *, widen: bool = True) -> torch.dtype:
    """The type in which torch computes with voxels of a type; with ``widen=False``, stores them."""
    wider = np.dtype(_WIDER.get(dtype, dtype)) if widen else dtype
    return torch.from_numpy(np.empty(0, wider)).dtype


def to_tensor(voxels: NDArray[Any]) -> torch.Tensor:
    """A tensor of some voxels, in a type that torch computes with; it shares their memory if it can."""
    return torch.from_numpy(voxels.astype(_WIDER.get(voxels.dtype, voxels.dtype), copy=False))


@dataclass(frozen=True, slots=True)
class PatchImage(Mapping[str, torch.Tensor]):
    """One image of a patch.

    ``data`` is (C, I, J, K), contiguous; in a batch (B, C, I, J, K). ``affine`` is 4 x 4 with its origin at
    the patch's corner; in a batch (B, 4, 4). Values are ``slope * data + inter``: 1 and 0 unless a queue
    was asked for stored voxels; in a batch (B,). As a mapping it has the tensors ``image["data"]`` and
    ``image["affine"]``, which trainers look through.
    """

    data: torch.Tensor
    affine: Affine
    kind: Kind = "scalar"
    slope: Any = 1.0
    inter: Any = 0.0

    def __getitem__(self, name: str) -> torch.Tensor:
        if name == "affine":
            return torch.from_numpy(self.affine)
        if name == "data":
            return self.data
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(("data", "affine"))

    def __len__(self) -> int:
        return 2


class ImagesByName(Mapping[str, PatchImage]):
    """Images by attribute and by item; as a mapping, images by name."""

    images: Mapping[str, PatchImage]

    def map_data(self, fn: Callable[[Any], Any]) -> Self:
        """A copy with ``fn`` applied to the data of each image."""
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

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Patch(ImagesByName):
    """A patch of one subject: ``patch.t1.data``, ``patch.t1.affine``, ``patch.location``.

    ``subject`` is the subject's name. As a mapping it has its images by name.

    >>> t1 = PatchImage(torch.ones(1, 2, 2, 2), np.eye(4))
    >>> patch = Patch({"t1": t1}, PatchLocation((4, 0, 0), (2, 2, 2)), "sub-01")
    >>> patch.with_data(t1=-patch.t1.data).t1.data.sum()
    tensor(-8.)
    """

    images: Mapping[str, PatchImage]
    location: PatchLocation
    subject: str

    def with_data(self, **tensors: torch.Tensor) -> Patch:
        """A copy of the patch with other voxels in some images."""
        changed = {name: replace(self[name], data=tensor) for name, tensor in tensors.items()}
        return replace(self, images={**self.images, **changed})

    def centred(self, location: PatchLocation) -> Patch:
        """The patch with its edges repeated, so far that a location inside it is in its middle."""
        first, last = np.array(location.index), np.array(location.index_fin)
        reach = np.maximum(first - self.location.index_ini, np.array(self.location.index_fin) - last)
        box = PatchLocation.between((first - reach).tolist(), (last + reach).tolist())
        if box == self.location:
            return self
        i, j, k = (a - b for a, b in zip(box.index, self.location.index, strict=True))
        padded = PaddedBox.of(PatchLocation((i, j, k), box.size), self.location.size, "edge")
        images = {}
        for name, image in self.images.items():
            data = image.data
            for axis, taken in enumerate(padded.take, start=1):
                data = data.index_select(axis, torch.from_numpy(taken))
            images[name] = replace(image, data=data, affine=crop_affine(image.affine, (i, j, k)))
        return Patch(images, box, self.subject)

    def cropped(self, location: PatchLocation) -> Patch:
        """The part of the patch at a location inside its own, in the same volume.

        Raises OptionError where the data is not of the patch's extent, as a transform may have left it.
        """
        first = tuple(a - b for a, b in zip(location.index, self.location.index, strict=True))
        box = tuple(slice(f, f + n) for f, n in zip(first, location.size, strict=True))
        images = {}
        for name, image in self.images.items():
            if tuple(image.data.shape[1:]) != self.location.size:
                raise OptionError(
                    f"the transform makes {tuple(image.data.shape[1:])} voxels of {name!r} of "
                    f"{self.location.size}, so that its margin cannot be cropped; keep the extent of patches"
                )
            data = image.data[(slice(None), *box)]
            images[name] = replace(image, data=data, affine=crop_affine(image.affine, first))
        return Patch(images, location, self.subject)
