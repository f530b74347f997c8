"""A blend takes in patches and hands on final voxels; a batch is checked as a whole before it is added."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from zpatch.errors import ModelError
from zpatch.geometry.boxes import PatchLocation, Triple


class Blend(Protocol):
    """Blends patches into the final voxels of one output."""

    @property
    def channels(self) -> int | None:
        """How many channels the first patch had; None before it arrived."""

    def size_of(self, location: PatchLocation) -> Triple:
        """Extent of a patch in the output."""

    def add(self, patch: torch.Tensor, location: PatchLocation) -> None:
        """Take in a patch (C, I, J, K)."""

    def check_complete(self) -> None:
        """Raise IncompleteCoverageError where patches are missing, which may still be added then."""

    def finish(self) -> None:
        """Check that all is complete, and hand on the voxels that are left."""

    def close(self) -> None:
        """Free what is held."""


def accumulation_dtype(dtype: torch.dtype, mode: str) -> torch.dtype:
    """The type in which patches of a type are summed: float32 or wider; integers stay exact in crop mode.

    >>> accumulation_dtype(torch.float16, "hann"), accumulation_dtype(torch.int64, "crop")
    (torch.float32, torch.int64)
    """
    if dtype.is_floating_point or dtype.is_complex:
        return torch.promote_types(dtype, torch.float32)
    if mode == "crop":
        return torch.uint8 if dtype == torch.bool else dtype
    return torch.float32


def add_batch(blend: Blend, batch: torch.Tensor, locations: Sequence[PatchLocation]) -> None:
    """Add a batch (B, C, I, J, K) after checking its length, its channels and the shapes of its patches."""
    if not isinstance(batch, torch.Tensor) or batch.ndim != 5:
        got = tuple(batch.shape) if isinstance(batch, torch.Tensor) else type(batch).__name__
        raise ModelError(f"a batch must be a tensor (B, C, I, J, K), not {got}")
    if len(batch) != len(locations):
        raise ModelError(f"a batch of {len(batch)} patches has {len(locations)} locations")
    if blend.channels not in (None, batch.shape[1]):
        raise ModelError(f"a batch has {batch.shape[1]} channels where earlier batches had {blend.channels}")
    for patch, location in zip(batch.detach(), locations, strict=True):
        blend.add(_fitted(patch, blend.size_of(location), location), location)


def _fitted(patch: torch.Tensor, size: Triple, location: PatchLocation) -> torch.Tensor:
    """The patch at exactly its size in the output, which rounding may make one voxel more or less."""
    got = tuple(patch.shape[1:])
    if got == size:
        return patch
    if size == location.size or any(abs(a - b) > 1 for a, b in zip(got, size, strict=True)):
        raise ModelError(
            f"the patch at {location.index} is {got} where the output has room for {size}; "
            f"the network must keep the patch's shape, or output_shape= must say how it scales"
        )
    for axis, length in enumerate(size, start=1):
        nearest = torch.arange(length, device=patch.device).clamp(max=patch.shape[axis] - 1)
        patch = patch.index_select(axis, nearest)
    return patch
