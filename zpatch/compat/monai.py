"""zpatch images in MONAI's pipelines: whole ones by ``LoadImage``, patches by ``GridPatchDataset``.

::

    files = datalist(zp.Cohort("cohort.zarr"))                       # [{"t1": "cohort.zarr/sub-01/t1", ...}]
    load = LoadImaged(["t1", "seg"], reader=ZpatchReader)
    dense = GridPatchDataset(files, ZpatchPatchIterd(["t1"], patch_size=96), with_coordinates=True)

For random patches a queue is faster than MONAI's crops of whole volumes: ``zp.Queue(...,
transform=from_monai(...))``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zpatch.compat.transforms import meta_tensor, monai_library
from zpatch.errors import OptionError
from zpatch.geometry.affines import crop_affine
from zpatch.geometry.boxes import PatchLocation, triple
from zpatch.images.image import Image
from zpatch.images.subject import Subject
from zpatch.sampling.grid_sampler import GridSampler
from zpatch.sampling.patch_sampler import PatchSize
from zpatch.sources.group_read import read_group

FilePath = str | os.PathLike[str]


def datalist(subjects: Sequence[Subject]) -> list[dict[str, str]]:
    """A data list of MONAI: a dictionary for each subject, from the names of its images to their paths.

    An image that is in no store is an OptionError.

    >>> datalist([])
    []
    """
    paths = []
    for subject in subjects:
        pathless = [name for name, image in subject.images.items() if image.folder is None]
        if pathless:
            raise OptionError(
                f"{', '.join(pathless)} of subject {subject.name!r} is in no store and has no path; "
                f"list the subjects of a cohort as they are stored"
            )
        paths.append({name: str(image.folder) for name, image in subject.images.items()})
    return paths


class ZpatchReader:
    """An ImageReader of MONAI for images in a store, as ``"cohort.zarr/sub-01/t1"``, and of OME-Zarr.

    Pass it as ``reader`` to LoadImage or LoadImaged, as a class or by its dotted name. ``read`` opens an
    image, and ``get_data`` reads it: all of it, or the box of ``size`` voxels (I, J, K) whose first voxel is
    ``location``. As MONAI's NIfTI reader, it gives (I, J, K) if there is one channel, else (C, I, J, K).
    Images that are read together become the channels of one image.

    >>> import tempfile
    >>> import zarr
    >>> reader = ZpatchReader()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     array = zarr.create_array(f"{folder}/t1.zarr", data=np.zeros((4, 5, 6)), dimension_names="zyx")
    ...     voxels, metadata = reader.get_data(reader.read(f"{folder}/t1.zarr"))
    >>> voxels.shape
    (6, 5, 4)
    """

    def __init__(self) -> None:
        monai_library().data.ImageReader.register(type(self))

    def verify_suffix(self, filename: FilePath | Sequence[FilePath]) -> bool:
        """Whether the file names are all paths in a Zarr store."""
        return all(any(part.endswith(".zarr") for part in Path(name).parts) for name in _listed(filename))

    def read(self, data: FilePath | Sequence[FilePath]) -> Image | list[Image]:
        """The images of some paths, opened; no voxels are read."""
        images = [Image(name) for name in _listed(data)]
        return images[0] if len(images) == 1 else images

    def get_data(
        self,
        img: Image | Sequence[Image],
        location: Sequence[int] | None = None,
        size: int | Sequence[int] | None = None,
    ) -> tuple[NDArray[Any], dict[str, Any]]:
        """Values, and the metadata of a MetaTensor: affine, spatial shape, space, channel dimension."""
        images = [img] if isinstance(img, Image) else list(img)
        _check_alike(images)
        index = triple((0, 0, 0) if location is None else location, "location")
        i, j, k = (n - start for n, start in zip(images[0].spatial_shape, index, strict=True))
        box = PatchLocation(index, (i, j, k) if size is None else triple(size, "size"))
        voxels = np.concatenate([found for [found] in read_group(images, [box])])
        affine = crop_affine(images[0].affine, index)
        meta = {
            "affine": affine,
            "original_affine": affine.copy(),
            "spatial_shape": np.array(box.size),
            "space": "RAS",
            "original_channel_dim": 0 if len(voxels) > 1 else float("nan"),
            "location": np.array(index),
        }
        return (voxels if len(voxels) > 1 else voxels[0]), meta


class ZpatchPatchIterd:
    """A ``patch_iter`` of GridPatchDataset, as MONAI's PatchIterd, that reads each patch from disk.

    The ``keys`` of an item are paths in a store, or zpatch images; its other entries are passed on unchanged.
    It yields dictionaries of MetaTensors (C, I, J, K), and coordinates ``[[0, C], [i, i + p], ...]``, which
    are in the dictionary too, as ``patch_coords``. The grid is that of GridSampler.

    >>> from zpatch.images.image import ScalarImage
    >>> patches = ZpatchPatchIterd(["t1"], patch_size=4)({"t1": ScalarImage(np.zeros((8, 4, 4)))})
    >>> [patch["t1"].shape for patch, coordinates in patches]
    [torch.Size([1, 4, 4, 4]), torch.Size([1, 4, 4, 4])]
    """

    def __init__(
        self,
        keys: str | Sequence[str],
        patch_size: PatchSize,
        patch_overlap: PatchSize = 0,
        padding_mode: str | None = None,
        fill: float = 0,
    ) -> None:
        self.keys = [keys] if isinstance(keys, str) else list(keys)
        self.grid = GridSampler(None, patch_size, patch_overlap, padding_mode, fill)

    def __call__(self, data: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], NDArray[np.int64]]]:
        """The patches of an item."""
        opened = {key: value if isinstance(value := data[key], Image) else Image(value) for key in self.keys}
        subject = Subject.of(opened)
        others = {key: value for key, value in data.items() if key not in opened}
        for patch in self.grid(subject):
            images = {key: meta_tensor(image) for key, image in patch.images.items()}
            box = zip(patch.location.index_ini, patch.location.index_fin, strict=True)
            coordinates = np.array([(0, len(images[self.keys[0]])), *box])
            shape = np.array(subject.spatial_shape)
            yield (
                {**others, **images, "patch_coords": coordinates, "original_spatial_shape": shape},
                coordinates,
            )


def _listed(names: FilePath | Sequence[FilePath]) -> list[FilePath]:
    return [names] if isinstance(names, str | os.PathLike) else list(names)


def _check_alike(images: Sequence[Image]) -> None:
    """Refuse to make channels of images on different grids."""
    first = images[0]
    for image in images[1:]:
        if image.spatial_shape != first.spatial_shape or not np.allclose(image.affine, first.affine):
            raise OptionError(
                f"{image!r} and {first!r} differ in shape or affine; read only images on one grid together, "
                f"as channels of one"
            )
