"""Planning a prediction: into which regions a volume is cut, and how much memory they take.

More regions than jobs ask for are made only to fit a memory limit: shards get smaller, and bands of them
are filled one after the other, at the price of running the patches between two bands for both.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from zpatch.blending.reduction import kind_of
from zpatch.blending.sinks import output_record
from zpatch.blending.tiling import Tiling
from zpatch.chunks.layout import SHARD_BYTES, Layout, plan_output_layout
from zpatch.errors import MemoryLimitError, PatchSizeError
from zpatch.geometry.affines import resized_affine
from zpatch.geometry.boxes import Bools, Triple
from zpatch.geometry.patch_grid import PatchGrid
from zpatch.images.image import Image
from zpatch.images.subject import Subject
from zpatch.prediction.peak_memory import fixed_bytes, region_bytes
from zpatch.prediction.prediction_options import PredictOptions
from zpatch.prediction.prediction_plan import Head, PlannedHead, PredictionPlan, Ranges, Region
from zpatch.runtime.byte_sizes import format_bytes

SMALLEST_SHARD_BYTES = 2**16

Shards = Mapping[str, tuple[int, ...]]
NOT_BEGUN: Shards = MappingProxyType({})


def plan_subject(
    subject: Subject,
    images: Sequence[Image],
    heads: Sequence[Head],
    options: PredictOptions,
    *,
    slabs: int = 1,
    limit: int | None = None,
    skipped: Bools | None = None,
    tta: bool = False,
    begun: Shards = NOT_BEGUN,
) -> PredictionPlan:
    """The plan of a subject in ``slabs`` regions along the swept axis, and as many across it as memory asks
    for: ``limit`` is what all jobs together may hold.

    ``images`` are those to be read, normalised already. ``begun`` are the stored shapes of shards that an
    output was begun with, by its name: where it says them of all heads, these and no others are taken.
    Raises MemoryLimitError, with what would fit.
    """
    grid = grid_over(images[0].spatial_shape, options)
    swept_axis = max(range(3), key=lambda axis: (grid.spatial_shape[axis], axis))
    least = None
    for layouts in _layouts(heads, grid, options, swept_axis, begun):
        planned = [
            _planned_head(head, subject, images[0], grid, options, swept_axis, layout)
            for head, layout in zip(heads, layouts, strict=True)
        ]
        for parts in _ways_to_part(planned[0].tiling, slabs):
            regions = _regions(planned, parts)
            fixed = fixed_bytes(images, planned, options, tta=tta)
            peaks = [
                region_bytes(region, images, planned, grid, options.batch_size, skipped is not None)
                for region in regions
            ]
            peak = options.jobs * (max(peaks) + fixed)
            if limit is None or peak <= limit:
                return PredictionPlan(
                    subject=subject,
                    images=tuple(images),
                    grid=grid,
                    swept_axis=swept_axis,
                    batch_size=options.batch_size,
                    heads=tuple(planned),
                    regions=tuple(regions),
                    skipped=skipped,
                    region_bytes=max(peaks) + fixed,
                    jobs=options.jobs,
                    tta=tta,
                )
            least = peak if least is None else min(least, peak)
    assert least is not None
    assert limit is not None
    advice = "use a smaller patch_size, batch_size or number of jobs, or allow more"
    if {head.head.name: head.record.shards for head in planned} == begun:
        advice = "it was begun in these shards: allow more, or say overwrite=True to start over"
    raise MemoryLimitError(
        f"the prediction of {subject.name!r} needs {format_bytes(least)} beside the network, and "
        f"{format_bytes(max(limit, 0))} are left of the limit; {advice}"
    )


def grid_over(spatial_shape: Triple, options: PredictOptions) -> PatchGrid:
    """The patches of a volume; one smaller than the patch is padded up to it."""
    for axis, (length, size) in enumerate(zip(spatial_shape, options.patch_size, strict=True)):
        if length == 1 < size:
            flat = [1 if n == 1 else p for n, p in zip(spatial_shape, options.patch_size, strict=True)]
            raise PatchSizeError(
                f"the image is one plane along {'IJK'[axis]}, of which a patch of {size} would be padding; "
                f"use a patch_size of {','.join(map(str, flat))}"
            )
    border = options.padding_mode is not None
    return PatchGrid.over(spatial_shape, options.patch_size, options.patch_overlap, border=border)


def _layouts(
    heads: Sequence[Head], grid: PatchGrid, options: PredictOptions, swept_axis: int, begun: Shards
) -> Iterator[list[Layout]]:
    """How the outputs may be stored: as they were begun, or else in ever smaller shards."""

    def layouts(shard_bytes: int) -> list[Layout]:
        found = []
        for head in heads:
            i, j, k = head.shape_for(grid.spatial_shape, options.patch_size)
            shape, itemsize = (head.kept_channels, k, j, i), np.dtype(head.kept_dtype).itemsize
            found.append(
                plan_output_layout(shape, itemsize, swept_axis=2 - swept_axis, shard_bytes=shard_bytes)
            )
        return found

    pairs = list(zip(layouts(SHARD_BYTES), heads, strict=True))
    if all(head.name in begun and _can_have(layout, begun[head.name]) for layout, head in pairs):
        yield [Layout(layout.chunks, _with_channels(begun[head.name])) for layout, head in pairs]
        return
    shard_bytes = SHARD_BYTES
    while shard_bytes >= SMALLEST_SHARD_BYTES:
        yield layouts(shard_bytes)
        shard_bytes //= 4


def _can_have(layout: Layout, shards: tuple[int, ...]) -> bool:
    """Whether an image could have other shards than its layout's."""
    channels, *others = shards = _with_channels(shards)
    if len(shards) != 4 or channels != layout.shards[0]:
        return False
    return all(s > 0 and s % c == 0 for s, c in zip(others, layout.chunks[1:], strict=True))


