"""GridSampler: all patches of a grid, as a dataset."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from zpatch.errors import OptionError
from zpatch.geometry.boxes import PatchLocation, patch_overlap_triple
from zpatch.geometry.patch_grid import PatchGrid
from zpatch.images.subject import Subject
from zpatch.sampling.patch import Patch
from zpatch.sampling.patch_sampler import READ_TOGETHER, PatchSampler, PatchSize


class GridSampler(PatchSampler, torch.utils.data.Dataset[Patch]):
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
        if not isinstance(subject, Subject | None):
            raise OptionError(
                f"a GridSampler is over one subject, not {subject!r}; "
                f"say GridSampler(cohort[0], patch_size=64), or GridSampler(patch_size=64) for a queue"
            )
        super().__init__(patch_size, context=context, padding_mode=padding_mode, fill=fill)
        self.patch_overlap = patch_overlap_triple(patch_overlap, self.patch_size)
        if self._is_cube and subject is not None and subject.is_slide:
            self._flatten()
        self.subject = subject
        self._grid = None if subject is None else self.grid_of(subject)

    def _flatten(self) -> None:
        super()._flatten()
        self.patch_overlap = *self.patch_overlap[:2], 0

    def grid_of(self, subject: Subject) -> PatchGrid:
        """The grid over a subject."""
        self.check_fits(subject)
        return PatchGrid.over(
            subject.spatial_shape,
            self.patch_size,
            self.patch_overlap,
            border=self.padding_mode is not None,
        )

    def counts(self, subjects: Sequence[Subject], patches_per_volume: int = 0) -> NDArray[np.int64]:
        """How many patches the grid has over each subject, (N,)."""
        different, which = np.unique(self.alike(subjects), return_inverse=True)
        return np.array([len(self.grid_of(subjects[number])) for number in different.tolist()])[which]

    def numbered(
        self,
        subject: Subject,
        numbers: Sequence[int],
        patches_per_volume: int | None = None,
        rng: np.random.Generator | None = None,
    ) -> list[PatchLocation]:
        """The patches of some numbers in the grid over a subject."""
        grid = self.grid_of(subject)
        return [grid.location(number) for number in numbers]

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
