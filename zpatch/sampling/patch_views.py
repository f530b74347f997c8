"""The images of a patch: those of the subject, and coarser levels of them around the same centre."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zpatch.errors import OptionError
from zpatch.geometry.affines import Affine, crop_affine, level_factors
from zpatch.geometry.boxes import PatchLocation, Triple
from zpatch.images.image import Image
from zpatch.images.subject import Subject
from zpatch.sources.image_read import ImageRead


@dataclass(frozen=True, slots=True, eq=False)
class PatchView:
    """What a patch carries under a ``name``: voxels of an image around the centre of the patch.

    The voxels of ``image`` are ``factors`` times as wide as those that locations count. Beyond the border
    they are padded by ``padding_mode``; None refuses locations that reach over it.
    """

    name: str
    image: Image
    factors: Triple = (1, 1, 1)
    padding_mode: str | None = None

    def box(self, location: PatchLocation) -> PatchLocation:
        """The voxels of the image for the patch at a location."""
        return location.around_the_same_centre(self.factors)

    def fill(self, value: float) -> float:
        """The value of padding that is constant: ``value`` is for intensities, and others get 0."""
        return value if self.image.kind == "scalar" else 0

    def read(
        self, locations: Sequence[PatchLocation], *, is_scaled: bool = True, fill: float = 0
    ) -> ImageRead:
        """How the boxes of patches are read; ``fill`` is as in ``GridSampler``."""
        boxes = [self.box(location) for location in locations]
        return ImageRead(self.image, boxes, is_scaled, self.padding_mode, self.fill(fill))

    def affine(self, location: PatchLocation) -> Affine:
        """The affine of the patch at a location, whose origin is its corner."""
        return crop_affine(self.image.affine, self.box(location).index)


def checked_context(context: int | Sequence[int]) -> tuple[int, ...]:
    """The widths of context, which are powers of 2; OptionError for others, and for one that is repeated."""
    widths = tuple(context) if isinstance(context, Sequence) else (context,)
    if any(type(w) is not int or w < 2 or w & (w - 1) for w in widths) or len(set(widths)) < len(widths):
        raise OptionError(
            f"context must be different powers of 2, as (2, 4), not {context!r}", option="context"
        )
    return widths


def views_of(
    subject: Subject, context: Sequence[int] = (), padding_mode: str | None = None
) -> list[PatchView]:
    """The images of a subject, and for each width of ``context`` a coarser level of each, as ``t1_x2``.

    Levels are padded by ``padding_mode`` too, or else by the edge voxel. Raises OptionError for an image
    without such a level.
    """
    views = [PatchView(name, image, padding_mode=padding_mode) for name, image in subject.images.items()]
    for width in context:
        for name, image in subject.images.items():
            view = level_view(name, image, width, padding_mode, subject.name)
            if view.name in subject.images:
                raise OptionError(
                    f"the context of {name!r} is called {view.name!r}, and so is an image of "
                    f"{subject.name!r}; rename that image",
                    option="context",
                )
            views.append(view)
    return views


def level_view(name: str, image: Image, width: int, padding_mode: str | None, subject: str) -> PatchView:
    """The view of the level of an image whose voxels are ``width`` times as wide."""
    number = width.bit_length() - 1
    try:
        level = image.level(number)
    except OptionError as error:
        raise OptionError(f"image {name!r} of subject {subject!r}: {error}", option="context") from None
    return PatchView(
        f"{name}_x{width}", level, level_factors(image.spatial_shape, number), padding_mode or "edge"
    )
