"""A report as one HTML page: it loads no other file, and no text of a store can become markup or script.

Templates escape all values that they insert. The page's content security policy forbids every request, and
every script but the page's own, which it allows by its digest.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray

from zpatch.geometry.affines import spacing_mm
from zpatch.report.labels import LabelColours, labels_of
from zpatch.report.pictures import Panel
from zpatch.report.problems import Problem, grouped
from zpatch.report.subject_section import Histogram, SubjectSection
from zpatch.report.summary import CohortSummary, shape_text, unit_text
from zpatch.runtime.byte_sizes import format_bytes
from zpatch.store.image_record import ImageRecord

GENERATOR = "zpatch report"
NAMES_SHOWN = 8
PROBLEMS_SHOWN = 200
LABELS_SHOWN = 30

ROW_WIDTH_REM = 63  # of the pictures of a panel together
ROW_HEIGHT_REM = 22  # of the tallest picture of a panel
MANY_PANELS = 3
MANY_HEIGHT_REM = 14  # of the tallest picture, for subjects with that many panels

TIMES, DASH, MINUS = "\N{MULTIPLICATION SIGN}", "\N{EN DASH}", "\N{MINUS SIGN}"

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


def page_parts(
    summary: CohortSummary,
    problems: Sequence[Problem],
    colours: LabelColours,
    pictured: int,
    sections: Iterable[str],
) -> Iterator[str]:
    """The page in parts, of which none grows with the number of subjects.

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
        legends=_legends_of_subject(subject, colours),
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


def _legends_of_subject(subject: SubjectSection, colours: LabelColours) -> list[Legend]:
    """A legend for each label map of a subject, with the volume of each label."""
    return [
        Legend.of(
            record.image,
            [(label.value, label.name, _amount(record, label.voxels)) for label in labels_of(record)],
            colours,
            is_dashed=number % 2 == 1,
        )
        for number, record in enumerate(subject.maps)
    ]


def _amount(record: ImageRecord, voxels: int) -> str:
    """The number of voxels, or their volume if the voxel size is in mm."""
    volume_ml = voxels * math.prod(spacing_mm(record.affine_array)) / 1000
    if record.spatial_unit != "millimeter" or not math.isfinite(volume_ml):
        return f"{count_text(voxels)} voxels"
    return f"{volume_ml:.3g} ml" if volume_ml < 1000 else f"{volume_ml:.0f} ml"


# Filters: the values of a report, as text.


def visible(value: object) -> object:
    r"""A value as text that shows all its characters, also control characters and changes of direction.

    >>> print(visible("a\u202eb"))
    a\u202eb
    """
    if hasattr(value, "__html__"):
        return value
    text = str(value)
    return text if text.isprintable() else "".join(map(_visible_character, text))


def _visible_character(character: str) -> str:
    if character.isprintable() or unicodedata.category(character) == "Zs":
        return character
    return character.encode("unicode_escape").decode()


def count_text(value: int) -> str:
    """An integer with its digits in groups of three."""
    return f"{value:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def number_text(value: object) -> str:
    """A number in four digits, or all digits of an integer; a dash for anything else.

    >>> number_text(0.123456), number_text(12), number_text(45678.9) == count_text(45679)
    ('0.1235', '12', True)
    """
    if not isinstance(value, int | float):
        return DASH
    is_long = isinstance(value, int) or 1e4 <= abs(value) < 1e9
    text = count_text(round(value)) if is_long else f"{value:.4g}"
    return text.replace("-", MINUS)


def _plain(value: object) -> str:
    """A value of JSON as text."""
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    if value is None or isinstance(value, bool):
        return {None: DASH, True: "yes", False: "no"}[value]
    return str(value)


def _few(names: Sequence[str]) -> str:
    more = f" and {count_text(len(names) - NAMES_SHOWN)} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


def _names(counts: Counter[str]) -> str:
    return ", ".join(sorted(counts))


def _ranges(ranges: NDArray[np.float64]) -> str:
    """The least and the greatest value (2, 3) along each axis; once where they are equal."""
    return f" {TIMES} ".join(
        DASH.join(dict.fromkeys((number_text(low), number_text(high)))) for low, high in ranges.T.tolist()
    )


def _channels(counts: Counter[int]) -> str:
    """The least and the greatest number of channels above one, after a shape."""
    several = sorted(n for n in counts if n > 1)
    return f" {TIMES} {DASH.join(map(str, dict.fromkeys((several[0], several[-1]))))}" if several else ""


def _description(record: ImageRecord) -> str:
    """Kind, shape, voxel size, type and source file of an image."""
    channels = record.shape_czyx[0]
    word = "time points" if record.axes[0] == "t" else "channels"
    spacing = f" {TIMES} ".join(map(number_text, spacing_mm(record.affine_array)))
    described = [
        record.kind,
        shape_text(record) + (f" {TIMES} {channels} {word}" if channels > 1 else ""),
        f"{spacing} {unit_text(record.spatial_unit)}",
        np.dtype(record.dtype).name,
        *([str(record.source.path)] if record.source else []),
    ]
    return " \N{MIDDLE DOT} ".join(described)


def _statistics(record: ImageRecord) -> list[tuple[str, dict[str, Any]]]:
    foreground = record.stats.get("foreground")
    return [("all", record.stats), ("foreground", foreground if isinstance(foreground, dict) else {})]


@dataclass(frozen=True, slots=True)
class Skipped:
    """Voxels that a prediction skipped: their number, and their share as text."""

    voxels: int
    share: str


def _skipped(record: ImageRecord) -> Skipped | None:
    skipped, voxels = record.stats.get("skipped"), math.prod(record.spatial_shape)
    if not isinstance(skipped, int) or not 0 < skipped <= voxels:
        return None
    return Skipped(skipped, f"{skipped / voxels:.0%}")


def _rem_per_mm(panel: Panel, height_rem: float) -> float:
    """The one scale of a panel's pictures: the tallest is ``height_rem`` high, unless the row is too wide."""
    return min(
        height_rem / max(picture.height_mm for picture in panel.pictures),
        ROW_WIDTH_REM / sum(picture.width_mm for picture in panel.pictures),
    )


def _path(histogram: Histogram) -> str:
    """The bars of a histogram as an SVG path, 1 wide each and 100 high at most."""
    heights = np.sqrt(histogram.counts)  # else the noise of air would dwarf all other bars
    heights *= 100 / max(float(heights.max(initial=0)), 1e-9)
    bars = "".join(f"V{100 - height:.1f}H{n + 1}" for n, height in enumerate(heights.tolist()))
    return f"M0 100{bars}V100Z"


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


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
    "channels": _channels,
    "data_uri": _data_uri,
    "description": _description,
    "few": _few,
    "names": _names,
    "number": number_text,
    "path": _path,
    "plain": _plain,
    "ranges": _ranges,
    "rem_per_mm": _rem_per_mm,
    "skipped": _skipped,
    "statistics": _statistics,
    "whole": count_text,
}
