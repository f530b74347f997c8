"""GridSampler: all patches of a grid, as a dataset."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch

from zpatch.errors import OptionError
from zpatch.geometry.boxes import PatchLocation, check_patch_fits, patch_overlap_triple, patch_size_triple
from zpatch.geometry.padding import check_padding_mode
from zpatch.geometry.patch_grid import PatchGrid
from zpatch.images.subject import Subject
from zpatch.sampling.patch import Patch
from zpatch.sampling.patch_views import checked_context
from zpatch.sampling.samplers import READ_TOGETHER, PatchSize, RandomSampler, read_patches


class GridSampler(torch.utils.data.Dataset[Patch]):
    """All patches of a regular grid, as a map-style dataset; lexicographic order, I slowest.

    First voxels on each axis are ``range(0, n - p + 1, p - o)``, and a last patch flush with the border where
    needed. ``padding_mode`` (constant with ``fill``, edge, reflect, symmetric, wrap: as numpy.pad) pads
    ``patch_overlap // 2`` voxels on each side, and small volumes up to the patch size, without copying the
    volume; locations stay relative to the volume, so padding starts below 0. ``fill`` is an intensity: label
    maps and sampling maps are padded with 0, and a fill that the type of a patch cannot represent is an
    OptionError. ``context`` adds coarser levels, as in ``RandomSampler``. Without a subject it is a template,
    for a queue.

    >>> import numpy as np
    >>> from zpatch.images.image import ScalarImage
    >>> grid = GridSampler(Subject(t1=ScalarImage(np.zeros((10, 10, 10)))), patch_size=4, patch_overlap=2)
    >>> len(grid), grid[0].location.index, grid[63].location.index
    (64, (0, 0, 0), (6, 6, 6))
    """

    def __init__(
        self,
        subject: Subject | None = None,
        patch_size: PatchSize | None = None,
        patch_overlap: PatchSize = 0,
        padding_mode: str | None = None,
        fill: float = 0,
        *,
        context: Sequence[int] = (),
    ) -> None:
        if patch_size is None:
            raise OptionError("patch_size is missing; say GridSampler(subject, patch_size=64)")
        self.patch_size = patch_size_triple(patch_size)
        self.patch_overlap = patch_overlap_triple(patch_overlap, self.patch_size)
        check_padding_mode(padding_mode)
        self.padding_mode = padding_mode
        self.fill = fill
        self.context = checked_context(context)
        self.subject = subject
        self._grid = None if subject is None else self.grid_of(subject)

    def grid_of(self, subject: Subject) -> PatchGrid:
        """The grid over a subject."""
        if self.padding_mode is None:
            check_patch_fits(self.patch_size, subject.spatial_shape, subject.name)
        return PatchGrid.over(
            subject.spatial_shape,
            self.patch_size,
            self.patch_overlap,
            border=self.padding_mode is not None,
        )

    @property
    def grid(self) -> PatchGrid:
        """The grid over the subject of the sampler."""
        self._own_subject()
        assert self._grid is not None
        return self._grid

    def _own_subject(self) -> Subject:
        if self.subject is None:
            raise OptionError("this GridSampler is a template without a subject; give it one")
        return self.subject

    def read(self, subject: Subject, locations: Sequence[PatchLocation]) -> list[Patch]:
        """The patches at some of the grid's locations, padded beyond the border."""
        return read_patches(
            subject, locations, context=self.context, padding_mode=self.padding_mode, fill=self.fill
        )

    def __call__(self, subject: Subject) -> Iterator[Patch]:
        """All patches of a subject, in order."""
        options = self.patch_size, self.patch_overlap, self.padding_mode, self.fill
        return iter(GridSampler(subject, *options, context=self.context))

    @property
    def locations(self) -> list[PatchLocation]:
        """The locations of the patches, in order."""
        return list(self.grid.locations())

    def __len__(self) -> int:
        return len(self.grid)

    def __getitem__(self, index: int) -> Patch:
        grid = self.grid
        if not -len(grid) <= index < len(grid):
            raise IndexError(f"patch {index} of a grid of {len(grid)} patches")
        return self.read(self._own_subject(), [grid.location(index % len(grid))])[0]

    def __iter__(self) -> Iterator[Patch]:
        subject, locations = self._own_subject(), self.grid.locations()
        while group := list(itertools.islice(locations, READ_TOGETHER)):
            yield from self.read(subject, group)

    def __repr__(self) -> str:
        return (
            f"GridSampler(patch_size={self.patch_size}, patch_overlap={self.patch_overlap}, "
            f"padding_mode={self.padding_mode!r}, fill={self.fill}"
            + (f", context={self.context})" if self.context else ")")
        )


PatchSampler = RandomSampler | GridSampler