def _with_channels(shards: tuple[int, ...]) -> tuple[int, ...]:
    return (1,) * (4 - len(shards)) + shards


def _planned_head(
    head: Head,
    subject: Subject,
    image: Image,
    grid: PatchGrid,
    options: PredictOptions,
    swept_axis: int,
    layout: Layout,
) -> PlannedHead:
    shape = head.shape_for(grid.spatial_shape, options.patch_size)
    dtype = np.dtype(head.kept_dtype)
    record = output_record(
        subject.name,
        head.name,
        kind_of(options.reduce),
        dtype,
        layout,
        (head.kept_channels, *shape),
        resized_affine(image.affine, grid.spatial_shape, shape),
        spatial_unit=image.spatial_unit,
        like=image.record,
    )
    _, k, j, i = layout.shards
    tiling = Tiling.over(
        grid,
        options.overlap_mode,
        swept_axis=swept_axis,
        output_shape=shape,
        patch_shape=head.patch_shape,
        shard_shape=(i, j, k),
    )
    return PlannedHead(head, record, tiling)


def _ways_to_part(tiling: Tiling, slabs: int) -> Iterator[Triple]:
    """In how many regions along I, J, K: as few across the sweep as may do, then ever more."""
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


def _regions(heads: Sequence[PlannedHead], parts: Triple) -> list[Region]:
    """The boxes of shards, about as large as each other; of every head those that begin in the same part.

    A head whose shards are larger has none in some parts.
    """
    first = heads[0].tiling
    cuts = []  # where parts begin, as fractions of the volume
    for axis in range(3):
        begins = [shards[0] for shards in np.array_split(np.arange(first.shard_counts[axis]), parts[axis])]
        cuts.append(np.array(begins) * first.shard_shape[axis] / first.shape[axis])
    regions = []
    for place in itertools.product(*map(range, parts)):
        shards = [_shards_in(head.tiling, cuts, place) for head in heads]
        if any(map(all, shards)):
            regions.append(Region(tuple(shards), _patches_of(heads, shards)))
    return regions


def _shards_in(tiling: Tiling, cuts: Sequence[Any], place: Sequence[int]) -> Ranges:
    ranges = []
    for axis, (part, begins) in enumerate(zip(place, cuts, strict=True)):
        starts = np.arange(tiling.shard_counts[axis]) * tiling.shard_shape[axis] / tiling.shape[axis]
        of_part = np.flatnonzero(np.searchsorted(begins, starts + 1e-9, side="right") - 1 == part)
        ranges.append(range(of_part[0], of_part[-1] + 1) if of_part.size else range(0))
    i, j, k = ranges
    return i, j, k


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
