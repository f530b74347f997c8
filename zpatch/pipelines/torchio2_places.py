"""Where each transform of TorchIO 2 acts. Those of volumes are the steps of TorchIO 1 with other options."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from zpatch.errors import OptionError
from zpatch.geometry.affines import Affine
from zpatch.geometry.boxes import Triple
from zpatch.images.image import Image
from zpatch.images.subject import Subject
from zpatch.pipelines import torchio1_grids as grids
from zpatch.pipelines import torchio1_places as places1
from zpatch.pipelines import torchio1_volumes as volumes
from zpatch.pipelines.displacements import in_voxels, in_world, margin_to, rotated
from zpatch.pipelines.pipeline import Remember, Step
from zpatch.pipelines.torchio1_grids import names_of
from zpatch.pipelines.torchio_pipeline import Places, name_of
from zpatch.pipelines.volume_statistics import Masked, quantiles

PADDING = {"replicate": "edge", "circular": "wrap"}
LABELS = {"label": "linear"}  # partial volumes of labels: the likeliest label


def _by(step: Step, transform: Any, subject: Subject, remember: Remember, **options: Any) -> Subject:
    """A step of TorchIO 1, with options under the names that they have there."""
    given = SimpleNamespace(include=transform.include, exclude=transform.exclude, **options)
    return step(given, subject, remember)


def _padding(transform: Any) -> dict[str, Any]:
    mode = transform.padding_mode
    return {"padding_mode": transform.fill if mode == "constant" else PADDING.get(mode, mode)}


def reorient(transform: Any, subject: Subject, remember: Remember) -> Subject:
    """Reorient: axes to other letters."""
    return grids.each(
        subject, names_of(transform, subject), lambda image: image.oriented(transform.orientation)
    )


def crop(transform: Any, subject: Subject, remember: Remember) -> Subject:
    """Crop voxels from each side."""
    return _by(grids.crop, transform, subject, remember, bounds_parameters=transform.cropping)


def pad(transform: Any, subject: Subject, remember: Remember) -> Subject:
    """Pad voxels on each side."""
    options = {"bounds_parameters": transform.padding, **_padding(transform)}
    return _by(grids.pad, transform, subject, remember, **options)


def crop_or_pad(transform: Any, subject: Subject, remember: Remember) -> Subject:
    """CropOrPad to a shape, around the middle of the volume."""
    names = ("target_shape", "units", "only_crop", "only_pad", "location")
    options = {"mask_name": None, **_padding(transform), **{name: getattr(transform, name) for name in names}}
    return _by(grids.crop_or_pad, transform, subject, remember, **options)


def ensure_shape_multiple(transform: Any, subject: Subject, remember: Remember) -> Subject:
    """EnsureShapeMultiple: crop or pad to the next multiple."""
    options = {"target_multiple": transform.target_multiple, "method": transform.method}
    return _by(grids.ensure_shape_multiple, transform, subject, remember, **options, **_padding(transform))


def resample(transform: Any, subject: Subject, remember: Remember) -> Subject:
    """Resample to a spacing, or to the grid of an image of the subject."""
    target = tuple(transform.target) if isinstance(transform.target, list) else transform.target
    is_numbers = isinstance(target, tuple) and all(isinstance(of, numbers.Number) for of in target)
    if (is_numbers and len(target) != 3) or hasattr(target, "sample"):
        raise OptionError("its spacing is drawn at random; give one spacing")
    label = transform.label_interpolation
    options = {"target": target, "antialias": transform.antialias}
    options |= {"image_interpolation": transform.image_interpolation}
    options |= {"label_interpolation": LABELS.get(label, label)}
    return _by(grids.resample, transform, subject, remember, **options)


def mask(transform: Any, subject: Subject, remember: Remember) -> Subject:
    """Mask: a value where a label map is 0, or where it has none of some labels."""
    options = {"masking_method": transform.masking_method, "masking_labels": transform.labels}
    return _by(volumes.mask, transform, subject, remember, **options, outside_value=transform.outside_value)


def remap_labels(transform: Any, subject: Subject, remember: Remember) -> Subject:
    """RemapLabels: other numbers for some labels."""
    options = {"masking_method": None, "remapping": transform.remapping}
    return _by(volumes.remap_labels, transform, subject, remember, **options)


def remove_labels(transform: Any, subject: Subject, remember: Remember) -> Subject:
    """RemoveLabels: the background for some labels."""
    options = {
        "masking_method": None,
        "remapping": dict.fromkeys(transform.labels, transform.background_label),
    }
    return _by(volumes.remap_labels, transform, subject, remember, **options)


def sequential_labels(transform: Any, subject: Subject, remember: Remember) -> Subject:
    """SequentialLabels: labels numbered from 0 on, in their order."""
    return _by(volumes.sequential_labels, transform, subject, remember, masking_method=None)


def _fixed(value: Any, name: str) -> float:
    """The number that a range of parameters is; an OptionError if it is drawn at random."""
    if not value.is_deterministic:
        raise OptionError(f"{name} is drawn at random for each volume; give one number")
    return float(value._axes[0])


def normalize(transform: Any, subject: Subject, remember: Remember) -> Subject:
    """Normalize: from percentiles, or a given range, to another range; values beyond are cut."""
    out_low, out_high = (_fixed(getattr(transform, name), name) for name in ("out_min", "out_max"))

    def normalised(name: str) -> Image:
        image = subject[name]
        low, high = _input_range(transform, name, subject, remember)
        if high == low:
            return image
        slope = (out_high - out_low) / (high - low)
        return image.rescaled(slope, out_low - low * slope, low, high)

    return subject.with_images(**{name: normalised(name) for name in names_of(transform, subject, "scalar")})


def _input_range(transform: Any, name: str, subject: Subject, remember: Remember) -> Sequence[float]:
    if transform.in_min is not None and transform.in_max is not None:
        return [_fixed(getattr(transform, each), each) for each in ("in_min", "in_max")]
    fractions = [_fixed(getattr(transform, f"percentile_{each}"), each) / 100 for each in ("low", "high")]
    masked = volumes.masked_values(transform.masking_method, name, subject, remember)
    found: Sequence[float] = remember(f"{name} cut", lambda: quantiles(masked, fractions))
    if math.isnan(found[0]):  # an empty mask
        found = remember(f"{name} whole", lambda: quantiles(Masked(subject[name]), fractions))
    return [float(np.float32(value)) for value in found]


def histogram_standardization(transform: Any, subject: Subject, remember: Remember) -> Subject:
    """HistogramStandardization (Nyúl and Udupa, 2000): a piecewise linear map to trained landmarks."""
    at = sorted({0.01, 0.99, 0.25, 0.75, *(tenth / 10 for tenth in range(1, 10)), *transform.cutoff})
    if len(at) != len(transform.landmarks):
        raise OptionError(f"it has {len(transform.landmarks)} landmarks for {len(at)} quantiles")

    def standardised(name: str) -> Image:
        found = remember(f"{name} quantiles", lambda: quantiles(Masked(subject[name]), at))
        return volumes.mapped_piecewise(
            subject[name], np.float32(found), transform.landmarks.numpy(), right=True
        )

    chosen = names_of(transform, subject, "scalar")
    return subject.with_images(**{name: standardised(name) for name in chosen})


STEPS: dict[str, Step] = {
    "Reorient": reorient,
    "Resample": resample,
    "CropOrPad": crop_or_pad,
    "Crop": crop,
    "Pad": pad,
    "EnsureShapeMultiple": ensure_shape_multiple,
    "CopyAffine": grids.copy_affine,
    "Standardize": volumes.z_normalization,
    "Normalize": normalize,
    "HistogramStandardization": histogram_standardization,
    "Clamp": volumes.clamp,
    "Mask": mask,
    "RemapLabels": remap_labels,
    "RemoveLabels": remove_labels,
    "SequentialLabels": sequential_labels,
    "OneHot": volumes.one_hot,
}
POINTWISE = ("Clamp", "Mask", "RemapLabels", "RemoveLabels", "OneHot", "To")
ON_PATCHES = ("Flip", "Noise", "Gamma", "BiasField", "LabelsToImage")
REFUSED = {
    **{
        name.removeprefix("Random"): why
        for name, why in places1.REFUSED.items()
        if name != "RandomAffineElasticDeformation"
    },
    "Transpose": "swaps axes and leaves the scan mirrored; use Reorient",
    "CornucopiaAdapter": "holds a transform of Cornucopia, which may do anything to the volume",
}


def _most(parameter: Any, name: str) -> list[float]:
    """The largest absolute value of a range of parameters along each axis."""
    return [_largest(axis, name) for axis in parameter._axes]


def _largest(axis: Any, name: str) -> float:
    if hasattr(axis, "sample_batched"):  # a Choice
        return float(np.abs(axis._values.numpy()).max())
    if hasattr(axis, "sample"):
        raise OptionError(
            f"{name} is drawn from {type(axis).__name__}, which has no largest value; give a range"
        )
    return float(np.max(np.abs(axis)))


def _of_spatial(transform: Any, patch_size: Triple, affine: Affine) -> Triple:
    """To where voxels of the patch come from: scaled, rotated and moved along world axes, or the inverse."""
    is_elastic = transform.control_points is not None or max(_most(transform.max_displacement, "it")) > 0
    if is_elastic or transform.target is not None or transform.center != "image":
        raise OptionError(
            f"{name_of(transform)} on patches may turn, scale and move about the middle of the image: no "
            f"target, control points or other center"
        )
    scales = _most(transform.scales, "scales")
    least = [_least(axis) for axis in transform.scales._axes]
    extent = in_world(patch_size, affine) * max(*scales, *(1 / max(of, 1e-3) for of in least))
    extent = extent + _most(transform.translation, "translation")
    angles = np.radians(_most(transform.degrees, "degrees")).tolist()
    return margin_to(in_voxels(rotated(extent, angles), affine), patch_size)


def _least(axis: Any) -> float:
    values = axis._values.numpy() if hasattr(axis, "sample_batched") else axis
    return float(np.min(np.abs(values)))


def _of_blur(transform: Any, patch_size: Triple, affine: Affine) -> Triple:
    """Three standard deviations, where TorchIO cuts its kernel, along axes of voxels."""
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    return margin_to(
        np.array(patch_size) / 2 + 3 * np.array(_most(transform.std, "std")) / spacing, patch_size
    )


def _of_anisotropy(transform: Any, patch_size: Triple, affine: Affine) -> Triple:
    """Two voxels of the coarsest axis."""
    reach = math.ceil(2 * _most(transform.downsampling, "downsampling")[0])
    return reach, reach, reach


MARGINS = {
    "Affine": _of_spatial,
    "Spatial": _of_spatial,
    "Blur": _of_blur,
    "Anisotropy": _of_anisotropy,
}
PLACES = Places(STEPS, POINTWISE, ON_PATCHES, ("Flip",), MARGINS, REFUSED)
