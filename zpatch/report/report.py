"""One page about a store: what is in it, what it looks like, and what is wrong with it."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from zpatch.digests import Json
from zpatch.errors import DamageError, OptionError, StoreExistsError, one_line
from zpatch.geometry.boxes import PatchLocation, Triple
from zpatch.images.cohort import Cohort
from zpatch.images.subject import Subject
from zpatch.report.page import GENERATOR, page_end, page_start
from zpatch.report.pictures import (
    LabelColours,
    Overlay,
    Stored,
    label_names,
    longest_side,
    panels_of,
)
from zpatch.report.problems import (
    Problem,
    problems_of_cohort,
    problems_of_files,
    problems_of_subject,
    share_a_grid,
)
from zpatch.report.subject_section import section_of
from zpatch.report.summary import CohortSummary, ImageSection, SubjectSection, histogram_of
from zpatch.runtime.task_contract import Progress
from zpatch.store.image_record import ImageRecord
from zpatch.store.verification import verify

OUTPUT = "report.html"
SUBJECTS_SHOWN = 25


@dataclass(frozen=True, slots=True)
class WrittenReport:
    """A page that was written, and what it says is wrong. ``pictured`` is how many subjects have pictures."""

    store: Path
    output: Path
    bytes: int
    subjects: int
    pictured: int
    problems: tuple[Problem, ...]

    @property
    def damaged(self) -> bool:
        """Whether anything is not as it was written, or missing."""
        return any(problem.is_damage for problem in self.problems)

    def to_json(self) -> Json:
        """The report as plain JSON."""
        return {
            "store": str(self.store),
            "output": str(self.output),
            "bytes": self.bytes,
            "subjects": self.subjects,
            "pictured": self.pictured,
            "problems": [problem.to_json() for problem in self.problems],
        }


@np.errstate(all="ignore")  # a manifest may say anything
def write_report(
    store: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    limit: int = SUBJECTS_SHOWN,
    progress: Progress = lambda subjects: None,
) -> WrittenReport:
    """Write a page about a store, ``report.html`` if not said otherwise, as ``zpatch report`` does.

    The page is one file that asks for no other. The first ``limit`` subjects have pictures; all are in its
    table. Of an image only the chunks that cover its three planes are read, tile by tile: memory does not
    depend on its size, and on the number of subjects only by a line for each. A report that is there is
    replaced; anything else is not. ``progress`` is told the subjects done.
    """
    path = Path(OUTPUT if output is None else output)
    if limit < 0:
        raise OptionError(f"limit must be at least 0, not {limit}")
    cohort = Cohort(store).matching(include, exclude)
    _check_may_write(path)
    checked = verify(store, quick=True)
    problems = [*problems_of_files(checked)]
    summary = CohortSummary(cohort.store.path, cohort.store.attributes, checked)
    images: dict[str, list[str]] = {}
    labels: set[int] = set()
    for subject in cohort:
        records = [record for _, record in _stored(subject)]
        images[subject.name] = [record.image for record in records]
        problems += problems_of_subject(records)
        summary.add(subject.name, subject.split, records)
        labels.update(value for r in records if r.kind == "label" for value in label_names(r))
    problems += problems_of_cohort(images)
    colours = LabelColours(labels)
    shown = cohort[:limit]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as sections:
        for subject in shown:
            section = _section(subject, colours, problems)
            sections.write(section_of(section, colours))
            progress(1)
        sections.seek(0)
        _write(path, summary, problems, colours, len(shown), sections)
    return WrittenReport(
        store=Path(store),
        output=path,
        bytes=path.stat().st_size,
        subjects=len(cohort),
        pictured=len(shown),
        problems=tuple(problems),
    )


def _write(
    path: Path,
    summary: CohortSummary,
    problems: Sequence[Problem],
    colours: LabelColours,
    pictured: int,
    sections: IO[str],
) -> None:
    """Put the page together beside its place, and move it there."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as page:
            page.write(page_start(summary, problems, colours, pictured))
            shutil.copyfileobj(sections, page)
            page.write(page_end())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _check_may_write(path: Path) -> None:
    """Refuse a place without a folder, and to replace anything but a report."""
    if not path.parent.is_dir():
        raise OptionError(f"{path}: there is no folder {path.parent}; make it first, or choose another")
    if not path.exists():
        return
    if path.is_file():
        with path.open("rb") as stream:
            if GENERATOR.encode() in stream.read(1000):
                return
    raise StoreExistsError(f"{path}: there is something else there; choose another name with --output")


def _section(subject: Subject, colours: LabelColours, problems: list[Problem]) -> SubjectSection:
    """Pictures and figures of a subject; what cannot be read is added to the problems."""
    stored = _stored(subject)
    maps = [image for image in stored if image[1].kind == "label"]
    others = [image for image in stored if image[1].kind != "label"]
    side = longest_side([record for _, record in others])
    covered: set[str] = set()
    unread: set[str] = set()

    def failed(record: ImageRecord, error: BaseException) -> None:
        if record.image not in unread:  # once: each plane may meet other chunks
            is_damage = isinstance(error, DamageError)
            problems.append(Problem(one_line(error), record.subject, record.image, is_damage))
        unread.add(record.image)

    def image_section(image: Stored, over: Sequence[Overlay] = ()) -> ImageSection:
        folder, record = image
        covered.update(found.image for (_, found), _ in over)
        middle = _middle([*(found for (_, found), _ in over), record])
        panels = tuple(panels_of(image, over, middle, side, colours, failed))
        histogram = None
        try:
            histogram = None if record.kind == "label" else histogram_of(folder, record)
        except DamageError as error:
            failed(record, error)
        return ImageSection(record, panels, histogram)

    sections = [
        image_section(image, [(m, n % 2 == 1) for n, m in enumerate(maps) if share_a_grid(image[1], m[1])])
        for image in others
    ]
    sections += [image_section(image) for image in maps if image[1].image not in covered]
    return SubjectSection(
        name=subject.name,
        split=subject.split,
        metadata=subject.metadata,
        images=tuple(sections),
        maps=tuple(record for _, record in maps),
        problems=tuple(problem for problem in problems if problem.subject == subject.name),
    )


def _stored(subject: Subject) -> list[Stored]:
    images = subject.images.values()
    return [(image.folder, image.record) for image in images if image.folder and image.record]


def _middle(records: Sequence[ImageRecord]) -> Triple:
    """The middle voxel of the foreground of the first of some images on one grid that has any."""
    shape = records[0].spatial_shape
    for record in records:
        with contextlib.suppress(KeyError, TypeError, ValueError, OverflowError):
            ends = np.array(record.stats["foreground_box"], dtype=np.int64).reshape(2, 3)
            i, j, k = (ends.sum(axis=0) // 2).tolist()
            if PatchLocation((i, j, k), (1, 1, 1)).lies_within(shape):
                return i, j, k
    i, j, k = (n // 2 for n in shape)
    return i, j, k
