"""A report as one HTML page: it loads no other file, and no text of a store can become markup or script.

Templates escape all values that they insert. The page's content security policy forbids every request, and
every script but the page's own, which it allows by its digest.
"""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined

from zpatch.digests import Json
from zpatch.records.image_record import ImageRecord
from zpatch.report.labels import LabelColours, labels_of
from zpatch.report.pictures import Overlay, Panel
from zpatch.report.problems import Problem, grouped
from zpatch.report.subject_section import SubjectSection
from zpatch.report.summary import CohortSummary
from zpatch.report.texts import (
    amount_text,
    bars_path,
    channels_text,
    count_text,
    data_uri,
    few_text,
    image_text,
    names_text,
    number_text,
    plain_text,
    provenance_text,
    ranges_text,
    skipped_text,
    visible,
)
from zpatch.runtime.byte_sizes import format_bytes

GENERATOR = "zpatch report"
PROBLEMS_SHOWN = 200
LABELS_SHOWN = 30

ROW_WIDTH_REM = 63  # of the pictures of a panel together
MODELS_SHOWN = 5
ROW_HEIGHT_REM = 22  # of the tallest picture of a panel
MANY_PANELS = 3
MANY_HEIGHT_REM = 14  # of the tallest picture, for subjects with that many panels

STATISTICS = {
    "voxels": "count",
    "min": "min",
    "0.5 %": "percentile_0_5",
    "median": "percentile_50",
    "99.5 %": "percentile_99_5",
    "max": "max",
    "mean": "mean",
    "sd": "std",
}


@dataclass(frozen=True, slots=True)
class LegendLabel:
    """A label in a legend: its colour in CSS, its name, and how much of it there is."""

    colour: str
    name: str
    amount: str


@dataclass(frozen=True, slots=True)
class Legend:
    """The legend of a label map: its first labels, and how many more it has."""

    image: str
    labels: tuple[LegendLabel, ...]
    more: int
    is_dashed: bool = False

    @classmethod
    def of(
        cls,
        image: str,
        amounts: Sequence[tuple[int, str, str]],
        colours: LabelColours,
        is_dashed: bool = False,
    ) -> Legend:
        """The legend of labels given as (value, name, amount)."""
        shown = (LegendLabel(colours.of(v), name, amount) for v, name, amount in amounts[:LABELS_SHOWN])
        return cls(image, tuple(shown), max(0, len(amounts) - LABELS_SHOWN), is_dashed)


def page_html(
    summary: CohortSummary,
    problems: Sequence[Problem],
    colours: LabelColours,
    pictured: int,
    sections: Iterable[str],
) -> Iterator[str]:
    """The page, in pieces of which none grows with the number of subjects.

    ``sections`` is the text of ``section_html`` of the first ``pictured`` subjects, in pieces of any size.
    """
    groups = grouped(problems)
    script = TEMPLATES.get_template("page.js").render()
    attributes = summary.attributes
    return TEMPLATES.get_template("page.html.j2").generate(
        generator=GENERATOR,
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        summary=summary,
        made=[attributes[key] for key in ("tool", "created", "source") if key in attributes],
        figures=_figures(summary),
        problems=problems,
        groups=groups[:PROBLEMS_SHOWN],
        more_groups=max(0, len(groups) - PROBLEMS_SHOWN),
        problem_counts=Counter(problem.subject for problem in problems),
        provenance=_provenance(summary),
        prediction=attributes.get("prediction"),
        legends=_legends_of_cohort(summary, colours),
        has_splits=any(summary.splits),
        pictured=pictured,
        sections=sections,
    )


def section_html(subject: SubjectSection, colours: LabelColours) -> str:
    """The section of a subject, as HTML."""
    panels = sum(len(image.panels) for image in subject.images)
    return TEMPLATES.get_template("subject.html.j2").render(
        subject=subject,
        problems=subject.known + subject.unread,
        height_rem=ROW_HEIGHT_REM if panels < MANY_PANELS else MANY_HEIGHT_REM,
        statistics=STATISTICS,
        maps=[(overlay.image.record, _legend_of_map(overlay, colours)) for overlay in subject.maps],
    )


def _figures(summary: CohortSummary) -> list[tuple[str, str]]:
    codecs = ", ".join(sorted(summary.codecs)) or "none"
    figures = [
        ("subjects", count_text(len(summary.rows))),
        ("images", count_text(summary.num_images)),
        ("of voxels", format_bytes(summary.voxel_bytes)),
        ("stored", format_bytes(summary.stored_bytes)),
        ("ratio", f"{summary.ratio:.1f}"),
        ("codec" if len(summary.codecs) == 1 else "codecs", codecs),
    ]
    if any(summary.splits):
        figures += [(name or "no split", count_text(n)) for name, n in sorted(summary.splits.items())]
    return figures


def _provenance(summary: CohortSummary) -> Json:
    """What made the predictions of a store, and from which inputs; empty for other stores."""
    facts: Json = {}
    for (name, path, version), images in summary.models.most_common(MODELS_SHOWN):
        of = f" ({images} images)" if len(summary.models) > 1 else ""
        facts[f"network{of}"] = f"{name}, {path or 'in memory'}, by zpatch {version}"
    if summary.inputs:
        facts["inputs"] = summary.inputs
    if summary.not_finite:
        facts["NaN or infinite"] = f"{count_text(summary.not_finite)} voxels"
    return facts


def _legends_of_cohort(summary: CohortSummary, colours: LabelColours) -> list[Legend]:
    """A legend for each label map, with the number of subjects that have each label."""
    return [
        Legend.of(
            name,
            [
                (value, label, f"in {n} of {image.subjects}")
                for (value, label), n in sorted(image.labels.items())
            ],
            colours,
        )
        for name, image in summary.images.items()
        if image.labels
    ]


def _legend_of_map(overlay: Overlay, colours: LabelColours) -> Legend:
    """The legend of a subject's label map, with the volume of each label."""
    record = overlay.image.record
    amounts = [(label.value, label.name, amount_text(record, label.voxels)) for label in labels_of(record)]
    return Legend.of(record.image, amounts, colours, overlay.is_dashed)


def _statistics(record: ImageRecord) -> list[tuple[str, Json]]:
    """The statistics of all voxels and of the foreground, each with its name."""
    foreground = record.stats.get("foreground")
    return [("all", record.stats), ("foreground", foreground if isinstance(foreground, dict) else {})]


def _rem_per_mm(panel: Panel, height_rem: float) -> float:
    """The one scale of a panel's pictures: the tallest is ``height_rem`` high, unless the row is too wide."""
    return min(
        height_rem / max(picture.height_mm for picture in panel.pictures),
        ROW_WIDTH_REM / sum(picture.width_mm for picture in panel.pictures),
    )


TEMPLATES = Environment(
    loader=PackageLoader("zpatch.report"),
    autoescape=True,
    finalize=visible,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters |= {
    "bytes": format_bytes,
    "channels": channels_text,
    "data_uri": data_uri,
    "description": image_text,
    "few": few_text,
    "names": names_text,
    "number": number_text,
    "path": bars_path,
    "plain": plain_text,
    "provenance": provenance_text,
    "ranges": ranges_text,
    "rem_per_mm": _rem_per_mm,
    "skipped": skipped_text,
    "statistics": _statistics,
    "whole": count_text,
}
