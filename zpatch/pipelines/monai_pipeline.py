"""A transform of MONAI as a Pipeline; random crops, and what needs the volume in memory, are refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from zpatch.errors import OptionError
from zpatch.geometry.affines import Affine
from zpatch.geometry.boxes import Triple
from zpatch.images.subject import Subject
from zpatch.pipelines.displacements import Extent, largest, margin_to, rotated
from zpatch.pipelines.monai_grids import GRID_STEPS, StandIn, keys_of
from zpatch.pipelines.monai_linear import BY_STATISTICS
from zpatch.pipelines.monai_volumes import POINTWISE
from zpatch.pipelines.pipeline import (
    Margin,
    MarginOf,
    PatchStep,
    Pipeline,
    SubjectStep,
    checked,
    count_with_margin,
    followed_by,
    in_order,
    no_margin,
    of_several,
)
from zpatch.sampling.patch import Patch

Act = Callable[[Sequence[Any]], Callable[[Patch], Patch]]
COMPOSED = ("Compose", "OneOf", "SomeOf", "RandomOrder")

# Random transforms of each voxel by itself, or of axes; and those that use numbers of what they are given,
# which pipelines of MONAI apply to crops.
ON_PATCHES = (
    "RandFlipd",
    "RandAxisFlipd",
    "RandRotate90d",
    "RandGaussianNoised",
    "RandRicianNoised",
    "RandScaleIntensityd",
    "RandShiftIntensityd",
    "RandScaleIntensityFixedMeand",
    "RandStdShiftIntensityd",
    "RandAdjustContrastd",
    "RandHistogramShiftd",
    "RandBiasFieldd",
    "RandCoarseDropoutd",
    "RandCoarseShuffled",
    "DataStatsd",
    "SimulateDelayd",
    "ApplyPendingd",
)

FLIPS = ("RandFlipd", "RandAxisFlipd")

SAMPLERS = {
    "RandSpatialCropd": "zp.UniformSampler",
    "RandSpatialCropSamplesd": "zp.UniformSampler",
    "RandScaleCropd": "zp.UniformSampler",
    "RandCropd": "zp.UniformSampler",
    "RandCropByPosNegLabeld": "zp.MixedSampler",
    "RandCropByLabelClassesd": "zp.LabelSampler",
    "RandWeightedCropd": "zp.WeightedSampler",
    "GridPatchd": "zp.GridSampler",
    "RandGridPatchd": "zp.GridSampler",
    "GridSplitd": "zp.GridSampler",
}
_SPANS = "has control points that span the volume"
_FOURIER = "changes k-space, which is of the whole volume"
REFUSED = {
    **dict.fromkeys(
        ("RandGibbsNoised", "GibbsNoised", "RandKSpaceSpikeNoised", "KSpaceSpikeNoised"), _FOURIER
    ),
    **dict.fromkeys(("RandGridDistortiond", "GridDistortiond", "RandSmoothDeformd"), _SPANS),
    **dict.fromkeys(("RandSmoothFieldAdjustContrastd", "RandSmoothFieldAdjustIntensityd"), _SPANS),
    "Rand2DElasticd": "is of pictures, not of volumes",
    "Zoomd": "repeats the border of the volume; use Spacingd",
    "SpatialResampled": "needs an affine beside the images; use Spacingd, or ResampleToMatchd",
    "Cropd": "holds any crop of the volume; use SpatialCropd",
    "AdjustContrastd": "uses the range of the whole volume",
    "StdShiftIntensityd": "uses the deviation of the whole volume; use NormalizeIntensityd",
    "HistogramNormalized": "looks for the histogram of the whole volume",
    "ForegroundMaskd": "looks for a threshold in the whole volume",
    "IntensityStatsd": "gives numbers of the whole volume, which are in subject['name'].statistics",
    "KeepLargestConnectedComponentd": "looks for components in the whole volume",
    "RemoveSmallObjectsd": "looks for components in the whole volume",
    "FillHolesd": "looks for holes in the whole volume",
    "DistanceTransformEDTd": "measures distances in the whole volume",
    "LabelToContourd": "needs the neighbours of labels; apply it before the cohort is converted",
    "BoundingRectd": "gives boxes of the whole volume, not images",
    "ClassesToIndicesd": "lists voxels of the whole volume, which zp.LabelSampler needs not",
    "FgBgToIndicesd": "lists voxels of the whole volume, which zp.LabelSampler needs not",
    "AddExtremePointsChanneld": "looks for points in the whole volume",
    "AddCoordinateChannelsd": "gives coordinates in the whole volume; patch.location has those of a patch",
    "ImageFilterd": "has a kernel of any size",
    "RandImageFilterd": "has a kernel of any size",
    "Transposed": "reverses axes without their directions; use Orientationd",
    "AsChannelLastd": "moves the channels, which come first here",
    "SqueezeDimd": "removes an axis; patches have (C, I, J, K)",
    "SplitDimd": "makes images of channels; use subject['name'].select(channels=[...])",
    "Lambdad": "may do anything to the volume",
    "RandLambdad": "may do anything to the volume",
    **dict.fromkeys(("TorchIOd", "RandTorchIOd"), "holds a transform of TorchIO; use from_torchio"),
    **dict.fromkeys(("TorchVisiond", "RandTorchVisiond", "CuCIMd", "RandCuCIMd"), "holds one of pictures"),
}


def monai_pipeline(transform: Any, on_patches: Act, stand_in: StandIn) -> Pipeline:
    """The pipeline of a dictionary transform of MONAI, or of a Compose of such.

    ``on_patches(transforms)`` makes a function of patches of some transforms in order, ``stand_in(image)`` an
    image of MONAI without memory. Raises OptionError, with what to do instead, for a transform that needs
    the whole volume and is not known, for one that follows a random transform though it must come first, and
    for random crops, which are what a sampler does.
    """
    parts = _flat(transform)
    count = next((n for n, part in enumerate(parts) if not _acts_on_subjects(part)), len(parts))
    steps: list[SubjectStep | PatchStep] = [_subject_step(part, stand_in) for part in parts[:count]]
    rest, late = parts[count:], [part for part in parts[count:] if _must_come_first(part)]
    steps += _patch_steps([part for part in rest if part not in late], on_patches)
    return followed_by([*steps, *(_subject_step(part, stand_in) for part in late)])


def _patch_steps(parts: Sequence[Any], on_patches: Act) -> list[PatchStep]:
    """One step of all transforms up to the last that needs a margin, and one of those after it."""
    margins = [_margin_of(part) for part in parts]
    count = count_with_margin(margins)
    for part in parts[:count]:
        if _is_among(("RandRotate90d",), part):
            raise OptionError(
                f"RandRotate90d turns the margin that {_name_of(parts[count - 1])} reads; put it after that"
            )
    split = [(parts[:count], in_order(margins[:count])), (parts[count:], no_margin)]
    return [
        PatchStep(
            _name_of(some[0]), on_patches(some), margin, _is_among(FLIPS, *some), partial(_check_keys, some)
        )
        for some, margin in split
        if some
    ]


def _is_among(names: Sequence[str], *parts: Any) -> bool:
    return any(
        _name_of(part) in names or (_name_of(part) in COMPOSED and _is_among(names, *part.transforms))
        for part in parts
    )


def _check_keys(parts: Sequence[Any], subject: Subject) -> None:
    for part in parts:
        if hasattr(part, "keys") and hasattr(part, "allow_missing_keys") and _name_of(part) not in POINTWISE:
            keys_of(part, subject)


def _flat(transform: Any) -> list[Any]:
    """The transforms of a Compose, one after the other."""
    if _name_of(transform) == "Compose":
        if getattr(transform, "overrides", None):
            raise OptionError("overrides of a Compose are not supported; give the options to the transforms")
        return [part for inner in transform.transforms for part in _flat(inner)]
    return [transform]


def _name_of(transform: Any) -> str:
    """The name of MONAI's class of a transform, also of one that inherits what that class does."""
    does = type(transform).__call__
    for base in type(transform).__mro__:
        if base.__module__.startswith("monai.") and base.__call__ is does:
            return base.__name__
    return getattr(transform, "__name__", type(transform).__name__)


