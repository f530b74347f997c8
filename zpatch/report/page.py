"""A report as one HTML page: no other file, no request, and nothing from a store that could run.

The page itself forbids all that in its content security policy; its own script is allowed by its digest.
"""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from zpatch.digests import Json
from zpatch.report.markup import Content, Html, joined, tag
from zpatch.report.page_parts import DASH, TIMES, count_text, facts, legend, number_text, problem_item, table
from zpatch.report.pictures import LabelColours
from zpatch.report.problems import Problem, grouped
from zpatch.report.style import SCRIPT, STYLE
from zpatch.report.summary import CohortSummary, ImageSummary
from zpatch.runtime.byte_sizes import format_bytes

GENERATOR = "zpatch report"
NAMES_SHOWN = 8
PROBLEMS_SHOWN = 200


def page_start(
    summary: CohortSummary, problems: Sequence[Problem], colours: LabelColours, pictured: int
) -> Html:
    """The page up to the sections of its subjects."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        f"base-uri 'none'; form-action 'none'"
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="generator", content=GENERATOR),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", summary.store.name),
        tag("style", Html(STYLE)),
    )
    parts = [
        _header(summary),
        _problems(summary, problems),
        _prediction(summary.attributes),
        _images(summary, colours),
        _subjects(summary, problems, pictured),
    ]
    return Html(f'<!doctype html>\n<html lang="en">\n{head}\n<body>\n{joined(parts)}')


def page_end() -> Html:
    """The page after the sections of its subjects."""
    how = (
        "Radiological convention: the patient's right is on the left of axial and coronal planes, sagittal "
        "planes face left. Planes lie along the axes of the voxels. Pictures show percentile 0.5 of the "
        "foreground (voxels that are not zero) as black and 99.5 as white; histograms are of what lies "
        "between, their heights square roots of counts."
    )
    return Html(f"{tag('footer', how)}{tag('script', Html(SCRIPT))}</body>\n</html>\n")


def _header(summary: CohortSummary) -> Html:
    images = summary.images.values()
    voxels, stored = sum(i.voxel_bytes for i in images), sum(i.stored_bytes for i in images)
    figures: list[tuple[str, str]] = [
        ("subjects", count_text(len(summary.rows))),
        ("images", count_text(sum(image.subjects for image in images))),
        ("of voxels", format_bytes(voxels)),
        ("stored", format_bytes(stored)),
        ("ratio", f"{voxels / max(stored, 1):.1f}"),
        (_plural("codec", len(summary.codecs)), ", ".join(sorted(summary.codecs)) or "none"),
    ]
    if any(summary.splits):
        figures += [(name or "no split", count_text(n)) for name, n in sorted(summary.splits.items())]
    made = [
        str(summary.attributes[key]) for key in ("tool", "created", "source") if key in summary.attributes
    ]
    where = " \N{MIDDLE DOT} ".join([str(summary.store), *made])
    pairs = [tag("div", tag("dt", name), tag("dd", value)) for name, value in figures]
    return joined(
        [tag("h1", summary.store.name), tag("p", where, class_="soft"), tag("dl", *pairs, class_="figures")]
    )


def _problems(summary: CohortSummary, problems: Sequence[Problem]) -> Html:
    files = f"{count_text(summary.checked.files)} files ({format_bytes(summary.checked.bytes)})"
    scope = f"{files} were compared with their recorded lengths; zpatch verify compares every byte."
    if not problems:
        return tag("section", tag("h2", "Problems"), tag("p", tag("b", "None found. "), scope, class_="well"))
    groups = grouped(problems)
    items = [problem_item(problem, _named(names)) for problem, names in groups[:PROBLEMS_SHOWN]]
    if len(groups) > PROBLEMS_SHOWN:
        items.append(tag("li", f"and {count_text(len(groups) - PROBLEMS_SHOWN)} more"))
    return tag(
        "section",
        tag("h2", "Problems", tag("small", count_text(len(problems)))),
        tag("ul", *items, class_="problems"),
        tag("p", scope, class_="soft"),
    )


def _named(names: Sequence[str]) -> str:
    more = f" and {count_text(len(names) - NAMES_SHOWN)} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


def _prediction(attributes: Json) -> Html:
    made = attributes.get("prediction")
    if not isinstance(made, dict):
        return Html()
    return tag("section", tag("h2", "Predicted with"), facts(made))


def _images(summary: CohortSummary, colours: LabelColours) -> Html:
    heading = ["image", "kind", "subjects", "shape", "voxel size", "type", "of voxels", "stored", "ratio"]
    rows = [
        (
            tag("b", name),
            _all(image.kinds),
            count_text(image.subjects),
            _range(image.shapes) + _channels(image),
            f"{_range(image.spacings)} {_all(image.units)}",
            _all(image.dtypes),
            format_bytes(image.voxel_bytes),
            format_bytes(image.stored_bytes),
            f"{image.voxel_bytes / max(image.stored_bytes, 1):.1f}",
        )
        for name, image in summary.images.items()
    ]
    legends = [
        legend(
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
    return tag("section", tag("h2", "Images"), table(heading, rows, numbers={2, 6, 7, 8}), *legends)


def _subjects(summary: CohortSummary, problems: Iterable[Problem], pictured: int) -> Html:
    counts = Counter(problem.subject for problem in problems)
    has_splits = any(summary.splits)
    heading = ["subject", *(["split"] if has_splits else []), "images", "shape", "stored", "problems"]
    rows = []
    for number, row in enumerate(summary.rows):
        name: Content = tag("a", row.name, href=f"#subject-{row.name}") if number < pictured else row.name
        split = [row.split or DASH] if has_splits else []
        found = count_text(counts[row.name]) if counts[row.name] else DASH
        rows.append((name, *split, ", ".join(row.images), row.shape, format_bytes(row.stored_bytes), found))
    tools = tag(
        "div",
        tag(
            "input",
            type="search",
            id="filter",
            placeholder="Filter subjects",
            aria_label="Filter subjects",
            hidden=True,
        ),
        tag("label", tag("input", type="checkbox", id="outlines", checked=True), " Outlines of labels"),
        class_="tools",
    )
    shown = f"{count_text(pictured)} of {count_text(len(rows))}"
    note = f"Pictures of the first {shown} subjects follow; --limit shows more."
    return tag(
        "section",
        tag("h2", "Subjects"),
        tools,
        table(
            heading, rows, numbers={len(heading) - 2, len(heading) - 1}, names=[r.name for r in summary.rows]
        ),
        *([tag("p", note, class_="soft")] if pictured < len(rows) else []),
    )


def _all(counts: Counter[str]) -> str:
    return ", ".join(sorted(counts))


def _channels(image: ImageSummary) -> str:
    several = sorted(n for n in image.channels if n > 1)
    return (
        f" {TIMES} {DASH.join(str(n) for n in dict.fromkeys((several[0], several[-1])))}" if several else ""
    )


def _range(ranges: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> str:
    return f" {TIMES} ".join(
        DASH.join(dict.fromkeys((number_text(low), number_text(high)))) for low, high in ranges.T.tolist()
    )


def _plural(name: str, count: int) -> str:
    return name if count == 1 else f"{name}s"
