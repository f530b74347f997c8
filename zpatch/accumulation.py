"""Blending patches into voxels: over a known grid, tile by tile; at any locations, with weights beside.

Over a grid, weights are normalised beforehand, so an accumulator holds the answer as soon as its last patch
has come. The volume is cut into tiles that become final at once; a tile is made when its first patch arrives
and gone when it is final, so that memory is that of the front and not of the volume. Where only one patch
covers a tile there is nothing to accumulate: its voxels go straight through.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from zpatch import blending
from zpatch.errors import IncompleteCoverageError, ModelError
from zpatch.geometry import PatchLocation, Triple
from zpatch.grid import AxisTiles, PatchGrid
from zpatch.volume_sink import VolumeSink

SLAB_VOXELS = 32

Finalise = Callable[[torch.Tensor], torch.Tensor]


def accumulation_dtype(dtype: torch.dtype, mode: str) -> torch.dtype:
    """What patches of a type are summed in: float32 or wider; integers stay exact in crop mode."""
    if dtype.is_floating_point or dtype.is_complex:
        return torch.promote_types(dtype, torch.float32)
    if mode == "crop":
        return torch.uint8 if dtype == torch.bool else dtype
    return torch.float32


class SweptBlend:
    """Blends the patches of a grid, in any order, and hands each tile on as soon as it is final."""

    def __init__(
        self,
        grid: PatchGrid,
        mode: str,
        sink: VolumeSink,
        finalise: Finalise,
        *,
        output_shape: Triple | None = None,
    ) -> None:
        blending.check_overlap_mode(mode)
        lengths = output_shape or grid.spatial_shape
        axes = zip(grid.starts, grid.patch_size, grid.patch_overlap, grid.spatial_shape, lengths, strict=True)
        self._axes = [AxisTiles.cut(mode, s, p, o, n, output_length=m) for s, p, o, n, m in axes]
        self._weights = [[torch.from_numpy(w) for w in axis.weights] for axis in self._axes]
        self._grid = grid
        self._mode = mode
        self._sink = sink
        self._finalise = finalise
        self._seen = np.zeros(grid.counts, dtype=bool)
        self.channels: int | None = None
        self._tiles: dict[Triple, tuple[torch.Tensor, int]] = {}

    def size_of(self, location: PatchLocation) -> Triple:
        """Extent of a patch in the output."""
        position = self._grid.position_of(location)
        i, j, k = (int(a.stops[n] - a.starts[n]) for a, n in zip(self._axes, position, strict=True))
        return i, j, k

    def add(self, patch: torch.Tensor, location: PatchLocation) -> None:
        """Take in a patch (C, I, J, K) of the grid."""
        position = self._grid.position_of(location)
        if self._seen[position]:
            raise IncompleteCoverageError(f"the patch at {location.index} came twice")
        self._seen[position] = True
        patch = patch.to(accumulation_dtype(patch.dtype, self._mode))
        hit = (range(a.first_tile[n], a.stop_tile[n]) for a, n in zip(self._axes, position, strict=True))
        for i, j, k in itertools.product(*hit):
            self._add_to_tile((i, j, k), patch, position)

    def _add_to_tile(self, tile: Triple, patch: torch.Tensor, position: Triple) -> None:
        axes = list(zip(self._axes, tile, position, strict=True))
        edges = [(int(a.edges[t]), int(a.edges[t + 1])) for a, t, _ in axes]
        low = [max(e, int(a.first[n])) for (e, _), (a, _, n) in zip(edges, axes, strict=True)]
        high = [min(e, int(a.stop[n])) for (_, e), (a, _, n) in zip(edges, axes, strict=True)]
        part = patch[:, *_span(low, high, [int(a.starts[n]) for a, _, n in axes])]
        awaited = math.prod(int(a.awaited[t]) for a, t, _ in axes)
        if awaited > 1:
            tensor, left = self._tiles.pop(tile, (None, awaited))
            if tensor is None:
                tensor = patch.new_zeros((len(patch), *(b - a for a, b in edges)))
            target = tensor[:, *_span(low, high, [a for a, _ in edges])]
            weight = self._weight(axes, low, high)
            target.add_(part) if weight is None else target.addcmul_(part, weight)
            if left > 1:
                self._tiles[tile] = tensor, left - 1
                return
            part = tensor
        (i, _), (j, _), (k, _) = edges
        self._sink.put((i, j, k), self._finalise(part))

    def _weight(
        self, axes: list[tuple[AxisTiles, int, int]], low: list[int], high: list[int]
    ) -> torch.Tensor | None:
        """The product of the axes' weights; None where all are 1."""
        product: torch.Tensor | None = None
        if self._mode == "crop":
            return None
        for axis, (tiles, tile, n) in enumerate(axes):
            if tiles.awaited[tile] > 1:
                offset = int(tiles.first[n])
                weights = self._weights[axis][n][low[axis] - offset : high[axis] - offset]
                weights = weights.reshape([-1 if axis == other else 1 for other in range(3)])
                product = weights if product is None else product * weights
        return product

    def finish(self) -> None:
        """Make sure that every patch came."""
        if self._seen.all():
            return
        i, j, k = (int(n) for n in np.unravel_index(self._seen.argmin(), self._seen.shape))
        missing = self._grid.at((i, j, k))
        raise IncompleteCoverageError(
            f"{int((~self._seen).sum())} of {self._seen.size} patches are missing, the first one from "
            f"{missing.index_ini} to {missing.index_fin}; add every patch of the grid once"
        )


