"""One page about a store: its contents, pictures of its images, and its problems."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from zpatch.digests import Json
from zpatch.errors import OptionError, StoreExistsError
from zpatch.images.cohort import Cohort
from zpatch.records.image_record import ImageRecord
from zpatch.report.labels import LabelColours, labels_of
from zpatch.report.page import GENERATOR, page_html, section_html
from zpatch.report.problems import (
    Problem,
    problems_of_cohort,
    problems_of_files,
    problems_of_mixtures,
    problems_of_subject,
)
from zpatch.report.subject_section import SubjectSection, stored_images
from zpatch.report.summary import CohortSummary
from zpatch.runtime.task_contract import Progress
from zpatch.runtime.whole_file import whole_file
from zpatch.store.lock import writing_to
from zpatch.store.verification import verify

OUTPUT = "report.html"
SUBJECTS_SHOWN = 25


@dataclass(frozen=True, slots=True)
class WrittenReport:
    """A report that was written.

    ``output`` is its file, and ``bytes`` the size of the file. ``subjects`` is the number of subjects in its
    table, ``pictured`` the number of subjects with pictures. ``problems`` are all problems that it lists.
    """

    store: Path
    output: Path
    bytes: int
    subjects: int
    pictured: int
    problems: tuple[Problem, ...]

    @property
    def damaged(self) -> bool:
        """Whether any file is missing or differs from the file that was written."""
        return any(problem.is_damage for problem in self.problems)

    def to_json(self) -> Json:
        """The result as plain JSON."""
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
    """Write an HTML page about a store to ``output``, by default ``report.html``, as ``zpatch report`` does.

    The page is one file that loads no other. Its table lists all subjects; the first ``limit`` subjects have
    pictures. Only the chunks that cover three planes of an image are read, tile by tile, so that memory does
    not depend on the size of images, and grows with the number of subjects by one row each. An existing
    report is replaced, any other file is not. ``progress`` is called with the number of subjects drawn since
    the last call.

    Raises OptionError if the folder of ``output`` does not exist, and StoreExistsError if ``output`` is a
    file other than a report. Damaged files raise nothing: the page and the result list them.

    >>> import nibabel as nib
    >>> import numpy as np
    >>> import zpatch as zp
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     image = nib.Nifti1Image(np.ones((8, 9, 10), np.int16), np.eye(4))
    ...     image.to_filename(f"{folder}/ann.nii.gz")
    ...     report = zp.convert(folder, f"{folder}/cohort.zarr")
    ...     written = write_report(f"{folder}/cohort.zarr", f"{folder}/report.html")
    ...     "ann" in written.output.read_text()
    True
    """
    path = Path(OUTPUT if output is None else output)
    if limit < 0:
        raise OptionError(f"limit must be at least 0, not {limit}", option="limit")
    cohort = Cohort(store).matching(include, exclude)
    check_may_write(path)
    survey = _surveyed(cohort)
    problems = [*survey.problems]
    shown = cohort[:limit]
    # Reading the images may find more problems, and the page begins with the problems.
    with writing_to(path), tempfile.TemporaryFile("w+", encoding="utf-8") as sections:
        for subject in shown:
            section = SubjectSection.of(subject, survey.colours, problems)
            problems += section.unread
            sections.write(section_html(section, survey.colours))
            progress(1)
        sections.seek(0)
        with whole_file(path) as partial, partial.open("w", encoding="utf-8") as page:
            page.writelines(page_html(survey.summary, problems, survey.colours, len(shown), sections))
    return WrittenReport(
        store=Path(store),
        output=path,
        bytes=path.stat().st_size,
        subjects=len(cohort),
        pictured=len(shown),
        problems=tuple(problems),
    )


@dataclass(frozen=True, slots=True)
class _Survey:
    """A cohort before any image is read: its summary, its known problems, and the colours of its labels."""

    summary: CohortSummary
    problems: tuple[Problem, ...]
    colours: LabelColours


def _surveyed(cohort: Cohort) -> _Survey:
    checked = verify(cohort.store.path, quick=True)
    problems = problems_of_files(checked)
    summary = CohortSummary(cohort.store.path, cohort.store.attributes, checked)
    images: dict[str, list[str]] = {}
    labels: set[int] = set()
    every: list[ImageRecord] = []
    for subject in cohort:
        records = [image.record for image in stored_images(subject)]
        images[subject.name] = [record.image for record in records]
        every += records
        problems += problems_of_subject(records)
        summary.add(subject.name, subject.split, records)
        labels.update(label.value for r in records if r.kind == "label" for label in labels_of(r))
    problems += problems_of_cohort(images)
    problems += problems_of_mixtures(every)
    return _Survey(summary, tuple(problems), LabelColours(labels))


def check_may_write(path: Path) -> None:
    """Refuse a path without a folder, and a path of any existing file that is not a report."""
    if not path.parent.is_dir():
        raise OptionError(
            f"{path}: there is no folder {path.parent}; make it first, or choose another folder",
            option="output",
        )
    if not path.exists():
        return
    if path.is_file():
        with path.open("rb") as stream:
            if GENERATOR.encode() in stream.read(1000):
                return
    raise StoreExistsError(f"{path}: it exists and is not a report; choose another name with --output")
