"""A subject: its images by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Self

from zpatch.digests import Json
from zpatch.errors import OptionError, UnknownNameError
from zpatch.geometry.boxes import Triple
from zpatch.geometry.voxel_grid import Spacing
from zpatch.images.image import Image
from zpatch.images.placed_image import PlacedImage
from zpatch.records.names import check_name


class Subject:
    """The images of one subject, by name: ``subject.t1`` or ``subject["t1"]``; iterating gives the names.

    Subjects of a store are made by ``Cohort``; others from any images. Label and sampling maps of another
    shape than the subject's slide are put on its grid, by their affines, if it has one. Raises OptionError
    for values that are not images, and for a subject without images; UnknownNameError, a KeyError, for an
    unknown name.

    >>> import numpy as np
    >>> from zpatch.images.image import LabelMap, ScalarImage
    >>> volume = np.zeros((4, 5, 6), np.int16)
    >>> subject = Subject(t1=ScalarImage(volume), seg=LabelMap(volume), name="sub-01")
    >>> subject.seg.shape, subject.spatial_shape, list(subject)
    ((1, 4, 5, 6), (4, 5, 6), ['t1', 'seg'])
    """

    def __init__(
        self,
        *,
        name: str = "subject",
        split: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        **images: Image,
    ) -> None:
        self._set(images, name, split, metadata)

    @classmethod
    def of(
        cls,
        images: Mapping[str, Image],
        *,
        name: str = "subject",
        split: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Self:
        """The subject of a mapping, whose images may have any names, also ``name`` and ``split``."""
        subject = cls.__new__(cls)
        subject._set(images, name, split, metadata)
        return subject

    def _set(
        self, images: Mapping[str, Image], name: str, split: str | None, metadata: Mapping[str, Any] | None
    ) -> None:
        for key, image in images.items():
            check_name(key, "image")
            if not isinstance(image, Image):
                raise OptionError(
                    f"{key}= must be a ScalarImage, LabelMap or SamplingMap, not {type(image).__name__}"
                )
        if not images:
            raise OptionError(f"subject {name!r} has no images; give it some, as in t1=ScalarImage(...)")
        images = _on_slide(images)
        self.name = name
        self.split = split
        self.metadata: Json = dict(metadata or {})
        self._images = dict(images)

    @property
    def is_slide(self) -> bool:
        """Whether it has a slide or another TIFF image of one plane, so that its patches have one plane."""
        return _slide_of(self._images) is not None

    @property
    def images(self) -> Mapping[str, Image]:
        """All images by name."""
        return MappingProxyType(self._images)

    def with_images(self, **images: Image | None) -> Self:
        """The same subject with images added or replaced; an image that is None is removed."""
        changed = {name: image for name, image in (self._images | images).items() if image is not None}
        return self.of(changed, name=self.name, split=self.split, metadata=self.metadata)

    def resampled(
        self,
        spacing: Spacing,
        *,
        interpolation: str = "linear",
        label_interpolation: str = "nearest",
        antialias: bool = False,
    ) -> Self:
        """The subject with all images in voxels of another size, in mm; see ``Image.resampled``.

        Label maps keep their classes, by ``label_interpolation``; ``interpolation`` and ``antialias`` are for
        the other images. Images of different grids stay so: see ``on_grid_of``.

        >>> import numpy as np
        >>> from zpatch.images.image import LabelMap, ScalarImage
        >>> volume = np.zeros((4, 4, 4), np.uint8)
        >>> subject = Subject(t1=ScalarImage(volume), seg=LabelMap(volume)).resampled(2.0)
        >>> subject.spatial_shape, subject.t1.dtype, subject.seg.dtype
        ((2, 2, 2), dtype('float32'), dtype('uint8'))
        """
        options = interpolation, label_interpolation, antialias
        return self._each(lambda image: image.resampled(spacing, **_options(image, *options)))

    def on_grid_of(
        self,
        reference: str | PlacedImage,
        *,
        interpolation: str = "linear",
        label_interpolation: str = "nearest",
        antialias: bool = False,
    ) -> Self:
        """The subject with all images on the grid of one of them, or of another image.

        The reference itself stays as it is. Options are those of ``resampled``; raises OptionError for images
        that do not overlap it in space, and UnknownNameError for an unknown image.
        """
        grid = self[reference] if isinstance(reference, str) else reference
        options = interpolation, label_interpolation, antialias
        return self._each(
            lambda image: image if image is grid else image.on_grid_of(grid, **_options(image, *options))
        )

    def oriented(self, axes: str = "RAS") -> Self:
        """The subject with the axes of all images permuted and reversed, so that they point to RAS, ..."""
        return self._each(lambda image: image.oriented(axes))

    def _each(self, fn: Callable[[Image], Image]) -> Self:
        changed = {}
        for name, image in self._images.items():
            try:
                changed[name] = fn(image)
            except OptionError as error:
                raise OptionError(f"{name!r} of subject {self.name!r}: {error}") from None
        return self.with_images(**changed)

    @property
    def spatial_shape(self) -> Triple:
        """Extent along I, J, K in voxels, which all images must share."""
        shapes = {image.spatial_shape for image in self._images.values()}
        if len(shapes) > 1:
            listed = ", ".join(f"{k} {image.spatial_shape}" for k, image in self._images.items())
            raise OptionError(
                f"the images of subject {self.name!r} differ in shape ({listed}); "
                f"put them on one grid, as in subject.on_grid_of({next(iter(self._images))!r}), or make a "
                f"subject of the images of one shape"
            )
        return shapes.pop()

    def __getitem__(self, name: str) -> Image:
        try:
            return self._images[name]
        except KeyError:
            raise UnknownNameError.among("image", name, self._images, f"subject {self.name!r}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._images)

    def __len__(self) -> int:
        return len(self._images)

    def __getattr__(self, name: str) -> Image:
        if name.startswith("_") or "_images" not in self.__dict__:
            raise AttributeError(name)
        try:
            return self[name]
        except UnknownNameError as error:
            raise AttributeError(str(error)) from None

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._images]

    def __repr__(self) -> str:
        return f"Subject({self.name!r}: {', '.join(self._images)})"


def outline(subject: Subject) -> str:
    """A line with all that identifies the images of a subject."""
    images = (
        image_outline(name, image.kind, image.shape, _contents(image))
        for name, image in subject.images.items()
    )
    return f"{subject.name}: {', '.join(images)}"


def image_outline(name: str, kind: str, shape: tuple[int, ...], contents: str) -> str:
    """An image in such a line."""
    return f"{name} {kind} {shape} {contents}"


def _contents(image: Image) -> str:
    """The digest of the files of an image; without one, all that is known of it."""
    return image.record.contents if image.record and image.record.files else image.identity()


def _slide_of(images: Mapping[str, Image]) -> Image | None:
    """The first image that is a slide: an intensity of one plane in a TIFF file."""
    planes = (one for one in images.values() if one.opened.slide and one.kind == "scalar")
    return next((one for one in planes if one.spatial_shape[2] == 1), None)


def _on_slide(images: Mapping[str, Image]) -> Mapping[str, Image]:
    """The images of a subject, with maps of other shapes put on the grid of its slide."""
    slide = _slide_of(images)
    if slide is None:
        return images
    return {
        name: image
        if image.kind == "scalar" or image.spatial_shape == slide.spatial_shape
        else _placed_on(slide, image, name)
        for name, image in images.items()
    }


def _placed_on(slide: Image, image: Image, name: str) -> Image:
    if (image.spatial_unit is None) != (slide.spatial_unit is None):
        which = "the slide" if slide.spatial_unit is None else f"{name}="
        raise OptionError(
            f"{name}= has another shape than the slide, and is put on its grid by micrometres per pixel, "
            f"which {which} does not state; say slide_mpp= for it"
        )
    return image.on_grid_of(slide, interpolation="nearest")


def _options(image: Image, interpolation: str, label_interpolation: str, antialias: bool) -> Json:
    """The options with which an image of a subject is resampled, by its kind."""
    if image.kind == "label":
        return {"interpolation": label_interpolation}
    return {"interpolation": interpolation, "antialias": antialias}