class LooseBlend:
    """Blends patches at any locations: weights are summed beside the voxels, and divided out at the end."""

    def __init__(
        self,
        spatial_shape: Triple,
        mode: str,
        patch_overlap: Triple,
        sink: VolumeSink,
        finalise: Finalise,
        *,
        output_shape: Triple | None = None,
        fill: float | None = None,
    ) -> None:
        blending.check_overlap_mode(mode)
        self._shape = output_shape or spatial_shape
        self._factors = [m / n for m, n in zip(self._shape, spatial_shape, strict=True)]
        self._overlap = [int(o * f) for o, f in zip(patch_overlap, self._factors, strict=True)]
        self._mode = mode
        self._sink = sink
        self._finalise = finalise
        self._fill = fill
        self._sums: torch.Tensor | None = None
        self._weights = torch.zeros(self._shape)
        self.channels: int | None = None

    def size_of(self, location: PatchLocation) -> Triple:
        """Extent of a patch in the output."""
        return location.scaled(self._factors).size

    def add(self, patch: torch.Tensor, location: PatchLocation) -> None:
        """Take in a patch (C, I, J, K)."""
        if self._sums is None:
            dtype = accumulation_dtype(patch.dtype, self._mode)
            self._sums = torch.zeros((len(patch), *self._shape), dtype=dtype)
        box = location.scaled(self._factors)
        low, high = list(box.clipped(self._shape).index_ini), list(box.clipped(self._shape).index_fin)
        if self._mode == "crop":
            spans = zip(box.index_ini, box.index_fin, self._overlap, self._shape, strict=True)
            kept = [blending.kept_by_crop(a, b, o, 0, n) for a, b, o, n in spans]
            low = [max(a, b) for a, (b, _) in zip(low, kept, strict=True)]
            high = [min(a, b) for a, (_, b) in zip(high, kept, strict=True)]
        if any(a >= b for a, b in zip(low, high, strict=True)):
            return
        part = patch[:, *_span(low, high, box.index)].to(self._sums.dtype)
        here = _span(low, high, (0, 0, 0))
        if self._mode == "crop":
            self._sums[:, *here] = part
            self._weights[here] = 1
            return
        window = self._window(box.size)[_span(low, high, box.index)]
        self._sums[:, *here].addcmul_(part, window.to(self._sums.dtype))
        self._weights[here] += window

    def _window(self, size: Triple) -> torch.Tensor:
        i, j, k = (torch.from_numpy(blending.window(self._mode, n)).float() for n in size)
        return i[:, None, None] * j[:, None] * k

    def finish(self) -> None:
        """Divide by the weights and hand everything on."""
        missing = (self._weights == 0).numpy()
        if self._sums is None or (self._fill is None and missing.any()):
            first = _first_box(missing)
            raise IncompleteCoverageError(
                f"no patch covers {int(missing.sum())} voxels, the first ones from {first.index_ini} to "
                f"{first.index_fin}; add the patches that do, or say fill="
            )
        for start in range(0, self._shape[0], SLAB_VOXELS):
            slab = slice(start, start + SLAB_VOXELS)
            voxels = self._sums[:, slab]
            if self._mode != "crop":
                voxels = voxels / self._weights[slab].clamp(min=torch.finfo(torch.float32).tiny)
            final = self._finalise(voxels)
            if self._fill is not None:
                final[:, torch.from_numpy(missing[slab])] = self._fill
            self._sink.put((start, 0, 0), final)


def _span(low: Sequence[int], high: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True))


def _first_box(missing: NDArray[Any]) -> PatchLocation:
    """A box of missing voxels about the first one, grown along K, then J, then I."""
    i, j, k = (int(n) for n in np.unravel_index(missing.argmax(), missing.shape))
    r = _run(np.asarray(missing[i, j, k:]))
    q = _run(np.asarray(missing[i, j:, k : k + r].all(axis=1)))
    p = _run(np.asarray(missing[i:, j : j + q, k : k + r].all(axis=(1, 2))))
    return PatchLocation((i, j, k), (p, q, r))


def _run(line: NDArray[Any]) -> int:
    return len(line) if line.all() else int(line.argmin())


def add_checked(
    blend: SweptBlend | LooseBlend, batch: torch.Tensor, locations: Sequence[PatchLocation]
) -> None:
    """Add a batch once its length and the shapes of its patches fit the locations."""
    if not isinstance(batch, torch.Tensor) or batch.ndim != 5:
        got = tuple(batch.shape) if isinstance(batch, torch.Tensor) else type(batch).__name__
        raise ModelError(f"a batch must be a tensor (B, C, I, J, K), not {got}")
    if len(batch) != len(locations):
        raise ModelError(f"a batch of {len(batch)} patches came with {len(locations)} locations")
    batch = batch.detach().cpu()
    if blend.channels not in (None, batch.shape[1]):
        raise ModelError(f"a batch has {batch.shape[1]} channels where those before had {blend.channels}")
    blend.channels = batch.shape[1]
    for patch, location in zip(batch, locations, strict=True):
        size = blend.size_of(location)
        blend.add(_fitted(patch, size, location), location)


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
        patch = patch.index_select(axis, torch.arange(length).clamp(max=patch.shape[axis] - 1))
    return patch
