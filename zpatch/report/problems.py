"""Problems of a store: warnings, mismatches and damage, from its manifest and the lengths of its files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from zpatch.digests import Json
from zpatch.errors import DamageError, one_line
from zpatch.geometry.affines import max_corner_distance
from zpatch.images.mixtures import ComparedImage, mixtures
from zpatch.records.image_record import ImageRecord
from zpatch.store.verification import VerificationReport

AFFINE_TOLERANCE_VOXELS = 1e-3
SAME_GRID_VOXELS = 0.5


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem of a store, of a subject or of an image.

    ``subject`` and ``image`` name where it is; both are None for a problem of the store as a whole.
    ``is_damage`` is whether files are missing or differ from the files that were written.
    """

    text: str
    subject: str | None = None
    image: str | None = None
    is_damage: bool = False

    @classmethod
    def of_reading(cls, record: ImageRecord, error: BaseException) -> Self:
        """The problem that reading an image raised ``error``."""
        return cls(one_line(error), record.subject, record.image, isinstance(error, DamageError))

    def to_json(self) -> Json:
        """The problem as plain JSON."""
        return {"subject": self.subject, "image": self.image, "text": self.text, "damage": self.is_damage}


def problems_of_files(report: VerificationReport) -> list[Problem]:
    """The missing subjects and the damaged files that a verification found."""
    found = [Problem(f"subject {name!r} is missing: it was announced, but never committed", is_damage=True)
             for name in report.missing_subjects]  # fmt: skip
    for damage in report.damages:
        subject, _, rest = damage.file.partition("/")
        image, _, inside = rest.partition("/")
        names = (subject, image) if inside else (None, None)
        found.append(Problem(f"damaged: {damage}", names[0], names[1], is_damage=True))
    return found


def problems_of_subject(records: Sequence[ImageRecord]) -> list[Problem]:
    """Warnings of a subject's images, empty label maps, and images on another grid than the first image."""
    found = [Problem(str(text), r.subject, r.image) for r in records for text in r.warnings]
    empty = [r for r in records if r.kind == "label" and isinstance(r.stats.get("labels"), dict)
             and not set(r.stats["labels"]) - {"0"}]  # fmt: skip
    found += [Problem("it is empty: all of its voxels are 0", r.subject, r.image) for r in empty]
    first, *others = records
    for record in others:
        if record.spatial_shape != first.spatial_shape:
            text = (
                f"its shape {record.spatial_shape} differs from that of {first.image}, {first.spatial_shape}"
            )
            found.append(Problem(text, record.subject, record.image))
        elif (distance := _distance_voxels(first, record)) > AFFINE_TOLERANCE_VOXELS:
            text = f"its affine moves voxels by up to {distance:.3g} voxels relative to that of {first.image}"
            found.append(Problem(text, record.subject, record.image))
    return found


def problems_of_cohort(images: Mapping[str, Sequence[str]]) -> list[Problem]:
    """Images that a subject lacks although more than half of all subjects have them.

    ``images`` are the names of the images of each subject, by subject.

    >>> problems = problems_of_cohort({"a": ["t1", "seg"], "b": ["t1", "seg"], "c": ["t1"]})
    >>> [(problem.subject, problem.image) for problem in problems]
    [('c', 'seg')]
    """
    counts: dict[str, int] = {}
    for names in images.values():
        for name in names:
            counts[name] = counts.get(name, 0) + 1
    usual = [name for name, count in counts.items() if 2 * count > len(images)]
    return [
        Problem("it is missing, and most subjects have it", subject, name)
        for subject, names in images.items()
        for name in usual
        if name not in names
    ]


def problems_of_mixtures(records: Sequence[ImageRecord]) -> list[Problem]:
    """What images of one name differ in, over all subjects, but for their shapes."""
    return [
        Problem(f"it has {text}", image=image)
        for image, text in mixtures(map(ComparedImage.of, records), shapes=False)
    ]


def share_a_grid(first: ImageRecord, second: ImageRecord) -> bool:
    """Whether two images have the same shape, and affines that agree to half a voxel."""
    return first.spatial_shape == second.spatial_shape and _distance_voxels(first, second) <= SAME_GRID_VOXELS


def _distance_voxels(first: ImageRecord, second: ImageRecord) -> float:
    return max_corner_distance(first.affine_array, second.affine_array, first.spatial_shape)


@dataclass(frozen=True, slots=True)
class ProblemGroup:
    """A problem that several subjects have in the same image; ``subjects`` are their names."""

    problem: Problem
    subjects: tuple[str, ...]


def grouped(problems: Iterable[Problem]) -> list[ProblemGroup]:
    """Problems with the same text and image as one group each, damage first."""
    groups: dict[tuple[bool, str | None, str], list[Problem]] = {}
    for problem in problems:
        groups.setdefault((not problem.is_damage, problem.image, problem.text), []).append(problem)
    ordered = sorted(groups.values(), key=lambda group: not group[0].is_damage)
    return [
        ProblemGroup(group[0], tuple(problem.subject for problem in group if problem.subject is not None))
        for group in ordered
    ]
