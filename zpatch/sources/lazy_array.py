"""Arrays of other libraries that read what is sliced: datasets of h5py, arrays of tensorstore and zarr."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from zpatch.errors import DamageError, one_line
from zpatch.geometry.boxes import Voxels

# Those that zarr raises for metadata and chunks that it cannot read.
ZARR_ERRORS = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError),
    *(ArithmeticError, AssertionError, RuntimeError),  # chunks of 0 voxels, JSON that is too deep
)


class LazyArray:
    """An array (C, I, J, K) that reads what is sliced, over an object of another library that does so.

    ``data`` has a ``shape`` and a ``dtype``, and is sliced as an array of numpy: a dataset of h5py, an array
    of tensorstore. It may have three axes, and ``chunks``.
    """

    def __init__(self, data: Any) -> None:
        self.data = data
        shape = tuple(map(int, data.shape))
        self.shape = (1,) * (4 - len(shape)) + shape
        self.dtype = np.dtype(getattr(data.dtype, "numpy_dtype", data.dtype))
        chunks = getattr(data, "chunks", None)
        has_chunks = (
            isinstance(chunks, tuple)
            and len(chunks) == len(shape)
            and all(isinstance(n, int) for n in chunks)
        )
        self.chunk_shape = tuple(chunks[-3:]) if has_chunks and chunks is not None else None

    @property
    def file(self) -> Path | None:
        """The file of a dataset of h5py; None for other arrays."""
        name = getattr(getattr(self.data, "file", None), "filename", None)
        return Path(name).absolute() if isinstance(name, str) and os.path.isfile(name) else None

    @property
    def place(self) -> str:
        """Where in its file a dataset of h5py is."""
        return str(getattr(self.data, "name", ""))

    def __getitem__(self, key: tuple[slice, ...]) -> Voxels:
        read = np.asarray(self.data[key[4 - len(self.data.shape) :]])
        return read.reshape((1,) * (4 - read.ndim) + read.shape)


class CheckedZarr:
    """An array of zarr as dask slices it; what zarr cannot read is a DamageError that names the ``place``."""

    def __init__(self, zarr_array: Any, place: str) -> None:
        self.zarr_array = zarr_array
        self.place = place
        self.shape: tuple[int, ...] = zarr_array.shape
        self.ndim = len(self.shape)
        self.dtype: np.dtype[Any] = zarr_array.dtype

    def __getitem__(self, key: Any) -> Voxels:
        try:
            return np.asarray(self.zarr_array[key])
        except ZARR_ERRORS as error:
            raise DamageError(
                f"damaged: {self.place}: zarr cannot read it ({one_line(error)}); restore it from a copy"
            ) from error


def is_lazy(data: Any) -> bool:
    """Whether an object of another library is an array that numpy would have to load whole."""
    libraries = {cls.__module__.partition(".")[0] for cls in type(data).__mro__}
    is_in_memory = {"numpy", "torch"} & libraries or hasattr(data, "__array_interface__")
    return not is_in_memory and all(hasattr(data, name) for name in ("shape", "dtype", "__getitem__"))
