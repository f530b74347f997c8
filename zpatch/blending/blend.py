"""A blend takes in patches and hands on final voxels; a batch is checked as a whole before it is added."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from zpatch.errors import ModelError
from zpatch.geometry.boxes import PatchLocation, Triple

try:
    from zpatch.blending._blend import is_finite as _compiled
except ImportError:  # zpatch was installed without a compiler
    _compiled = None  # type: ignore[assignment]

Finalise = Callable[[torch.Tensor], torch.Tensor]


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


def not_finite(voxels: torch.Tensor) -> int:
    """How many voxels of (C, I, J, K) are NaN or infinite in any channel.

    One pass sees whether there are any: in the compiled loop, or as a sum, which is not finite then either.

    >>> not_finite(torch.tensor([[0.0, 1.0], [float("nan"), 2.0]]).reshape(2, 2, 1, 1))
    1
    """
    if not (voxels.is_floating_point() or voxels.is_complex()) or _are_finite(voxels):
        return 0
    return int((~voxels.isfinite()).any(dim=0).sum())


def _are_finite(voxels: torch.Tensor) -> bool:
    """Whether all voxels are finite; may be False too if their sum is too large for their type."""
    if _compiled is not None and voxels.dtype == torch.float32 and voxels.device.type == "cpu":
        return _compiled(voxels.numpy())
    return bool(voxels.sum().isfinite())


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
