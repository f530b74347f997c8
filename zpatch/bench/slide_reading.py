"""How fast random patches are read from a slide, by one process and by several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from zpatch.bench.benchmark_plan import GROUP_PATCHES
from zpatch.bench.reading_speed import Speed, reading_speed
from zpatch.errors import OptionError
from zpatch.geometry.boxes import Triple, check_patch_fits, in_plane, patch_size_triple
from zpatch.images.subject import Subject
from zpatch.runtime.tasks import core_count

PATCH_PIXELS = 512


def slide_patch_size(subject: Subject, patch_size: int | Sequence[int] | None) -> Triple:
    """A patch size for a slide: one number is along x and y; by default 512, or what fits."""
    _, i, j, _ = next(iter(subject.images.values())).shape
    if patch_size is None:
        patch_size = (min(PATCH_PIXELS, i), min(PATCH_PIXELS, j))
    size = patch_size_triple(in_plane(patch_size))
    check_patch_fits(size, subject.spatial_shape, subject.name)
    return size


def slide_speeds(
    path: Path,
    subject: Subject,
    patch_size: Triple,
    *,
    group: int = 10,
    jobs: int | None = None,
    seconds: float = 2.0,
) -> Iterator[Speed]:
    """The speed of one process, and of ``jobs`` (by default as many as there are cores), each when measured.

    ``group`` patches are read together, each tile under them once.
    """
    if group < 1 or (jobs is not None and jobs < 1):
        raise OptionError(f"patches_per_volume and jobs must be at least 1, not {group} and {jobs}")
    most = core_count() if jobs is None else jobs
    for processes in sorted({1, most}):
        yield reading_speed(
            path,
            [subject],
            patch_size=patch_size,
            group=min(group, GROUP_PATCHES),
            processes=processes,
            seconds=seconds,
        )