def _subject_step(transform: Any, stand_in: StandIn) -> SubjectStep:
    name = _name_of(transform)
    if name in GRID_STEPS:
        return SubjectStep(name, partial(GRID_STEPS[name], stand_in, transform))
    steps = {**POINTWISE, **BY_STATISTICS}
    return SubjectStep(name, partial(steps[name], transform))


def _acts_on_subjects(transform: Any) -> bool:
    return _name_of(transform) in POINTWISE or _must_come_first(transform)


def _must_come_first(transform: Any) -> bool:
    """Whether a transform needs the volume: it cannot follow one that acts on patches."""
    return _name_of(transform) in GRID_STEPS or _name_of(transform) in BY_STATISTICS


def _margin_of(transform: Any) -> Margin:
    """What a transform of patches reads around a patch; an OptionError if it cannot act on patches."""
    name = _name_of(transform)
    if name in COMPOSED:
        margins = [_margin_of(part) for part in transform.transforms]
        return of_several(margins, transform, is_one_of=name == "OneOf")
    if name in ON_PATCHES or name in POINTWISE:
        return no_margin
    if name in MARGINS:
        return checked(MARGINS[name], transform)
    if name in SAMPLERS:
        raise OptionError(
            f"{name} takes patches, which a sampler does here: give the queue {SAMPLERS[name]}(...), and "
            f"from_monai(what comes before it).then(from_monai(what comes after it, on='patch'))"
        )
    if name in GRID_STEPS or name in BY_STATISTICS:
        raise OptionError(f"{name} needs the whole volume, and here it is applied by chance; apply it first")
    raise OptionError(
        f"{name} {_why_refused(transform, name)}: on patches it would do something else; leave it out, or "
        f"say from_monai({name}(...), on='patch') to apply it to each patch by itself"
    )


