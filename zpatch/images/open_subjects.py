"""The subjects of a path: those of a store, or one for an image that is read in place."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zpatch.errors import NotAStoreError, OptionError, SourceError
from zpatch.images.cohort import Cohort
from zpatch.images.image import ScalarImage
from zpatch.images.open_image import ANY_SLIDE, refuse_other_format
from zpatch.images.slide_image import SlideOptions
from zpatch.images.subject import Subject
from zpatch.records.names import ROOT_DOCUMENT
from zpatch.slides.slide_file import is_slide_file
from zpatch.store.store import is_store
from zpatch.volume_files.formats import MAPPED_SUFFIXES, kind_of


def open_subjects(
    path: Path,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    axes: str | None = None,
    time: int | None = None,
    channels: Sequence[int] | None = None,
    slide: SlideOptions = ANY_SLIDE,
) -> Sequence[Subject]:
    """The subjects of a store whose names match patterns; or one subject for an image that is read in place.

    That is a slide, an uncompressed file of a volume, an OME-Zarr image or a Zarr array. Its subject is named
    after the path, and its image is called ``image``. ``axes`` names the axes of an
    array without dimension names, as in ``"yxc"``; ``time`` and ``channels`` are what is read of it, and
    ``slide`` says which level of a slide.
    """
    if is_slide_file(path) and path.is_file():
        image = ScalarImage(path, axes=axes, time=time, channels=channels, **dataclasses.asdict(slide))
        return [_alone(path, image, include, exclude)]
    slide.refuse_any(path)
    refuse_other_format(path)
    if path.is_file() and path.name.lower().endswith(MAPPED_SUFFIXES):
        _refuse_options(path, axes=axes)
        return [_alone(path, ScalarImage(path, time=time, channels=channels), include, exclude)]
    if path.is_file() and (kind := kind_of(path.name)):
        raise SourceError(
            f"{path}: it is {kind}; make a store of its folder with "
            f"'zpatch convert {path.parent} STORE', and name STORE"
        )
    if path.is_file():
        raise NotAStoreError(
            f"{path}: files of this format are not read, but stores, OME-Zarr and Zarr; save it as one of "
            f"these, or as NIfTI for 'zpatch convert'"
        )
    is_zarr = (path / ROOT_DOCUMENT).exists() or any(path.glob(".z*"))
    if is_store(path) or not is_zarr:
        _refuse_options(path, axes=axes, time=time, channels=channels)
        return Cohort(path).matching(include, exclude)
    return [_alone(path, ScalarImage(path, axes=axes, time=time, channels=channels), include, exclude)]


def _refuse_options(path: Path, **options: Any) -> None:
    """Refuse options of Zarr arrays that were given for something else."""
    for option, value in options.items():
        if value is not None:
            raise OptionError(
                f"{path} is not a Zarr array; {option}= can be given for a Zarr array only", option=option
            )


def _alone(path: Path, image: ScalarImage, include: Sequence[str], exclude: Sequence[str]) -> Subject:
    """The subject of one image, named after its path."""
    if include or exclude:
        raise OptionError(f"{path} is one image; include= and exclude= are for a store", option="include")
    parts = [path.parent.name, path.name] if path.name.isdecimal() else [path.name]
    name = "-".join(re.sub(r"(\.ome)?\.[A-Za-z0-9]+$", "", part) for part in parts)
    name = re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip("._-") or "image"
    return Subject(name=name, image=image)
