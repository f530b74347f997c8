"""Where the voxels of an image are, and the image on other grids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self

from zpatch.geometry.affines import Affine, crop_affine, spacing_mm
from zpatch.geometry.boxes import PatchLocation, Triple, patch_size_triple
from zpatch.geometry.orientation import orientation_to
from zpatch.geometry.padding import check_fill, check_padding_mode
from zpatch.geometry.voxel_grid import Spacing, VoxelGrid
from zpatch.images.opened_image import OpenedImage
from zpatch.records.image_record import Kind
from zpatch.resampling.interpolation import Interpolation
from zpatch.sources.resampled_source import ResampledSource


class PlacedImage:
    """The part of an ``Image`` that says where its voxels are: shape, affine, and other grids for it.

    >>> import numpy as np
    >>> from zpatch.images.image import ScalarImage
    >>> image = ScalarImage(np.zeros((4, 5, 6)), affine=np.diag([2.0, 2.0, 3.0, 1.0]))
    >>> image.spatial_shape, image.spacing, image.resampled(1.0).spatial_shape
    ((4, 5, 6), (2.0, 2.0, 3.0), (8, 10, 18))
    """

    kind: ClassVar[Kind] = "scalar"

    def __init__(self, opened: OpenedImage, *, affine: Affine) -> None:
        self._opened = opened
        self._affine = affine

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(C, I, J, K)."""
        return self._opened.source.shape

    @property
    def spatial_shape(self) -> Triple:
        """Extent along I, J, K in voxels."""
        _, i, j, k = self.shape
        return i, j, k

    @property
    def num_channels(self) -> int:
        """Number of channels."""
        return self.shape[0]

    @property
    def affine(self) -> Affine:
        """Voxel (I, J, K) to mm, 4 x 4."""
        return self._affine.copy()

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size along I, J, K in mm."""
        return spacing_mm(self._affine)

    @property
    def spatial_unit(self) -> str | None:
        """Unit of the affine's world coordinates: millimeter, unless the source has another."""
        return self._opened.unit

    @property
    def grid(self) -> VoxelGrid:
        """Where the voxels are: their shape (I, J, K) and affine."""
        return VoxelGrid(self.spatial_shape, self.affine)

    @property
    def root(self) -> tuple[Self, list[ResampledSource]]:
        """The image that this one is resampled from, and the sources on the way, that of this one first.

        It is the image itself if it is not resampled, or was given another scale since then.
        """
        opened, sources = self._opened, []
        while opened.base is not None and not opened.is_rescaled:
            assert isinstance(opened.source, ResampledSource)
            sources.append(opened.source)
            opened = opened.base
        return (type(self)(opened, affine=opened.affine) if sources else self), sources

    def resampled(
        self, spacing: Spacing, *, interpolation: str | None = None, antialias: bool = False
    ) -> Self:
        """The image in voxels of another size, in mm: one number, or three along I, J, K; None keeps an axis.

        Lazy: for each box that is read, only the chunks under it and a few voxels around are read. A grid of
        n voxels of s mm becomes one of ``max(1, floor(n * s / t + 0.5))`` voxels of t mm, whose first faces
        are in the same place; axes keep their directions, also where they are oblique or sheared.

        ``interpolation`` is linear, cubic (a B-spline of order 3) or nearest, and beyond the border the edge
        voxel is repeated. It defaults to linear, and to nearest for label maps; a label map that is
        interpolated linearly has at each voxel the class with the largest weight, the lowest of equal ones.
        ``antialias`` smooths the axes whose voxels grow (Cardoso et al., 2015). Values are float32 (float64
        for stored types of 32 bits and more) if they are interpolated, or of the stored type. Slope,
        intercept and ``Normalize`` that were applied are applied before.

        Raises OptionError for a spacing that is not positive or makes an axis of 2**31 voxels, for an unknown
        interpolation, for a label map with cubic, and for complex voxels that are not to be picked.

        >>> import numpy as np
        >>> from zpatch.images.image import ScalarImage
        >>> image = ScalarImage(np.arange(8.0, dtype=np.float32).reshape(8, 1, 1))
        >>> image.resampled((2, 1, 1)).data.ravel().tolist()
        [0.5, 2.5, 4.5, 6.5]
        """
        grid = self.grid
        return self._on(grid.with_spacing(spacing), grid.spacing_matrix(spacing), interpolation, antialias)

    def on_grid_of(
        self, other: PlacedImage | VoxelGrid, *, interpolation: str | None = None, antialias: bool = False
    ) -> Self:
        """The image on the grid of another one, or on a grid: its shape and affine, rotated or not.

        Options and values are those of ``resampled``. Raises OptionError if an affine is singular, and if the
        images do not overlap in space.
        """
        grid = other if isinstance(other, VoxelGrid) else other.grid
        return self._on(grid, self.grid.matrix_from(grid), interpolation, antialias)

    def window(
        self,
        first: Sequence[int],
        spatial_shape: Sequence[int],
        *,
        padding_mode: str = "constant",
        fill: float = 0,
    ) -> Self:
        """The box of the image from voxel ``first`` on, which may reach over its border, where it is padded.

        Lazy. ``first`` may be below 0. Beyond the border there is ``fill``, or with another ``padding_mode``
        what numpy.pad puts there. Raises OptionError for an unknown mode, a box without voxels, and a fill
        that the type of the values cannot represent.

        >>> import numpy as np
        >>> from zpatch.images.image import ScalarImage
        >>> image = ScalarImage(np.arange(4).reshape(4, 1, 1))
        >>> image.window((2, 0, 0), (4, 1, 1), fill=-1).data.ravel().tolist()
        [2, 3, -1, -1]
        """
        check_padding_mode(padding_mode)
        (i, j, k), shape = map(int, first), patch_size_triple(tuple(spatial_shape))
        box = PatchLocation((i, j, k), shape)
        if padding_mode == "constant" and not box.lies_within(self.spatial_shape):
            check_fill(fill, self._opened.scaling.dtype_of(self._opened.source.dtype), self)
        opened = self._opened.window(box.index, shape, padding_mode, fill)
        return type(self)(opened, affine=crop_affine(self._affine, box.index))

    def oriented(self, axes: str = "RAS") -> Self:
        """The image with its axes permuted and reversed, so that they point to RAS, LPS, ...

        Nothing is computed, and boxes are read as fast as before. An oblique axis belongs to the world axis
        that it is closest to. Raises OptionError for letters that name no directions, and for a singular
        affine.

        >>> import numpy as np
        >>> from zpatch.images.image import ScalarImage
        >>> image = ScalarImage(np.arange(3).reshape(3, 1, 1), affine=np.diag([-1, 1, 1, 1]))
        >>> image.oriented("RAS").data.ravel().tolist()
        [2, 1, 0]
        """
        turn = orientation_to(self._affine, axes)
        matrix = turn.matrix(self.spatial_shape)
        grid = VoxelGrid(turn.shape(self.spatial_shape), self._affine @ matrix)
        return self._on(grid, matrix, "nearest", antialias=False)

    def _on(self, grid: VoxelGrid, matrix: Affine, interpolation: str | None, antialias: bool) -> Self:
        mode = interpolation or ("nearest" if self.kind == "label" else "linear")
        chosen = Interpolation(mode, antialias, of_labels=self.kind == "label")
        return type(self)(self._opened.resampled(grid.shape, matrix, chosen), affine=grid.affine)