def _why_refused(transform: Any, name: str) -> str:
    if name in REFUSED:
        return REFUSED[name]
    if type(transform).__module__.startswith("monai.") and not hasattr(transform, "keys"):
        return f"takes one array; use {name}d, with the names of images"
    return "is not known here, and may need the whole volume"


# Margins, in voxels: MONAI's random transforms know no millimetres


def _half(patch_size: Triple) -> Extent:
    extent: Extent = np.array(patch_size) / 2
    return extent


def _of_affine(transform: Any, patch_size: Triple, affine: Affine) -> Triple:
    return margin_to(_warped(transform, transform.rand_affine, _half(patch_size)), patch_size)


def _of_elastic(transform: Any, patch_size: Triple, affine: Affine) -> Triple:
    """Offsets of at most the magnitude, and then an affine map."""
    elastic = transform.rand_3d_elastic
    offset = max(abs(of) for of in elastic.magnitude_range)
    return margin_to(_warped(transform, elastic, _half(patch_size) + offset), patch_size)


def _warped(transform: Any, warp: Any, extent: Extent) -> Extent:
    """To where voxels come from: scaled, moved, sheared and rotated about the middle."""
    if warp.spatial_size is not None and np.any(np.array(warp.spatial_size) != -1):
        raise OptionError(
            f"{_name_of(transform)} with spatial_size gives other sizes of patches; leave it out"
        )
    ranges = warp.rand_affine_grid
    shear = np.eye(3)
    shear[[0, 0, 1, 1, 2, 2], [1, 2, 0, 2, 0, 1]] = largest(ranges.shear_range, 6)
    moved = (1 + np.array(largest(ranges.scale_range, 3))) * extent + largest(ranges.translate_range, 3)
    return rotated(shear @ moved, largest(ranges.rotate_range, 3))


