"""Cohorts: the subjects of a store, opened from its manifest alone."""

from __future__ import annotations

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self, overload

from zpatch.digests import Json
from zpatch.errors import NotAStoreError, OptionError, SourceError, UnknownNameError
from zpatch.images.image import ScalarImage, stored_image
from zpatch.images.open_image import ANY_SLIDE, refuse_other_format
from zpatch.images.slide_image import SlideOptions
from zpatch.images.subject import Subject
from zpatch.records.image_record import ImageRecord
from zpatch.records.names import HISTOGRAM, ROOT_DOCUMENT, chosen
from zpatch.slides.slide_file import is_slide_file
from zpatch.store.store import Store, is_store, open_store, read_small_array
from zpatch.store.voxel_statistics import merged_statistics
from zpatch.volume_files.formats import MAPPED_SUFFIXES, kind_of


class Cohort(Sequence[Subject]):
    """All subjects of a store, sorted by name; only the manifest is read.

    ``cohort[0]`` and ``cohort["sub-01"]`` are subjects; ``cohort[2:5]`` and ``cohort.split("train")`` are
    cohorts. An unknown name is an UnknownNameError, a KeyError.

    >>> import tempfile
    >>> import nibabel as nib
    >>> import numpy as np
    >>> import zpatch as zp
    >>> folder = tempfile.TemporaryDirectory()
    >>> for name in ("sub-01", "sub-02"):
    ...     image = nib.Nifti1Image(np.zeros((8, 9, 10), np.int16), np.eye(4))
    ...     image.to_filename(f"{folder.name}/{name}.nii.gz")
    >>> report = zp.convert(folder.name, f"{folder.name}/store")
    >>> cohort = zp.Cohort(f"{folder.name}/store")
    >>> cohort.names, cohort["sub-01"].image.shape, len(cohort[:1])
    (['sub-01', 'sub-02'], (1, 8, 9, 10), 1)
    >>> folder.cleanup()
    """

    def __init__(self, path: str | os.PathLike[str] | Store) -> None:
        self.store = path if isinstance(path, Store) else open_store(path)
        self._images: dict[str, list[str]] = {}
        for subject, image in self.store.records:
            self._images.setdefault(subject, []).append(image)
        self._names = sorted(self._images)
        self._changes: tuple[Callable[[Subject], Subject], ...] = ()

    @property
    def names(self) -> list[str]:
        """Names of the subjects."""
        return list(self._names)

    @property
    def splits(self) -> dict[str, list[str]]:
        """Names of the subjects of each split."""
        splits: dict[str, list[str]] = {}
        for name in self._names:
            split = self._split_of(name)
            if split is not None:
                splits.setdefault(split, []).append(name)
        return splits

    @property
    def metadata(self) -> dict[str, Json]:
        """Metadata of each subject, by name."""
        return {name: self[name].metadata for name in self._names}

    @property
    def statistics(self) -> dict[str, Json]:
        """Statistics over all subjects by the name of the image, as ``Normalize`` takes them.

        For an image: count, min, max, mean, std and percentiles, and the same of its foreground. For a label
        map: the number of voxels of each value.
        """
        records: dict[str, list[ImageRecord]] = {}
        for name in self._names:
            for image in self._images[name]:
                records.setdefault(image, []).append(self.store.records[name, image])
        return {image: self._statistics_of(found) for image, found in records.items()}

    def _statistics_of(self, records: Sequence[ImageRecord]) -> Json:
        if all(record.kind == "label" for record in records):
            counts: Counter[str] = Counter()
            for record in records:
                counts.update(record.stats["labels"])
            return {"labels": dict(counts)}
        records = [record for record in records if record.kind != "label"]
        histograms = [
            read_small_array(self.store.image_path(record), HISTOGRAM, record.files) for record in records
        ]
        zeros = [record.inter for record in records]
        return merged_statistics([record.stats for record in records], histograms, zeros)

    def split(self, name: str) -> Self:
        """The subjects of a split."""
        splits = self.splits
        if name not in splits:
            raise UnknownNameError.among("split", name, splits, f"store {self.store.path}")
        return self._only(splits[name])

    def select(self, names: Sequence[str]) -> Self:
        """The subjects with these names, in this order."""
        for name in names:
            if name not in self._names:
                raise UnknownNameError.among("subject", name, self._names, f"store {self.store.path}")
        return self._only(list(names))

    def matching(self, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Self:
        """The subjects whose names match a pattern of ``include`` and no pattern of ``exclude``."""
        return self._only(chosen("subject", self._names, include, exclude, f"store {self.store.path}"))

    def map(self, fn: Callable[[Subject], Subject]) -> Self:
        """The cohort of ``fn(subject)`` for each subject, computed when a subject is accessed.

        ``fn`` may change images, as in ``lambda s: s.with_images(t1=zp.Normalize()(s.t1))``, but not the
        subject's name. It must be picklable where worker processes are not forked.
        """
        changed = self._only(self._names)
        changed._changes = (*self._changes, fn)
        return changed

    def _only(self, names: list[str]) -> Self:
        part = type(self)(self.store)
        part._names = names
        part._changes = self._changes
        return part

    def _split_of(self, name: str) -> str | None:
        return self.store.records[name, self._images[name][0]].split

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, key: int | str) -> Subject: ...
    @overload
    def __getitem__(self, key: slice) -> Self: ...
    def __getitem__(self, key: int | str | slice) -> Subject | Self:
        if isinstance(key, slice):
            return self._only(self._names[key])
        if isinstance(key, str):
            return self.select([key])[0]
        return self._subject(self._names[key])

    def _subject(self, name: str) -> Subject:
        records = [self.store.records[name, image] for image in self._images[name]]
        images = {r.image: stored_image(self.store.image_path(r), r) for r in records}
        subject = Subject.of(images, name=name, split=records[0].split, metadata=records[0].meta)
        for change in self._changes:
            subject = change(subject)
        return subject

    def __iter__(self) -> Iterator[Subject]:
        return map(self._subject, self._names)

    def __contains__(self, item: object) -> bool:
        return item in self._names if isinstance(item, str) else False

    def __repr__(self) -> str:
        return f"Cohort({str(self.store.path)!r}: {len(self)} subjects)"


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
