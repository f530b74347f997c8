"""The order of axes that a network expects: volumes are (I, J, K), networks are fed any order of x, y, z."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from zpatch.errors import ModelError, OptionError
from zpatch.geometry.boxes import Triple, Voxels
from zpatch.runtime import buffer_pool

XYZ = "xyz"
MODEL_AXES = tuple("".join(order) for n in (3, 2) for order in itertools.permutations(XYZ, n))


@dataclass(frozen=True, slots=True)
class ModelAxes:
    """The spatial axes of a network's batches: ``letters`` are x, y, z (which are I, J, K) in its order.

    A network that was trained on (z, y, x) arrays has ``zyx``. With two letters it is two-dimensional, its
    batches are (B, C, H, W), and patches have one voxel along the axis that is left out.

    >>> axes = ModelAxes("yx")
    >>> fed = axes.fed(torch.ones(2, 3, 64, 48, 1))
    >>> fed.shape, fed.is_contiguous(), axes.placed(fed).shape
    (torch.Size([2, 3, 48, 64]), True, torch.Size([2, 3, 64, 48, 1]))
    """

    letters: str = XYZ

    def __post_init__(self) -> None:
        if self.letters not in MODEL_AXES:
            raise OptionError(
                f"model_axes must have x, y and z in the order of the network's batches, as 'zyx', or two of "
                f"them for a 2-D network, as 'yx'; not {self.letters!r}",
                option="model_axes",
            )

    def __str__(self) -> str:
        return f"(B, C, {', '.join(self.letters)})"

    @property
    def is_default(self) -> bool:
        """Whether batches are (B, C, I, J, K)."""
        return self == DEFAULT_AXES

    @property
    def notice(self) -> str:
        """One line that says what the network is fed, before it runs; the command line shows its own flag.

        >>> print(ModelAxes("zyx").notice)
        the network is fed (z, y, x): batches (B, C, z, y, x); choose other axes by model_axes=
        """
        axes = ", ".join(self.letters)
        return f"the network is fed ({axes}): batches {self}; choose other axes by model_axes="

    def check_patch_size(self, patch_size: Triple) -> None:
        """Refuse patches of several voxels along the axis that a 2-D network does not have."""
        for axis, letter in enumerate(XYZ):
            if letter not in self.letters and patch_size[axis] != 1:
                thin = tuple(1 if a == axis else p for a, p in enumerate(patch_size))
                raise OptionError(
                    f"model_axes={self.letters!r} leaves out {letter}, along which patches have "
                    f"{patch_size[axis]} voxels; give a patch size of 1 there, as "
                    f"{','.join(map(str, thin))}, or name all three axes for a 3-D network",
                    option="model_axes",
                )

    def new_batch(self, patches: int, channels: int, patch_size: Triple) -> Voxels:
        """Memory for a batch of float32: (B, C, I, J, K), contiguous as the network is fed it."""
        shape = (patches, channels, *(patch_size[axis] for axis in self._order))
        return buffer_pool.empty(shape, np.float32).transpose(0, 1, *(2 + axis for axis in self._places))

    def fed(self, batch: torch.Tensor) -> torch.Tensor:
        """A batch (B, C, I, J, K) in the network's order, contiguous; copied only where it is not."""
        ordered = batch.permute(0, 1, *(2 + axis for axis in self._order))
        return ordered.reshape(ordered.shape[: 2 + len(self.letters)]).contiguous()

    def placed(self, output: Any) -> torch.Tensor:
        """An output in the network's order as (B, C, I, J, K); a view. Raises ModelError if it is none."""
        if not isinstance(output, torch.Tensor) or output.ndim != 2 + len(self.letters):
            got = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
            raise ModelError(f"the model must give a tensor {self} for a batch, not {got}")
        full = output if len(self.letters) == 3 else output.unsqueeze(-1)
        return full.permute(0, 1, *(2 + axis for axis in self._places))

    def described(self, batch: torch.Tensor) -> str:
        """The shape in which the network is fed a batch (B, C, I, J, K), for people."""
        patches, channels, *extents = batch.shape
        fed = (patches, channels, *(extents[XYZ.index(letter)] for letter in self.letters))
        return f"{fed}" if self.is_default else f"{fed} as {self}"

    def advice(self, batch: torch.Tensor) -> str:
        """What to try, after an error, where patches are flat and the network may be two-dimensional."""
        flat = [letter for letter, extent in zip(XYZ, batch.shape[2:], strict=True) if extent == 1]
        if len(self.letters) == 2 or len(flat) != 1:
            return ""
        return f"; for a 2-D network say model_axes={XYZ[::-1].replace(flat[0], '')!r}"

    @property
    def _order(self) -> list[int]:
        """The axes of (I, J, K) in the network's order; one that is left out is the last."""
        return [XYZ.index(letter) for letter in self.letters + "".join(set(XYZ) - set(self.letters))]

    @property
    def _places(self) -> list[int]:
        """For each axis of (I, J, K), its place in the network's order."""
        return [self._order.index(axis) for axis in range(3)]


DEFAULT_AXES = ModelAxes()
