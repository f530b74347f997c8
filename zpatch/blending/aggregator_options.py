"""What a user may choose of an aggregator, checked before anything is blended."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import torch

from zpatch.blending.reduction import STORED_AS, Reduction, Reductions, check_known, check_reduction
from zpatch.errors import OptionError, StoreExistsError, UnknownNameError
from zpatch.geometry.boxes import Triple, patch_overlap_triple, triple
from zpatch.runtime.byte_sizes import parse_bytes
from zpatch.sampling.grid_sampler import GridSampler
from zpatch.tiling.windows import check_overlap_mode

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class HeadOptions:
    """The options of one output of a network.

    Attributes:
        shape: The shape of the output along I, J, K.
        reduce: What is applied to final voxels.
        dtype: The type they are kept in, or None for that which ``reduce`` gives.
        fill: The value of voxels that no patch covers, or None where such a voxel is an error.
    """

    shape: Triple
    reduce: Reduction
    dtype: torch.dtype | None
    fill: float | None


@dataclass(frozen=True, slots=True, eq=False)
class AggregatorOptions:
    """The options of ``PatchAggregator``, which documents them; options of outputs may be dicts by key."""

    spatial_shape: Triple
    overlap_mode: str
    patch_overlap: Triple
    output_shape: Triple | Mapping[str, Triple]
    grid: GridSampler | None
    output: Path | None
    reduce: Reductions
    dtype: torch.dtype | Mapping[str, torch.dtype | None] | None
    fill: float | Mapping[str, float | None] | None
    max_bytes: int | None

    @classmethod
    def of(
        cls,
        spatial_shape: int | Sequence[int],
        *,
        patch_overlap: int | Sequence[int],
        output_shape: int | Sequence[int] | Mapping[str, int | Sequence[int]] | None,
        output: str | os.PathLike[str] | None,
        max_memory: int | str | None,
        **options: Any,
    ) -> Self:
        """Options in the forms that ``PatchAggregator`` takes them in."""
        shape = _extent(spatial_shape, "spatial_shape")
        return cls(
            spatial_shape=shape,
            patch_overlap=patch_overlap_triple(patch_overlap, (sys.maxsize,) * 3),
            output_shape=shape
            if output_shape is None
            else _each(output_shape, lambda value: _extent(value, "output_shape")),
            output=None if output is None else Path(output).absolute(),
            max_bytes=None if max_memory is None else parse_bytes(max_memory),
            **options,
        )

    def __post_init__(self) -> None:
        check_overlap_mode(self.overlap_mode)
        _each(self.reduce, check_reduction)
        _each(self.dtype, self._check_dtype)
        if self.max_bytes is not None and self.max_bytes < 0:
            raise OptionError(f"max_memory must be at least 0 bytes, not {self.max_bytes}")
        if self.grid is not None:
            self._check_grid(self.grid)
        if self.output is not None and self.output.exists():
            raise StoreExistsError(f"{self.output}: it exists already; choose another name")

    def _check_dtype(self, dtype: Any) -> None:
        if not isinstance(dtype, torch.dtype | None):
            raise OptionError(f"dtype must be one of torch's, such as torch.float32, not {dtype!r}")
        if self.output is not None and dtype in STORED_AS:
            raise OptionError(f"an image on disk cannot be of {dtype}; choose {STORED_AS[dtype]}")

    def _check_grid(self, sampler: GridSampler) -> None:
        grid = sampler.grid
        if grid.spatial_shape != self.spatial_shape:
            raise OptionError(
                f"the grid is over a volume of {grid.spatial_shape}, not of {self.spatial_shape}"
            )
        if self.patch_overlap not in ((0, 0, 0), grid.patch_overlap):
            raise OptionError(
                f"patch_overlap is {self.patch_overlap} where the grid's is {grid.patch_overlap}; "
                f"leave it out"
            )
        if self.fill is not None:
            raise OptionError("fill is for arbitrary locations: every patch of a grid must be added")

    def check_keys(self, keys: Collection[str | None]) -> None:
        """Raise OptionError if an option that is a dict names an output that the batches do not have."""
        if None not in keys:
            for option in ("output_shape", "reduce", "dtype", "fill"):
                if isinstance(given := getattr(self, option), Mapping):
                    check_known(given, [str(key) for key in keys], option)

    def of_head(self, key: str | None) -> HeadOptions:
        """The options of the output of a key; None where batches are tensors."""
        return HeadOptions(
            shape=_for_key(self.output_shape, key, "output_shape"),
            reduce=_for_key(self.reduce, key, "reduce"),
            dtype=_for_key(self.dtype, key, "dtype"),
            fill=_for_key(self.fill, key, "fill"),
        )


def _extent(value: int | Sequence[int], name: str) -> Triple:
    shape = triple(value, name)
    if min(shape) < 1:
        raise OptionError(f"{name} must be at least 1 voxel on every axis, not {value!r}")
    return shape


def _each(value: Any, function: Callable[[Any], T]) -> T | dict[str, T]:
    """A function of an option, or of its value for each key."""
    if isinstance(value, Mapping):
        return {key: function(one) for key, one in value.items()}
    return function(value)


def _for_key(value: T | Mapping[str, T], key: str | None, option: str) -> T:
    """The value of an option for a key of the batches."""
    if not isinstance(value, Mapping):
        return value
    if key is None or key not in value:
        raise UnknownNameError.among("output", key, value, option)
    return value[key]
