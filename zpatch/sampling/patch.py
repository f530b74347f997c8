"""Patches and batches of them, as torch sees them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray

from zpatch.chunks.scaling import Scaling
from zpatch.errors import OptionError, UnknownNameError
from zpatch.geometry.boxes import Affine, PatchLocation
from zpatch.store.image_record import Kind

NewMemory = Callable[..., torch.Tensor]

# Types that torch stores but hardly computes with, and what holds all their values.
_WIDER = {
    np.dtype(np.uint16): np.int32,
    np.dtype(np.uint32): np.int64,
    np.dtype(np.uint64): np.int64,
}


def torch_dtype(dtype: np.dtype[Any], *, widen: bool = True) -> torch.dtype:
    """The type in which torch computes with voxels of a type, or only holds them."""
    wider = np.dtype(_WIDER.get(dtype, dtype)) if widen else dtype
    return torch.from_numpy(np.empty(0, wider)).dtype


def to_tensor(voxels: NDArray[Any]) -> torch.Tensor:
    """A tensor of some voxels, in a type that torch computes with; shares memory where it can."""
    return torch.from_numpy(voxels.astype(_WIDER.get(voxels.dtype, voxels.dtype), copy=False))


@dataclass(frozen=True, slots=True)
class PatchImage:
    """One image of a patch.

    ``data`` is (C, I, J, K), a view of (c, z, y, x) memory; in a batch (B, C, I, J, K). ``affine`` is
    4 x 4 with its origin at the patch's corner; in a batch (B, 4, 4). Values are ``slope * data + inter``:
    1 and 0 unless a queue was asked for stored voxels; in a batch (B,).
    """

    data: torch.Tensor
    affine: Affine
    kind: Kind = "scalar"
    slope: Any = 1.0
    inter: Any = 0.0

    def write_values(self, out: torch.Tensor, dtype: torch.dtype | None) -> None:
        """Write the values in a type to ``out`` of that type; with None the data, as it is.

        Of a gradient that a transform left on the data nothing goes along.
        """
        data = self.data.detach()
        if dtype is None or not self.is_pending(dtype):
            out.copy_(data)
        else:
            Scaling(self.slope, self.inter).write(_stored(data).numpy(), _stored(out).numpy())

    def is_pending(self, dtype: torch.dtype | None) -> bool:
        """Whether the data is not yet what images come in where they are asked for in a type."""
        if dtype is None or self.kind == "label" or self.data.is_complex():
            return False
        return self.data.dtype != dtype or (self.slope, self.inter) != (1.0, 0.0)


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

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """The batch with its data on a device; Lightning and the like move batches by it."""
        return self.map_data(lambda data: data.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The batch in page-locked memory; torch's DataLoader pins batches by it."""
        return self.map_data(torch.Tensor.pin_memory)


def collate(patches: Sequence[Patch]) -> PatchBatch:
    """Stack patches into a batch, as ``collate_fn`` of any DataLoader."""
    return stack(patches, len(patches))


def stack(
    patches: Iterable[Patch],
    count: int,
    new_memory: NewMemory = torch.empty,
    dtype: torch.dtype | None = None,
) -> PatchBatch:
    """A batch of ``count`` patches, or of as many as there are; each is copied before the next is asked for.

    ``new_memory(shape, dtype=)`` gives the memory of a batch of one image, in the order (b, c, z, y, x). With
    a ``dtype`` images that are no label maps are written as values of that type.
    """
    batch: dict[str, torch.Tensor] = {}
    taken: list[Patch] = []
    for patch in itertools.islice(patches, count):
        if taken:
            _check_alike(patch, taken[0], dtype)
        for name, image in patch.images.items():
            if not taken:
                shape = (count, *_stored(image.data).shape)
                batch[name] = new_memory(shape, dtype=_type(image, dtype))
            image.write_values(_in_user_order(batch[name])[len(taken)], dtype)
        taken.append(patch)
    images = {
        name: PatchImage(
            _in_user_order(data[: len(taken)]),
            np.stack([patch[name].affine for patch in taken]),
            taken[0][name].kind,
            *np.array([_left(patch[name], dtype) for patch in taken]).T,
        )
        for name, data in batch.items()
    }
    return PatchBatch(images, [p.location for p in taken], [p.subject for p in taken])


def _type(image: PatchImage, dtype: torch.dtype | None) -> torch.dtype:
    """What the values of an image come in."""
    return dtype if dtype is not None and image.is_pending(dtype) else image.data.dtype


def _left(image: PatchImage, dtype: torch.dtype | None) -> tuple[float, float]:
    """Slope and intercept that are still to be applied."""
    return (1.0, 0.0) if image.is_pending(dtype) else (image.slope, image.inter)


def _check_alike(patch: Patch, first: Patch, dtype: torch.dtype | None) -> None:
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
        types = [_type(one[name], dtype) for one in (patch, first)]
        if types[0] != types[1]:
            raise OptionError(f"a batch needs patches of one type: {name!r} has {types[0]} and {types[1]}")


def _stored(data: torch.Tensor) -> torch.Tensor:
    """(C, I, J, K) in the order of its memory, (c, z, y, x), so that a copy runs along what it reads."""
    return data.permute(0, 3, 2, 1) if data.ndim == 4 else data


def _in_user_order(batch: torch.Tensor) -> torch.Tensor:
    return batch.permute(0, 1, 4, 3, 2) if batch.ndim == 5 else batch
