"""How outputs are cut into shards, and shards into regions, to share the work or to fit a memory limit.

More regions than tasks ask for are made only to fit a memory limit: shards get smaller, and bands of them
are filled one after the other, at the price of running the patches between two bands for both.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zpatch.blending.reduction import kind_of
from zpatch.blending.sinks import output_record
from zpatch.chunks.layout import SHARD_BYTES, Layout, plan_output_layout
from zpatch.chunks.levels import plan_levels
from zpatch.errors import PatchSizeError
from zpatch.geometry.affines import resized_affine
from zpatch.geometry.boxes import Triple
from zpatch.geometry.patch_grid import PatchGrid
from zpatch.geometry.voxel_grid import VoxelGrid
from zpatch.images.image import Image
from zpatch.planning.model_inputs import ModelInputs
from zpatch.planning.prediction_options import PredictOptions
from zpatch.planning.prediction_plan import Head, PlannedHead, Ranges, Region
from zpatch.records.image_record import ImageRecord
from zpatch.sources.voxel_sources import ArraySource
from zpatch.tiling.output_cells import OutputGrid
from zpatch.tiling.volume_tiles import Tiling

SMALLEST_SHARD_BYTES = 2**16

Shards = Mapping[str, tuple[int, ...]]  # the stored shape of an output's shards, by its name
NOT_BEGUN: Shards = MappingProxyType({})


def grid_over(spatial_shape: Triple, options: PredictOptions) -> PatchGrid:
    """The patches of a volume; a volume smaller than the patch is padded to its size."""
    for axis, (length, size) in enumerate(zip(spatial_shape, options.patch_size, strict=True)):
        if length == 1 < size:
            flat = [1 if n == 1 else p for n, p in zip(spatial_shape, options.patch_size, strict=True)]
            raise PatchSizeError(
                f"the image is one plane along {'IJK'[axis]}, so a patch of {size} would be padding; "
                f"use a patch_size of {','.join(map(str, flat))}"
            )
    return PatchGrid.over(
        spatial_shape, options.patch_size, options.patch_overlap, border=options.pads_border
    )


def planned_heads(
    inputs: ModelInputs, heads: Sequence[Head], grid: PatchGrid, options: PredictOptions, begun: Shards
) -> Iterator[tuple[PlannedHead, ...]]:
    """The outputs for one subject in ever smaller shards; only as ``begun``, if that has all outputs."""
    swept_axis = max(range(3), key=lambda axis: (grid.spatial_shape[axis], axis))
    volumes = [_volume(head, inputs, grid, options, swept_axis) for head in heads]
    for layouts in _layouts(volumes, begun):
        yield tuple(
            PlannedHead(
                volume.head,
                _record(volume, layout, inputs, options),
                _tiling(volume, layout, grid, options, swept_axis),
            )
            for volume, layout in zip(volumes, layouts, strict=True)
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Volume:
    """An output for one subject, before it is cut into shards.

    ``blended`` is the shape of the volume that patches are blended into, ``grid`` that of the output, which
    is resampled from it to ``output`` unless that is None. ``swept_axis`` is that of the output.
    """

    head: Head
    blended: Triple
    grid: VoxelGrid
    output: OutputGrid | None
    swept_axis: int


def _volume(
    head: Head, inputs: ModelInputs, grid: PatchGrid, options: PredictOptions, swept_axis: int
) -> _Volume:
    model, native = inputs.images[0].grid, inputs.native.grid
    shape = head.shape_for(grid.spatial_shape, grid.patch_size)
    blended = VoxelGrid(shape, resized_affine(model.affine, grid.spatial_shape, shape))
    if not options.returns or blended.is_same(native):
        return _Volume(head, shape, blended, None, swept_axis)
    output = OutputGrid(native.shape, blended.matrix_from(native), "linear" if head.is_float else "nearest")
    return _Volume(head, shape, native, output, output.axes[swept_axis])


def _layouts(volumes: Sequence[_Volume], begun: Shards) -> Iterator[list[Layout]]:
    """How the outputs may be stored: as they were begun, or else in ever smaller shards."""
    layouts = _layouts_of(volumes, SHARD_BYTES)
    heads = [volume.head for volume in volumes]
    pairs = list(zip(layouts, heads, strict=True))
    if all(head.name in begun and _can_have(layout, begun[head.name]) for layout, head in pairs):
        yield [Layout(layout.chunks, _with_channels(begun[head.name])) for layout, head in pairs]
        return
    shard_bytes = SHARD_BYTES
    while shard_bytes >= SMALLEST_SHARD_BYTES:
        yield _layouts_of(volumes, shard_bytes)
        shard_bytes //= 4


def _layouts_of(volumes: Sequence[_Volume], shard_bytes: int) -> list[Layout]:
    layouts = []
    for volume in volumes:
        i, j, k = volume.grid.shape
        itemsize, swept = np.dtype(volume.head.kept_dtype).itemsize, 2 - volume.swept_axis
        shape = volume.head.kept_channels, k, j, i
        layouts.append(plan_output_layout(shape, itemsize, swept_axis=swept, shard_bytes=shard_bytes))
    return layouts


def _can_have(layout: Layout, shards: tuple[int, ...]) -> bool:
    """Whether an image of some layout could also be stored in shards of another shape."""
    channels, *others = shards = _with_channels(shards)
    if len(shards) != 4 or channels != layout.shards[0]:
        return False
    return all(s > 0 and s % c == 0 for s, c in zip(others, layout.chunks[1:], strict=True))


def _with_channels(shards: tuple[int, ...]) -> tuple[int, ...]:
    return (1,) * (4 - len(shards)) + shards


def _record(volume: _Volume, layout: Layout, inputs: ModelInputs, options: PredictOptions) -> ImageRecord:
    head, image = volume.head, inputs.native
    record = output_record(
        inputs.subject.name,
        head.name,
        kind_of(options.reduction_of(head.name)),
        np.dtype(head.kept_dtype),
        layout,
        (head.kept_channels, *volume.grid.shape),
        volume.grid.affine,
        spatial_unit=image.spatial_unit,
        like=image.record,
    )
    if not (is_slide(image) if options.pyramid is None else options.pyramid):
        return record
    return dataclasses.replace(record, levels=plan_levels(record.shape, record.chunks, record.shards))


def is_slide(image: Image) -> bool:
    """Whether an image is one plane, read in place from Zarr, or stored with coarser levels."""
    if image.record is not None:
        return 1 in image.spatial_shape and bool(image.record.levels)
    is_in_zarr = image.opened.path is not None and not isinstance(image.source, ArraySource)
    return 1 in image.spatial_shape and is_in_zarr


def _tiling(
    volume: _Volume, layout: Layout, grid: PatchGrid, options: PredictOptions, swept_axis: int
) -> Tiling:
    _, k, j, i = layout.shards
    return Tiling.over(
        grid,
        options.overlap_mode,
        swept_axis=swept_axis,
        output_shape=volume.blended,
        patch_shape=volume.head.patch_shape,
        shard_shape=(i, j, k),
        output=volume.output,
    )


def partitions(heads: Sequence[PlannedHead], slabs: int) -> Iterator[tuple[Region, ...]]:
    """Regions that together hold all shards: ``slabs`` along the sweep, and ever more across it."""
    for parts in _ways_to_part(heads[0].tiling, slabs):
        yield _regions(heads, parts)


def _ways_to_part(tiling: Tiling, slabs: int) -> Iterator[Triple]:
    """Numbers of regions along I, J, K: one across the sweep, then ever more."""
    most = tiling.shard_counts
    parts = [1, 1, 1]
    parts[tiling.swept_axis] = min(slabs, most[tiling.swept_axis])
    across = tiling.order[1:]
    while True:
        i, j, k = parts
        yield i, j, k
        left = [axis for axis in across if parts[axis] < most[axis]]
        if not left:
            return
        widest = max(left, key=lambda axis: tiling.shape[axis] / parts[axis])
        parts[widest] = min(2 * parts[widest], most[widest])


def _regions(heads: Sequence[PlannedHead], parts: Triple) -> tuple[Region, ...]:
    """Boxes of shards of about the same size, of every head the shards that start in the same part.

    A head with larger shards has none in some parts.
    """
    first = heads[0].tiling
    cuts = []  # the starts of parts, as fractions of the volume
    for axis in range(3):
        begins = [shards[0] for shards in np.array_split(np.arange(first.shard_counts[axis]), parts[axis])]
        cuts.append(_shard_starts(first, axis)[begins])
    regions = []
    for place in itertools.product(*map(range, parts)):
        shards = [_shards_in(head.tiling, cuts, place) for head in heads]
        if any(map(all, shards)):
            regions.append(Region(tuple(shards), _patches_of(heads, shards)))
    return tuple(regions)


def _shards_in(tiling: Tiling, cuts: Sequence[Any], place: Sequence[int]) -> Ranges:
    ranges = []
    for axis, (part, begins) in enumerate(zip(place, cuts, strict=True)):
        starts = _shard_starts(tiling, axis) + 1e-9
        of_part = np.flatnonzero(np.searchsorted(begins, starts, side="right") - 1 == part)
        ranges.append(range(of_part[0], of_part[-1] + 1) if of_part.size else range(0))
    i, j, k = ranges
    return i, j, k


def _shard_starts(tiling: Tiling, axis: int) -> NDArray[np.float64]:
    """Where the shards begin along an axis of the volume, as fractions of it."""
    lengths = np.array(tiling.axes[axis].shard_lengths)
    return np.asarray((np.cumsum(lengths) - lengths) / lengths.sum())


def _patches_of(heads: Sequence[PlannedHead], shards: Sequence[Ranges]) -> Ranges:
    ranges = []
    for axis in range(3):
        touching = [
            tile.contributors
            for head, of in zip(heads, shards, strict=True)
            if all(of)
            for shard in of[axis]
            for tile in head.tiling.axes[axis].tiles_of(shard)
        ]
        ranges.append(range(min(t[0] for t in touching), max(t[-1] for t in touching) + 1))
    i, j, k = ranges
    return i, j, k
