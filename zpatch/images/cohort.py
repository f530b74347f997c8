"""Cohorts: the subjects of a store, opened from its manifest alone."""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any, Self, overload

import numpy as np
from numpy.typing import NDArray

from zpatch.digests import Json
from zpatch.errors import OptionError, UnknownNameError
from zpatch.images.image import stored_image
from zpatch.images.subject import Subject, image_outline, outline
from zpatch.records.image_facts import ImageFacts
from zpatch.records.image_record import ImageRecord
from zpatch.records.manifest_table import ManifestTable
from zpatch.records.names import HISTOGRAM, chosen
from zpatch.store.store import Store, open_store, read_small_array
from zpatch.store.voxel_statistics import merged_statistics


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
        self._numbers = np.arange(len(self._table.subjects))  # of the subjects, in the table
        self._changes: tuple[Callable[[Subject], Subject], ...] = ()

    @property
    def _table(self) -> ManifestTable:
        return self.store.manifest.table

    @property
    def names(self) -> list[str]:
        """Names of the subjects."""
        return self._table.subjects.taken(self._numbers)

    @property
    def splits(self) -> dict[str, list[str]]:
        """Names of the subjects of each split."""
        splits: dict[str, list[str]] = {}
        for name, split in zip(self.names, self._splits.tolist(), strict=True):
            if split >= 0:
                splits.setdefault(self._table.splits[split], []).append(name)
        return splits

    @property
    def _splits(self) -> NDArray[np.int32]:
        """Numbers of the subjects' splits, (N,); -1 for none."""
        return np.asarray(self._table.arrays["split"][self._table.first_rows[self._numbers]])

    @property
    def metadata(self) -> dict[str, Json]:
        """Metadata of each subject, by name, from the store."""
        return dict(zip(self.names, self._metadata(), strict=True))

    def _metadata(self) -> Iterator[Json]:
        return map(self._table.meta_of, self._table.first_rows[self._numbers].tolist())

    @property
    def table(self) -> list[Json]:
        """A row of plain values for each image, as pandas and polars take them; no voxel is read.

        A row has ``subject``, ``split``, ``image``, ``kind``, ``channels``, ``i``, ``j``, ``k`` (voxels),
        ``dtype``, ``spacing_i``, ``spacing_j``, ``spacing_k`` (mm, or the unit of the affine),
        ``orientation`` and ``labels`` (the values of a label map, or None), and the metadata of the subject
        by their own names; one that is called as a column is ``metadata_NAME``.
        """
        rows = []
        for number, name, meta in zip(self._numbers.tolist(), self.names, self._metadata(), strict=True):
            for row in self._table.rows_of(number):
                own = {"subject": name, **self._columns(row)}
                rows.append(own | {f"metadata_{k}" if k in own else k: value for k, value in meta.items()})
        return rows

    def _columns(self, row: int) -> Json:
        """The columns of ``table`` of an image, but for its subject and metadata."""
        facts, (_, image) = self._facts(row), self._table.key(row)
        channels, i, j, k = facts.shape
        spacing = self._table.arrays["spacing"][row].tolist()
        return {
            "split": self._table.split_of(row),
            "image": image,
            "kind": facts.kind,
            "channels": channels,
            "i": i,
            "j": j,
            "k": k,
            "dtype": facts.dtype,
            **dict(zip(("spacing_i", "spacing_j", "spacing_k"), spacing, strict=True)),
            "orientation": facts.orientation,
            "labels": None if facts.labels is None else list(facts.labels),
        }

    def _facts(self, row: int) -> ImageFacts:
        facts = self._table.facts_of(row)
        if facts is None:
            self.store.records.at(row)  # a DamageError that says why
            raise AssertionError(row)
        return facts

    def facts(self, index: int) -> dict[str, ImageFacts]:
        """What is known of the images of a subject, by name, without parsing their records."""
        rows = self._table.rows_of(int(self._numbers[index]))
        return {self._table.key(row)[1]: self._facts(row) for row in rows}

    def first_alike(self) -> NDArray[np.int64]:
        """For each subject the first one that is alike: whose images have the same names and facts, (N,).

        Where ``map`` may have changed subjects each is like no other.
        """
        if self._changes:
            return np.arange(len(self))
        _, first, kinds = np.unique(
            self._table.arrays["alike"][self._numbers], return_index=True, return_inverse=True
        )
        return np.asarray(first[kinds])

    def outlines(self) -> Iterator[str]:
        """A line for each subject with all that identifies its images, for a digest of the cohort."""
        if self._changes:
            yield from map(outline, self)
            return
        for number, name in zip(self._numbers.tolist(), self.names, strict=True):
            yield f"{name}: {', '.join(map(self._outline, self._table.rows_of(number)))}"

    def _outline(self, row: int) -> str:
        """As ``outline`` of an image."""
        (subject, name), facts = self._table.key(row), self._facts(row)
        contents = self._table.contents_of(row) or self[subject][name].identity()
        return image_outline(name, facts.kind, facts.shape, contents)

    @property
    def statistics(self) -> dict[str, Json]:
        """Statistics over all subjects by the name of the image, as ``Normalize`` takes them.

        For an image: count, min, max, mean, std and percentiles, and the same of its foreground. For a label
        map: the number of voxels of each value.
        """
        records: dict[str, list[ImageRecord]] = {}
        for number in self._numbers.tolist():
            for record in map(self.store.records.at, self._table.rows_of(number)):
                records.setdefault(record.image, []).append(record)
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
        there = [self._table.splits[number] for number in np.unique(self._splits).tolist() if number >= 0]
        if name not in there:
            raise UnknownNameError.among("split", name, there, f"store {self.store.path}")
        return self._in_splits([name])

    def select(self, names: Sequence[str]) -> Self:
        """The subjects with these names, in this order."""
        mine = set(self._numbers.tolist())
        return self._only(np.array([self._number_of(name, mine) for name in names], dtype=np.int64))

    def _number_of(self, name: str, mine: Container[int]) -> int:
        """The number of a subject that is one of mine."""
        number = self._table.subjects.number_of(name)
        if number is None or number not in mine:
            raise UnknownNameError.among("subject", name, self.names, f"store {self.store.path}")
        return number

    def matching(self, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Self:
        """The subjects whose names match a pattern of ``include`` and no pattern of ``exclude``."""
        return self.select(chosen("subject", self.names, include, exclude, f"store {self.store.path}"))

    def where(
        self,
        *,
        split: str | Sequence[str] | None = None,
        labels: Mapping[str, Sequence[int]] | None = None,
        **metadata: Any,
    ) -> Self:
        """The subjects of a split, with any of some labels, and with some metadata; no voxel is read.

        ``split`` is a name, or several. ``labels`` has for the name of a label map the values of which it
        has at least one. ``metadata`` has for a key a value, several values, or a function that is called
        with the value and says whether the subject is chosen; a subject without the key is not. Calls can be
        chained. Raises UnknownNameError for a split, an image or a key that no subject has, and OptionError
        for an image whose labels are not known.

        As ``cohort.where(split="train", age=lambda age: age > 40, site=["A", "B"], labels={"seg": [3]})``.
        """
        chosen_part = self
        if split is not None:
            chosen_part = self._in_splits([split] if isinstance(split, str) else split)
        for image, values in (labels or {}).items():
            chosen_part = chosen_part._with_labels(image, values)
        for key, wanted_value in metadata.items():
            chosen_part = chosen_part._with_metadata(key, wanted_value)
        return chosen_part

    def _in_splits(self, wanted: Sequence[str]) -> Self:
        numbers = {name: number for number, name in enumerate(self._table.splits)}
        for name in wanted:
            if name not in numbers:
                raise UnknownNameError.among("split", name, numbers, f"store {self.store.path}")
        return self._only(self._numbers[np.isin(self._splits, [numbers[name] for name in wanted])])

    def _with_labels(self, image: str, values: Sequence[int]) -> Self:
        """The subjects with any of some values in a label map; alike subjects have the same."""
        wanted = {values} if isinstance(values, int) else {int(value) for value in values}
        alike, has = self.first_alike(), {}
        for index in np.unique(alike).tolist():
            facts = self.facts(index).get(image)
            if facts is not None and facts.labels is None:
                raise OptionError(f"the labels of {image!r} are not known: it is no label map of one channel")
            has[index] = facts and not wanted.isdisjoint(facts.labels or ())
        if len(self) and all(found is None for found in has.values()):
            names = sorted({name for index in has for name in self.facts(index)})
            raise UnknownNameError.among("image", image, names, f"store {self.store.path}")
        return self._only(self._numbers[np.array([bool(has[index]) for index in alike.tolist()], dtype=bool)])

    def _with_metadata(self, key: str, wanted: Any) -> Self:
        """The subjects whose metadata have a key with a wanted value."""
        metadata = list(self._metadata())
        if metadata and not any(key in meta for meta in metadata):
            there = sorted({name for meta in metadata for name in meta})
            raise UnknownNameError.among("metadata key", key, there, f"store {self.store.path}")
        is_wanted = _criterion(wanted)
        kept = [key in meta and bool(is_wanted(meta[key])) for meta in metadata]
        return self._only(self._numbers[np.array(kept, dtype=bool)])

    def map(self, fn: Callable[[Subject], Subject]) -> Self:
        """The cohort of ``fn(subject)`` for each subject, computed when a subject is accessed.

        ``fn`` may change images, as in ``lambda s: s.with_images(t1=zp.Normalize()(s.t1))``, but not the
        subject's name. It must be picklable where worker processes are not forked.
        """
        changed = self._only(self._numbers)
        changed._changes = (*self._changes, fn)
        return changed

    def _only(self, numbers: NDArray[np.int64]) -> Self:
        part = copy.copy(self)
        part._numbers = numbers
        return part

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, key: int | str) -> Subject: ...
    @overload
    def __getitem__(self, key: slice) -> Self: ...
    def __getitem__(self, key: int | str | slice) -> Subject | Self:
        if isinstance(key, slice):
            return self._only(self._numbers[key])
        return self._subject(
            self._number_of(key, self._numbers) if isinstance(key, str) else int(self._numbers[key])
        )

    def _subject(self, number: int) -> Subject:
        records = [self.store.records.at(row) for row in self._table.rows_of(number)]
        images = {r.image: stored_image(self.store.image_path(r), r) for r in records}
        first = records[0]
        subject = Subject.of(images, name=first.subject, split=first.split, metadata=first.meta)
        for change in self._changes:
            subject = change(subject)
        return subject

    def name_of(self, index: int) -> str:
        """The name of a subject by its number."""
        return self._table.subjects[int(self._numbers[index])]

    def __iter__(self) -> Iterator[Subject]:
        return map(self._subject, self._numbers.tolist())

    def __contains__(self, item: object) -> bool:
        number = self._table.subjects.number_of(item) if isinstance(item, str) else None
        return number is not None and number in self._numbers

    def __repr__(self) -> str:
        return f"Cohort({str(self.store.path)!r}: {len(self)} subjects)"


def first_alike(subjects: Sequence[Subject]) -> NDArray[np.int64]:
    """For each subject the first one that is alike, (N,), where that is known; see ``Cohort.first_alike``."""
    return subjects.first_alike() if isinstance(subjects, Cohort) else np.arange(len(subjects))


def names_of(subjects: Sequence[Subject]) -> list[str]:
    """The names of some subjects; a cohort has them without making its subjects."""
    return subjects.names if isinstance(subjects, Cohort) else [subject.name for subject in subjects]


def _criterion(wanted: Any) -> Callable[[Any], Any]:
    """Says whether a value of metadata is wanted: by a function, or as one of some values."""
    if callable(wanted):
        return wanted  # type: ignore[no-any-return]
    several = list(wanted) if isinstance(wanted, list | tuple | set | frozenset | range) else [wanted]
    return lambda value: value in several
