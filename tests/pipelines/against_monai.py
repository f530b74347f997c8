"""Comparison of lazy transforms with what MONAI makes of the volume in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import zpatch as zp
from zpatch.compat.transforms import from_monai


def in_memory(subject: zp.Subject) -> dict[str, Any]:
    """The images of a subject as MONAI loads them."""
    from monai.data import MetaTensor

    types = {"scalar": np.float32}
    return {
        name: MetaTensor(
            torch.from_numpy(image.data.astype(types.get(image.kind, image.dtype))),
            affine=torch.from_numpy(image.affine),
        )
        for name, image in subject.images.items()
    }


def assert_as_monai(transform: Any, subject: zp.Subject, atol: float = 2e-3, ties: float = 0) -> zp.Subject:
    """Each image of the lazy subject is what MONAI makes of the volume, and so is a box of it.

    ``ties`` is the fraction of labels that may differ, where two voxels are about equally near.
    """
    wanted = transform(in_memory(subject))
    found = from_monai(transform).of_subject(subject)
    rng = np.random.default_rng(0)
    for name, image in found.images.items():
        voxels = wanted[name].as_tensor().numpy()
        assert image.shape == voxels.shape, name
        np.testing.assert_allclose(image.affine, wanted[name].affine.numpy(), atol=1e-4, err_msg=name)
        assert_reads_boxes(image, rng, ties)
        if image.kind == "label":
            assert np.mean(image.data != voxels) <= ties, name
            continue
        scale = max(1.0, float(np.abs(voxels.astype(float)).max()))
        rounding = 1.0 if voxels.dtype.kind in "iu" and image.kind == "scalar" else atol * scale
        np.testing.assert_allclose(image.data.astype(float), voxels, atol=rounding, err_msg=name)
    return found


def assert_reads_boxes(image: zp.Image, rng: np.random.Generator, ties: float) -> None:
    """A random box has the voxels that the whole image has there."""
    size = [int(rng.integers(1, n + 1)) for n in image.spatial_shape]
    first = [int(rng.integers(0, n - s + 1)) for n, s in zip(image.spatial_shape, size, strict=True)]
    [box] = image.read_group([zp.PatchLocation(tuple(first), tuple(size))])
    slices = (slice(None), *(slice(f, f + s) for f, s in zip(first, size, strict=True)))
    assert np.mean(box != image.data[slices]) <= ties, image