def _of_rotation(transform: Any, patch_size: Triple, affine: Affine) -> Triple:
    turn = transform.rand_rotate
    _check_size_is_kept(transform, turn.keep_size)
    angles = [largest([each], 1)[0] for each in (turn.range_x, turn.range_y, turn.range_z)]
    return margin_to(rotated(_half(patch_size), angles), patch_size)


def _of_zoom(transform: Any, patch_size: Triple, affine: Affine) -> Triple:
    zoom = transform.rand_zoom
    _check_size_is_kept(transform, zoom.keep_size)
    least = min(1.0, float(np.min(zoom.min_zoom)))
    return margin_to(_half(patch_size) / least + 1, patch_size)


def _check_size_is_kept(transform: Any, keeps_size: bool) -> None:
    if not keeps_size:
        raise OptionError(f"{_name_of(transform)} with keep_size=False gives patches of other sizes; keep it")


def _of_low_resolution(transform: Any, patch_size: Triple, affine: Affine) -> Triple:
    """Two of the coarsest voxels."""
    reach = math.ceil(2 / float(np.min(transform.zoom_range)))
    return reach, reach, reach


def _of_smoothing(transform: Any, patch_size: Triple, affine: Affine) -> Triple:
    """Four standard deviations, where MONAI cuts its kernel."""
    smooth = getattr(transform, "rand_smooth", None)
    sigmas = _ranges(smooth, "sigma_{}") if smooth else _sigmas(transform.converter.sigma)
    return _voxels(4 * np.array(sigmas))


def _of_sharpening(transform: Any, patch_size: Triple, affine: Affine) -> Triple:
    """Two kernels, one after the other."""
    sharpen = getattr(transform, "rand_sharpen", None)
    if sharpen is None:
        both = [_sigmas(of) for of in (transform.converter.sigma1, transform.converter.sigma2)]
        return _voxels(4 * np.sum(both, axis=0) + 1)
    first = np.array(_ranges(sharpen, "sigma1_{}"))
    second = np.maximum(first, _ranges(sharpen, "sigma2_{}"))  # one number is a least sigma
    return _voxels(4 * (first + second) + 1)


def _ranges(transform: Any, name: str) -> list[float]:
    return [float(np.max(getattr(transform, name.format(axis)))) for axis in "xyz"]


def _sigmas(sigma: Any) -> list[float]:
    """The sigma of each axis, of one or three."""
    return [float(of) for of in np.broadcast_to(np.asarray(sigma, dtype=float), 3)]


def _of_median(transform: Any, patch_size: Triple, affine: Affine) -> Triple:
    i, j, k = (int(n) for n in np.broadcast_to(transform.converter.radius, 3))
    return i, j, k


def _of_savitzky_golay(transform: Any, patch_size: Triple, affine: Affine) -> Triple:
    reach = [0, 0, 0]
    reach[transform.converter.axis - 1] = transform.converter.window_length // 2
    i, j, k = reach
    return i, j, k


def _of_sobel(transform: Any, patch_size: Triple, affine: Affine) -> Triple:
    reach = int(transform.kernel_diff.numel()) // 2
    return reach, reach, reach


def _voxels(distance: Any) -> Triple:
    i, j, k = (1 + np.ceil(distance)).astype(int).tolist()
    return i, j, k


MARGINS: dict[str, MarginOf] = {
    "RandAffined": _of_affine,
    "Rand3DElasticd": _of_elastic,
    "RandRotated": _of_rotation,
    "RandZoomd": _of_zoom,
    "RandSimulateLowResolutiond": _of_low_resolution,
    "RandGaussianSmoothd": _of_smoothing,
    "GaussianSmoothd": _of_smoothing,
    "RandGaussianSharpend": _of_sharpening,
    "GaussianSharpend": _of_sharpening,
    "MedianSmoothd": _of_median,
    "SavitzkyGolaySmoothd": _of_savitzky_golay,
    "SobelGradientsd": _of_sobel,
}
