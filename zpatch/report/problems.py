"""What is wrong with a store, as far as a look at its manifest and its files' lengths can tell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from zpatch.digests import Json
from zpatch.geometry.affines import max_corner_distance
from zpatch.store.image_record import ImageRecord
from zpatch.store.verification import VerificationReport

AFFINE_TOLERANCE_VOXELS = 1e-3
SAME_GRID_VOXELS = 0.5


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is wrong, with which image of which subject if with one."""

    text: str
    subject: str | None = None
    image: str | None = None
    is_damage: bool = False

    def to_json(self) -> Json:
        """The problem as plain JSON."""
        return {"subject": self.subject, "image": self.image, "text": self.text, "damage": self.is_damage}


def problems_of_files(report: VerificationReport) -> list[Problem]:
    """What a verification found."""
    found = [Problem(f"subject {name!r} was announced and is not there", is_damage=True)
             for name in report.missing_subjects]  # fmt: skip
    for damage in report.damages:
        subject, _, rest = damage.file.partition("/")
        image, _, inside = rest.partition("/")
        names = (subject, image) if inside else (None, None)
        found.append(Problem(f"damaged: {damage}", names[0], names[1], is_damage=True))
    return found


def problems_of_subject(records: Sequence[ImageRecord]) -> list[Problem]:
    """Warnings of a subject's images, and images that do not lie on the grid of the first."""
    found = [Problem(str(text), r.subject, r.image) for r in records for text in r.warnings]
    first, *others = records
    for record in others:
        if record.spatial_shape != first.spatial_shape:
            text = f"its shape {record.spatial_shape} is not that of {first.image}, {first.spatial_shape}"
            found.append(Problem(text, record.subject, record.image))
        elif (apart := _apart(first, record)) > AFFINE_TOLERANCE_VOXELS:
            text = f"its affine puts voxels up to {apart:.3g} voxels from where that of {first.image} does"
            found.append(Problem(text, record.subject, record.image))
    return found


def problems_of_cohort(images: Mapping[str, Sequence[str]]) -> list[Problem]:
    """Images that a subject lacks and more than half of all have; ``images`` are names by subject."""
    counts: dict[str, int] = {}
    for names in images.values():
        for name in names:
            counts[name] = counts.get(name, 0) + 1
    usual = [name for name, count in counts.items() if 2 * count > len(images)]
    return [
        Problem("it is not there, and most subjects have it", subject, name)
        for subject, names in images.items()
        for name in usual
        if name not in names
    ]


def share_a_grid(first: ImageRecord, second: ImageRecord) -> bool:
    """Whether two images have the same voxels in the same places, to half a voxel."""
    return first.spatial_shape == second.spatial_shape and _apart(first, second) <= SAME_GRID_VOXELS


def _apart(first: ImageRecord, second: ImageRecord) -> float:
    return max_corner_distance(first.affine_array, second.affine_array, first.spatial_shape)


def grouped(problems: Iterable[Problem]) -> list[tuple[Problem, list[str]]]:
    """Equal problems of different subjects together, the worst first, each with the subjects' names."""
    groups: dict[tuple[bool, str | None, str], list[Problem]] = {}
    for problem in problems:
        groups.setdefault((not problem.is_damage, problem.image, problem.text), []).append(problem)
    ordered = sorted(groups.values(), key=lambda group: not group[0].is_damage)
    return [(group[0], [p.subject for p in group if p.subject is not None]) for group in ordered]
