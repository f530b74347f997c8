"""Transforms of MONAI that change the grid of volumes, as steps on lazy images: MONAI says which grids.

A lazy transform of MONAI only notes, for each image, the matrix from new voxels to old ones and the new
shape. It is given images without memory, and what it notes is carried out by windows, turns and resampling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from zpatch.errors import OptionError
from zpatch.geometry.affines import Affine
from zpatch.geometry.voxel_grid import VoxelGrid
from zpatch.images.image import Image
from zpatch.images.normalization import pass_boxes
from zpatch.images.subject import Subject
from zpatch.pipelines.pipeline import Remember

Note = Mapping[str, Any]  # of a transform that is to be carried out
StandIn = Callable[[Image], Any]  # an image of MONAI with shape and affine, but without memory

SAME_GRID = 1e-3  # voxels: MONAI resamples nothing where matrices differ by less
PADDING = {"edge": "edge", "replicate": "edge", "reflect": "reflect", "wrap": "wrap", "circular": "wrap"}
INTERPOLATIONS = {
    "bilinear": "linear",
    "trilinear": "linear",
    "nearest": "nearest",
    "nearest-exact": "nearest",
    "0": "nearest",
    "1": "linear",
}


def keys_of(transform: Any, subject: Subject) -> list[str]:
    """The images that a transform of MONAI acts on; an OptionError for a required key that is not there."""
    missing = [key for key in transform.keys if key not in subject.images]
    if missing and not transform.allow_missing_keys:
        raise OptionError(f"{missing[0]!r} is no image of the subject, which has {', '.join(subject.images)}")
    return [key for key in transform.keys if key not in missing]


def check_voxelwise(function: Callable[[Any], Any], name: str) -> None:
    """Refuse a function of voxels that gives something else of a part than of the whole."""
    ramp = torch.linspace(-500, 1000, 512).reshape(1, 8, 8, 8)
    try:
        whole, part = (torch.as_tensor(function(voxels)) for voxels in (ramp, ramp[:, :4, 2:, :3]))
        is_voxelwise = torch.equal(whole[:, :4, 2:, :3], part)
    except Exception as error:
        raise OptionError(f"{name} fails on a tensor (C, I, J, K): {error}") from error
    if not is_voxelwise:
        raise OptionError(f"{name} must look at each voxel by itself; it uses the whole volume")


def moved(stand_in: StandIn, transform: Any, subject: Subject, remember: Remember) -> Subject:
    """The subject on the grids that a lazy transform of MONAI notes."""
    keys_of(transform, subject)
    if any(np.atleast_1d(getattr(transform, "anti_aliasing", False))):
        raise OptionError("anti_aliasing is not supported; use subject.resampled(..., antialias=True)")
    try:
        notes = transform(_stand_ins(stand_in, subject), lazy=True)
    except (KeyError, NotImplementedError, RuntimeError, ValueError) as error:
        raise OptionError(f"MONAI refuses it: {error}") from error
    return _carried_out(notes, _fill(transform), subject)


def crop_foreground(stand_in: StandIn, transform: Any, subject: Subject, remember: Remember) -> Subject:
    """CropForegroundd: the box where some values of an image are chosen, found in one pass over it."""
    source, cropper = transform.source_key, transform.cropper
    if source not in subject.images:
        raise OptionError(f"source_key {source!r} is no image of the subject")
    check_voxelwise(cropper.select_fn, "select_fn")
    found = remember(f"{source} foreground", partial(_bounds, cropper, subject[source]))
    if found is None:
        raise OptionError(f"no value of {source!r} is chosen by select_fn; leave the subject out")
    first, last = found
    margin, k = (np.broadcast_to(each, 3) for each in (cropper.margin, cropper.k_divisible))
    first, last = first - margin, last + margin + 1
    if cropper.allow_smaller:
        first, last = np.maximum(first, 0), np.minimum(last, subject[source].spatial_shape)
    size = -(-(last - first) // k) * k
    first = first - (size - (last - first)) // 2
    keys_of(transform, subject)
    notes = _stand_ins(stand_in, subject)
    for key, mode in transform.key_iterator(notes, transform.mode):
        notes[key] = cropper.crop_pad(
            img=notes[key], box_start=first, box_end=first + size, mode=mode, lazy=True
        )
    return _carried_out(notes, _fill(cropper), subject)


def _bounds(cropper: Any, image: Image) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    """The first and last voxel along each axis where ``select_fn`` chooses a value of any channel."""
    chosen = (
        image if cropper.channel_indices is None else image.select(channels=list(cropper.channel_indices))
    )
    along = [np.zeros(n, dtype=bool) for n in chosen.spatial_shape]
    for box in pass_boxes(chosen.shape, chosen.source.chunk_shape):
        voxels = torch.from_numpy(np.ascontiguousarray(chosen.read(box)))
        selected: Any = np.asarray(cropper.select_fn(voxels)).any(axis=0)
        for axis, (start, stop) in enumerate(zip(box.index_ini, box.index_fin, strict=True)):
            others = tuple(other for other in range(3) if other != axis)
            along[axis][start:stop] |= selected.any(axis=others)
    if not along[0].any():
        return None
    ends = [np.flatnonzero(axis)[[0, -1]] for axis in along]
    first, last = np.array(ends).T
    return first, last


def _stand_ins(stand_in: StandIn, subject: Subject) -> dict[str, Any]:
    return {name: stand_in(image) for name, image in subject.images.items()}


def _fill(transform: Any) -> float:
    """The value that a transform of MONAI pads with, where it pads with a constant."""
    for name in ("cropper", "padder", "padder"):
        transform = getattr(transform, name, transform)
    options = getattr(transform, "kwargs", None) or {}
    return float(options.get("value", options.get("constant_values", 0)))


def _carried_out(notes: Mapping[str, Any], fill: float, subject: Subject) -> Subject:
    """The subject after what is noted on each of its images."""
    made = {}
    for name, image in subject.images.items():
        for note in notes[name].pending_operations:
            image = _on_noted_grid(image, note, fill)
        made[name] = image
    return subject.with_images(**made)


def _on_noted_grid(image: Image, note: Note, fill: float) -> Image:
    matrix = np.asarray(note["lazy_affine"], dtype=np.float64)
    i, j, k = (int(n) for n in note["lazy_shape"])
    if (i, j, k) == image.spatial_shape and np.allclose(matrix, np.eye(4), atol=SAME_GRID):
        return image
    whole = matrix.round()
    if not np.allclose(matrix, whole, atol=1e-6) or abs(abs(np.linalg.det(whole[:3, :3])) - 1) > 0.5:
        return _resampled(image, VoxelGrid((i, j, k), image.affine @ matrix), matrix, note)
    if not np.array_equal(whole[:3, :3], np.eye(3)):
        image, whole = _turned(image, whole)
    first = whole[:3, 3].astype(int).tolist()
    if first == [0, 0, 0] and (i, j, k) == image.spatial_shape:
        return image
    inside = all(f >= 0 and f + n <= m for f, n, m in zip(first, (i, j, k), image.spatial_shape, strict=True))
    mode = "constant" if inside else _padding_of(note)
    return image.window(first, (i, j, k), padding_mode=mode, fill=fill if mode == "constant" else 0)


def _turned(image: Image, whole: Affine) -> tuple[Image, Affine]:
    """The image with its axes turned as a matrix does, and the matrix that is left, a shift."""
    corner = np.abs(whole[:3, :3]).T @ np.array(image.spatial_shape)
    start = np.where(whole[:3, :3].sum(axis=1) < 0, np.array(image.spatial_shape) - 1, 0)
    turn = whole.copy()
    turn[:3, 3] = start
    i, j, k = corner.astype(int).tolist()
    reference = VoxelGrid((i, j, k), image.affine @ turn)
    left: Any = np.linalg.solve(turn, whole).round()
    return image.on_grid_of(reference, interpolation="nearest"), left


def _padding_of(note: Note) -> str:
    """The padding mode that is noted, or that of the padding in it."""
    mode = next((str(of["mode"]) for of in _infos(note) if "mode" in of), "constant")
    if mode != "constant" and mode not in PADDING:
        raise OptionError(f"padding mode {mode!r} is not supported, but constant, {', '.join(PADDING)} are")
    return PADDING.get(mode, mode)


def _infos(note: Note) -> Iterator[Mapping[str, Any]]:
    info = note.get("extra_info", {})
    yield info
    if "pad_info" in info:
        yield from _infos(info["pad_info"])


def _resampled(image: Image, grid: VoxelGrid, matrix: Affine, note: Note) -> Image:
    info = note.get("extra_info", {})
    mode, by = str(info.get("mode", "bilinear")), str(note.get("class", ""))
    if mode not in INTERPOLATIONS or (mode == "nearest" and by == "Resize"):
        also = " (and 'nearest-exact' for label maps, as torch's 'nearest' moves voxels)" * (by == "Resize")
        raise OptionError(f"mode {mode!r} is not supported here, but 'trilinear' and 'bilinear' are{also}")
    if image.kind == "label" and INTERPOLATIONS[mode] != "nearest":
        raise OptionError(f"mode {mode!r} makes fractions of a label map; give a mode for each key")
    corners = np.array(np.meshgrid(*([0, n - 1] for n in grid.shape), indexing="ij")).reshape(3, -1)
    reached = matrix[:3, :3] @ corners + matrix[:3, 3:]
    before = np.maximum(0, -np.floor(reached.min(axis=1))).astype(int)
    after = np.maximum(0, np.ceil(reached.max(axis=1)) + 1 - np.array(image.spatial_shape)).astype(int)
    if before.any() or after.any():
        padding = _beyond_border(info)
        shape = before + after + np.array(image.spatial_shape)
        image = image.window((-before).tolist(), shape.tolist(), padding_mode=padding)
    return image.on_grid_of(grid, interpolation=INTERPOLATIONS[mode])


def _beyond_border(info: Mapping[str, Any]) -> str:
    """The padding mode of zpatch for that of torch's grid_sample."""
    mode = str(info.get("padding_mode", "border"))
    if mode == "reflection":
        return "reflect" if info.get("align_corners") is True else "symmetric"
    if mode not in ("border", "zeros"):
        raise OptionError(f"padding_mode {mode!r} is not supported, but border, zeros and reflection are")
    return {"border": "edge", "zeros": "constant"}[mode]


GRID_STEPS = {
    **dict.fromkeys(
        (
            "Spacingd",
            "Orientationd",
            "ResampleToMatchd",
            "Resized",
            "Rotated",
            "Affined",
            "Flipd",
            "Rotate90d",
            "SpatialPadd",
            "BorderPadd",
            "DivisiblePadd",
            "Padd",
            "ResizeWithPadOrCropd",
            "SpatialCropd",
            "CenterSpatialCropd",
            "CenterScaleCropd",
        ),
        moved,
    ),
    "CropForegroundd": crop_foreground,
}
