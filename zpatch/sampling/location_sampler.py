"""LocationSampler: the patches of a table of locations that the user has made."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from zpatch.digests import digest
from zpatch.errors import OptionError, PatchLocationError
from zpatch.geometry.boxes import PatchLocation, centre_of
from zpatch.images.cohort import names_of
from zpatch.images.subject import Subject
from zpatch.sampling.patch import Patch
from zpatch.sampling.patch_sampler import READ_TOGETHER, PatchSampler, PatchSize

At = Literal["centre", "first"]
COLUMNS = ("subject", "i", "j", "k")


class LocationSampler(PatchSampler):
    """The patches at the rows (subject, i, j, k) of a table, in its order: lesions, clicks, hard examples.

    ``table`` is a sequence of such rows, as tuples or as dictionaries, or a table with these columns: of
    pandas, of polars, a structured array, or a dictionary of columns. The voxel (i, j, k) is the centre of
    the patch, its voxel ``p // 2``, or with ``at="first"`` its first one. In a queue each row comes once in a
    visit of its subject, whatever ``patches_per_volume`` is, and subjects without rows give no patches.

    Patches are inside the volume; with a ``padding_mode`` (see ``GridSampler``) only their centres are.
    Others are a PatchLocationError. Rows of subjects that the queue does not have are an UnknownNameError,
    values that are no integers an OptionError.

    >>> from zpatch.images.image import ScalarImage
    >>> subject = Subject(name="a", t1=ScalarImage(np.zeros((8, 8, 8))))
    >>> sampler = LocationSampler(4, [("a", 2, 3, 4), ("a", 6, 6, 6)])
    >>> [patch.location.index for patch in sampler(subject)]
    [(0, 1, 2), (4, 4, 4)]
    """

    def __init__(
        self,
        patch_size: PatchSize,
        table: Any,
        at: At = "centre",
        padding_mode: str | None = None,
        fill: float = 0,
        *,
        context: Sequence[int] = (),
    ) -> None:
        super().__init__(patch_size, context=context, padding_mode=padding_mode, fill=fill)
        if at not in get_args(At):
            raise OptionError(f"at must be 'centre' or 'first', not {at!r}")
        self.at = at
        names, self._voxels = _columns(table)
        self._digest = digest("\n".join(names).encode() + self._voxels.tobytes())
        self._rows: dict[str, list[int]] = {}  # of each subject
        for row, name in enumerate(names):
            self._rows.setdefault(name, []).append(row)

    def __len__(self) -> int:
        return len(self._voxels)

    def check(self, subject: Subject) -> None:
        """Refuse a subject with a row that no patch can be taken at."""
        if subject.name in self._rows:
            super().check(subject)
            self._starts(subject)

    def alike(self, subjects: Sequence[Subject]) -> NDArray[np.int64]:
        """Each subject is like no other, (N,): it has rows of its own."""
        return np.arange(len(subjects))

    @property
    def subject_names(self) -> Collection[str]:
        """Names of the subjects that have rows, which a queue must have."""
        return self._rows.keys()

    def counts(self, subjects: Sequence[Subject], patches_per_volume: int = 0) -> NDArray[np.int64]:
        """How many rows each subject has, (N,)."""
        return np.array([len(self._rows.get(name, ())) for name in names_of(subjects)], dtype=np.int64)

    def numbered(
        self,
        subject: Subject,
        numbers: Sequence[int],
        patches_per_volume: int | None = None,
        rng: np.random.Generator | None = None,
    ) -> list[PatchLocation]:
        """The patches at the rows of some numbers, among those of the subject."""
        starts = self._starts(subject)[np.array(numbers, dtype=np.int64)]
        return [PatchLocation((i, j, k), self.patch_size) for i, j, k in starts.tolist()]

    def locations(self, subject: Subject) -> list[PatchLocation]:
        """The locations of the patches of a subject, in the order of its rows; none without rows."""
        fitted = self.fitted(subject)
        return fitted.numbered(subject, range(len(self._rows.get(subject.name, ()))))

    def __call__(self, subject: Subject) -> Iterator[Patch]:
        """All patches of a subject, in the order of its rows."""
        locations = self.locations(subject)
        for n in range(0, len(locations), READ_TOGETHER):
            yield from self.read(subject, locations[n : n + READ_TOGETHER])

    def _starts(self, subject: Subject) -> NDArray[np.int64]:
        """The first voxels (n, 3) of the patches of a subject."""
        voxels = self._voxels[np.array(self._rows.get(subject.name, ()), dtype=np.int64)]
        to_centre = np.array([centre_of(0, p) for p in self.patch_size])
        starts = voxels - to_centre if self.at == "centre" else voxels
        low, high = starts, starts + self.patch_size
        if self.padding_mode is not None:
            low, high = starts + to_centre, starts + to_centre + 1
        outside = ((low < 0) | (high > np.array(subject.spatial_shape))).any(axis=1)
        if outside.any():
            what = "the patch" if self.padding_mode is None else "its centre"
            advice = "; leave it out, or say padding_mode=" if self.padding_mode is None else ""
            raise PatchLocationError(
                f"row {tuple(voxels[outside][0].tolist())} of subject {subject.name!r}: {what} is not inside "
                f"the volume of {subject.spatial_shape} voxels{advice}"
            )
        return starts

    def __repr__(self) -> str:
        return (
            f"LocationSampler(patch_size={self.patch_size}, {len(self)} rows {self._digest}, "
            f"at={self.at!r}, padding_mode={self.padding_mode!r}, fill={self.fill}"
            + (f", context={self.context})" if self.context else ")")
        )


def _columns(table: Any) -> tuple[list[str], NDArray[np.int64]]:
    """The names (n,) and voxels (n, 3) of a table."""
    is_structured = getattr(getattr(table, "dtype", None), "names", None) is not None
    try:
        if isinstance(table, Mapping) or hasattr(table, "columns") or is_structured:
            names, *axes = (list(table[name]) for name in COLUMNS)
        else:
            rows = [[row[c] for c in COLUMNS] if isinstance(row, Mapping) else list(row) for row in table]
            names, *axes = map(list, zip(*rows, strict=True)) if rows else ([], [], [], [])
        voxels = np.array(axes).T
    except (TypeError, ValueError, LookupError) as error:
        raise _refusal(f"{type(error).__name__}: {error}") from error
    if not names:
        raise OptionError("the table of a LocationSampler has no rows")
    if len(axes) != 3 or len(names) != len(voxels):
        raise _refusal(f"it has {len(axes) + 1} columns")
    if not all(isinstance(name, str) for name in names):
        raise _refusal(f"a subject is {next(name for name in names if not isinstance(name, str))!r}")
    if voxels.dtype.kind not in "iu":
        raise _refusal("i, j, k must be integers")
    return names, voxels.astype(np.int64)


def _refusal(why: str) -> OptionError:
    return OptionError(
        f"a LocationSampler takes rows of a subject's name and three integers, as [('sub-01', 40, 52, 31)], "
        f"or a table with the columns {', '.join(COLUMNS)} ({why})"
    )
