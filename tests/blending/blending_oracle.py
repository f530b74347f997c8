"""What several tests of blending share: windows straight from their formulas, and a sink of an image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from zpatch.blending.sinks import ImageSink
from zpatch.geometry.boxes import Triple
from zpatch.store.staged_image import StagedImage


def window(mode: str, p: int) -> NDArray[np.float64]:
    """The weights of a patch of ``p`` voxels on one axis, before they are normalised."""
    n = np.arange(p)
    if mode == "hann":
        return np.sin(np.pi * (n + 1) / (p + 1)) ** 2
    if mode == "gaussian":
        return np.exp(-0.5 * ((n - (p - 1) / 2) / (p / 8)) ** 2)
    return np.ones(p)


def image_sink(folder: Path, shape: Triple) -> ImageSink:
    """A sink of the image 'out' of a shape (I, J, K), which is written to a folder."""
    return ImageSink(
        StagedImage(folder),
        folder,
        subject="ann",
        name="out",
        kind="scalar",
        spatial_shape=shape,
        affine=np.eye(4),
    )
