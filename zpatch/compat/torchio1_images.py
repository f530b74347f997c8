"""Images as TorchIO 0.18 to 1.x has them; ``torchio1`` describes all of its API."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from zpatch.compat.nifti_cache import cached_image, save_image
from zpatch.compat.transforms import torchio_library
from zpatch.errors import OptionError
from zpatch.geometry.orientation import axis_codes
from zpatch.images import image
from zpatch.sampling.patch import to_tensor

DATA, AFFINE, TYPE = "data", "affine", "type"
INTENSITY, LABEL, SAMPLING_MAP = "intensity", "label", "sampling_map"

TYPES = {"scalar": INTENSITY, "label": LABEL, "sampling": SAMPLING_MAP}


class Image(image.Image):
    """An image from a path, or from the voxels of a ``tensor`` (C, I, J, K) with an ``affine``.

    ``type`` is INTENSITY, LABEL or SAMPLING_MAP; ScalarImage and LabelMap imply it.
    """

    def __new__(cls, path: Any = None, type: str = INTENSITY, *_: Any, **__: Any) -> Any:  # noqa: A002, D102
        if cls is Image and type not in CLASSES:
            raise OptionError(f"type must be one of {', '.join(CLASSES)}, not {type!r}")
        return super().__new__(CLASSES[type] if cls is Image else cls)

    def __init__(
        self,
        path: Any = None,
        type: str | None = None,  # noqa: A002 - TorchIO's name
        tensor: Any = None,
        affine: Any = None,
        *,
        axes: str | None = None,
    ) -> None:
        if type not in (None, TYPES[self.kind]):
            raise OptionError(f"a {self.__class__.__name__} is not of type {type!r}")
        if (path is None) == (tensor is None):
            raise OptionError("an image is made of a path or of a tensor; give one of them")
        data = path if tensor is None else np.asarray(tensor)
        if isinstance(data, str) or hasattr(data, "__fspath__"):
            data = cached_image(data, self.kind)
        if isinstance(data, image.Image):
            data, affine = data.opened, data.affine if affine is None else affine
        super().__init__(data, affine=affine, axes=axes)

    whole: Callable[[], torch.Tensor] | None = None  # of a dataset whose transform acts on patches

    @property
    def data(self) -> Any:
        """The whole image as a tensor (C, I, J, K), after the transform of its dataset; for small volumes."""
        return to_tensor(super().data) if self.whole is None else self.whole()

    @property
    def origin(self) -> tuple[float, float, float]:
        """Where the centre of the first voxel is, (x, y, z) in mm."""
        x, y, z = self.affine[:3, 3].tolist()
        return x, y, z

    @property
    def orientation(self) -> tuple[str, str, str]:
        """Where the axes point, as ("R", "A", "S")."""
        codes = axis_codes(self.affine)
        return codes[0], codes[1], codes[2]

    def numpy(self) -> NDArray[Any]:
        """The whole image as an array (C, I, J, K)."""
        return np.asarray(self.data)

    def plot(self, **options: Any) -> Any:
        """Three planes of the whole image, drawn by the installed TorchIO and matplotlib."""
        classes = {"scalar": "ScalarImage", "label": "LabelMap", "sampling": "Image"}
        make = getattr(torchio_library(), classes[self.kind])
        return make(tensor=self.data, affine=self.affine).plot(**options)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the image to a NIfTI file."""
        save_image(path, super().data, self.affine)

    def __getitem__(self, key: str) -> Any:
        if key not in (DATA, AFFINE, TYPE):
            raise KeyError(key)
        return TYPES[self.kind] if key == TYPE else getattr(self, key)


class ScalarImage(Image, image.ScalarImage):
    """An image of intensities."""


class LabelMap(Image, image.LabelMap):
    """An image whose values are classes."""


class SamplingMap(Image, image.SamplingMap):
    """An image whose values are proportional to the probability of a voxel to be the centre of a patch."""


CLASSES: Mapping[str, type[Image]] = {INTENSITY: ScalarImage, LABEL: LabelMap, SAMPLING_MAP: SamplingMap}
