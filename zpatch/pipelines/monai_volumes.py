"""Transforms of MONAI of each voxel by itself, and of which images there are, as steps on lazy images.

They are called with the boxes that are read. On a patch they give the same as on the volume.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

from zpatch.errors import OptionError
from zpatch.geometry.boxes import Voxels
from zpatch.images.subject import Subject
from zpatch.pipelines.monai_grids import check_voxelwise, keys_of
from zpatch.pipelines.monai_linear import scale_intensity_range
from zpatch.pipelines.pipeline import Remember, Step


def unchanged(transform: Any, subject: Subject, remember: Remember) -> Subject:
    """LoadImaged, EnsureChannelFirstd and others: images of zpatch are what these make."""
    keys_of(transform, subject)
    return subject


# Each voxel by itself


def voxelwise(transform: Any, subject: Subject, remember: Remember) -> Subject:
    """A transform that gives the same on a box as on the volume: it is called with boxes."""
    lenient = copy.copy(transform)
    lenient.allow_missing_keys = True
    made = {}
    for name in keys_of(transform, subject):
        image = subject[name]
        block = partial(_transformed_block, lenient, name, image.dtype if image.kind == "label" else None)
        made[name] = image.voxelwise(block)
    return subject.with_images(**made)


def _transformed_block(transform: Any, name: str, labels: np.dtype[Any] | None, voxels: Voxels) -> Voxels:
    if labels is not None and (labels.kind == "b" or (labels.kind == "u" and labels.itemsize > 1)):
        voxels = voxels.astype(np.int64)  # torch computes little with these types
    changed = transform({name: torch.from_numpy(np.ascontiguousarray(voxels))})[name]
    made = np.asarray(torch.as_tensor(changed).as_subclass(torch.Tensor))
    if labels is None:
        return made
    kept = made.astype(labels)
    if not np.array_equal(kept, made):
        raise OptionError(
            f"it gives the label map {name!r} values that {labels} cannot represent; store them in a "
            f"wider type"
        )
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
    inside, mask = subject[transform.mask_key], partial(_masked_block, transform.converter.select_fn)
    check_voxelwise(transform.converter.select_fn, "select_fn")
    changed = {name: subject[name].voxelwise(mask, inside) for name in keys_of(transform, subject)}
    return subject.with_images(**changed)


def _masked_block(select: Callable[[Any], Any], voxels: Voxels, mask: Voxels) -> Voxels:
    chosen = np.asarray(select(torch.from_numpy(np.ascontiguousarray(mask))))
    return np.asarray(voxels * chosen, dtype=voxels.dtype)


def activations(transform: Any, subject: Subject, remember: Remember) -> Subject:
    """Activationsd: a sigmoid, a softmax over channels, or another function of each voxel."""
    for other in transform.other if isinstance(transform.other, tuple) else (transform.other,):
        if other is not None:
            check_voxelwise(other, "other")
    return voxelwise(transform, subject, remember)


# Which images there are


def copy_items(transform: Any, subject: Subject, remember: Remember) -> Subject:
    """CopyItemsd: images under other names."""
    keys, names = keys_of(transform, subject), iter(transform.names)
    copies = {next(names): subject[key] for _ in range(transform.times) for key in keys}
    return subject.with_images(**copies)


def select_items(transform: Any, subject: Subject, remember: Remember) -> Subject:
    """SelectItemsd: these images only."""
    keys = keys_of(transform, subject)
    return subject.with_images(**{name: None for name in subject.images if name not in keys})


def delete_items(transform: Any, subject: Subject, remember: Remember) -> Subject:
    """DeleteItemsd: all other images; keys that are not there, as of metadata, are none."""
    if transform.use_re is not False and any(transform.use_re):
        raise OptionError("use_re is not supported; name the images")
    return subject.with_images(**{name: None for name in subject.images if name in transform.keys})


def concat_items(transform: Any, subject: Subject, remember: Remember) -> Subject:
    """ConcatItemsd: images as the channels of one."""
    if transform.dim != 0:
        raise OptionError("only channels are joined: dim must be 0")
    first, *others = (subject[key] for key in keys_of(transform, subject))
    return subject.with_images(**{transform.name: first.voxelwise(_joined_blocks, *others)})


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
    "Activationsd": activations,
    "ConcatItemsd": concat_items,
    "CopyItemsd": copy_items,
    "SelectItemsd": select_items,
    "DeleteItemsd": delete_items,
}
