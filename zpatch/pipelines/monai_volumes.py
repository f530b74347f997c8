"""Transforms of MONAI of each voxel by itself, and of which images there are, as steps on lazy images.

They are called with the blocks that cover a box. On a patch they give the same as on the volume.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from zpatch.errors import OptionError
from zpatch.geometry.boxes import Voxels
from zpatch.images.subject import Subject
from zpatch.pipelines.monai_grids import Step, keys_of
from zpatch.pipelines.monai_linear import scale_intensity_range
from zpatch.pipelines.pipeline import Remember


def unchanged(transform: Any, subject: Subject, remember: Remember) -> Subject:
    """LoadImaged, EnsureChannelFirstd and others: images of zpatch are what these make."""
    keys_of(transform, subject)
    return subject


# Each voxel by itself


def voxelwise(transform: Any, subject: Subject, remember: Remember) -> Subject:
    """A transform that gives the same on a block as on the volume: it is called with blocks."""
    lenient = copy.copy(transform)
    lenient.allow_missing_keys = True
    made = {}
    for name in keys_of(transform, subject):
        image = subject[name]
        block = partial(_transformed_block, lenient, name, image.dtype if image.kind == "label" else None)
        probe = block(np.zeros((image.num_channels, 1, 1, 1), image.dtype))
        made[name] = image.map(partial(_in_blocks, block, probe))
    return subject.with_images(**made)


def _in_blocks(block: Callable[[Voxels], Voxels], probe: Voxels, array: Any) -> Any:
    whole = array.rechunk({0: -1})
    chunks = ((len(probe),), *whole.chunks[1:])
    return whole.map_blocks(block, dtype=probe.dtype, chunks=chunks, meta=probe[:0])


def _transformed_block(transform: Any, name: str, labels: np.dtype[Any] | None, voxels: Voxels) -> Voxels:
    changed = transform({name: torch.from_numpy(np.ascontiguousarray(voxels))})[name]
    made = np.asarray(torch.as_tensor(changed).as_subclass(torch.Tensor))
    if labels is None or made.dtype.kind in "iu":
        return made
    kept = made.astype(labels)
    if not np.array_equal(kept, made):
        raise OptionError(f"it gives the label map {name!r} values that {labels} cannot represent")
    return kept


def only_if_asked(transform: Any, subject: Subject, remember: Remember) -> Subject:
    """EnsureTyped, CastToTyped and ToTensord: nothing, unless they name a type."""
    dtypes = getattr(transform, "dtype", (transform.converter.dtype,))
    names_one = any(dtype is not None for dtype in dtypes)
    return (voxelwise if names_one else unchanged)(transform, subject, remember)


def mask_intensity(transform: Any, subject: Subject, remember: Remember) -> Subject:
    """MaskIntensityd: 0 where ``select_fn`` of the image ``mask_key`` is false."""
    if transform.mask_key not in subject.images:
        raise OptionError("mask_key must name an image of the subject; masks in memory are not supported")
    inside, select = subject[transform.mask_key], transform.converter.select_fn

    def masked(array: Any) -> Any:
        whole = array.rechunk({0: -1})
        where = inside.dask.rechunk((-1, *whole.chunks[1:]))
        return whole.map_blocks(partial(_masked_block, select), where, dtype=array.dtype, chunks=whole.chunks)

    return subject.with_images(**{name: subject[name].map(masked) for name in keys_of(transform, subject)})


def _masked_block(select: Callable[[Any], Any], voxels: Voxels, mask: Voxels) -> Voxels:
    return np.asarray(voxels * np.asarray(select(mask)), dtype=voxels.dtype)


# Which images there are


def copy_items(transform: Any, subject: Subject, remember: Remember) -> Subject:
    """CopyItemsd: images under other names."""
    keys, names = keys_of(transform, subject), iter(transform.names)
    copies = {next(names): subject[key] for _ in range(transform.times) for key in keys}
    return subject.with_images(**copies)


def select_items(transform: Any, subject: Subject, remember: Remember) -> Subject:
    """SelectItemsd: these images only."""
    return _only(keys_of(transform, subject), subject)


def delete_items(transform: Any, subject: Subject, remember: Remember) -> Subject:
    """DeleteItemsd: all other images; keys that are not there, as of metadata, are none."""
    if transform.use_re is not False and any(transform.use_re):
        raise OptionError("use_re is not supported; name the images")
    return _only([name for name in subject.images if name not in transform.keys], subject)


def _only(names: Sequence[str], subject: Subject) -> Subject:
    return Subject.of({name: subject[name] for name in names}, name=subject.name, metadata=subject.metadata)


def concat_items(transform: Any, subject: Subject, remember: Remember) -> Subject:
    """ConcatItemsd: images as the channels of one."""
    if transform.dim != 0:
        raise OptionError("only channels are joined: dim must be 0")
    first, *others = (subject[key] for key in keys_of(transform, subject))
    count = first.num_channels + sum(other.num_channels for other in others)
    dtype = np.result_type(first.dtype, *(other.dtype for other in others))

    def joined(array: Any) -> Any:
        whole = array.rechunk({0: -1})
        chunks = whole.chunks[1:]
        rest = [other.dask.rechunk((-1, *chunks)) for other in others]
        return whole.map_blocks(_joined_blocks, *rest, dtype=dtype, chunks=((count,), *chunks))

    return subject.with_images(**{transform.name: first.map(joined)})


def _joined_blocks(*blocks: Voxels) -> Voxels:
    return np.concatenate(blocks)


POINTWISE: Mapping[str, Step] = {
    **dict.fromkeys(
        (
            "ThresholdIntensityd",
            "ShiftIntensityd",
            "MapLabelValued",
            "LabelToMaskd",
            "LabelFilterd",
            "AsDiscreted",
            "Activationsd",
            "RepeatChanneld",
            "RemoveRepeatedChanneld",
            "SignalFillEmptyd",
            "ConvertToMultiChannelBasedOnBratsClassesd",
        ),
        voxelwise,
    ),
    **dict.fromkeys(("EnsureTyped", "CastToTyped", "ToTensord"), only_if_asked),
    **dict.fromkeys(
        (
            "LoadImaged",
            "EnsureChannelFirstd",
            "Identityd",
            "ToMetaTensord",
            "FromMetaTensord",
            "ToDeviced",
            "ToNumpyd",
        ),
        unchanged,
    ),
    "ScaleIntensityRanged": scale_intensity_range,
    "MaskIntensityd": mask_intensity,
    "ConcatItemsd": concat_items,
    "CopyItemsd": copy_items,
    "SelectItemsd": select_items,
    "DeleteItemsd": delete_items,
}
