"""What all of a report is made of: tables, legends, problems, and numbers as people read them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from zpatch.digests import Json
from zpatch.report.markup import Content, Html, tag
from zpatch.report.pictures import LabelColours
from zpatch.report.problems import Problem

LABELS_SHOWN = 30

TIMES, DASH, MINUS = "\N{MULTIPLICATION SIGN}", "\N{EN DASH}", "\N{MINUS SIGN}"


def problem_item(problem: Problem, names: str) -> Html:
    """A problem in a list, after the names of its subjects."""
    where = ": ".join(part for part in (names, problem.image) if part)
    told = [tag("b", where), " ", problem.text] if where else [problem.text]
    return tag("li", *told, class_="damage" if problem.is_damage else None)


def facts(values: Json) -> Html:
    """Names and values, whatever a store has there."""
    pairs = [tag("div", tag("dt", key), tag("dd", _plain(value))) for key, value in values.items()]
    return tag("dl", *pairs, class_="facts")


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    if value is None or isinstance(value, bool):
        return {None: DASH, True: "yes", False: "no"}[value]
    return str(value)


def legend(
    image: str, labels: Sequence[tuple[int, str, str]], colours: LabelColours, *, dashed: bool = False
) -> Html:
    """The labels of an image: value, name and how much of it there is, each with its colour."""
    items = [
        tag(
            "li",
            tag("span", class_="chip", style=f"border-color:{colours.of(value)}"),
            f"{name} ",
            tag("span", amount, class_="soft"),
        )
        for value, name, amount in labels[:LABELS_SHOWN]
    ]
    if len(labels) > LABELS_SHOWN:
        items.append(tag("li", f"and {count_text(len(labels) - LABELS_SHOWN)} more", class_="soft"))
    kind = "legend dashed" if dashed else "legend"
    return tag("ul", tag("li", tag("b", image), *([] if items else [" no labels"])), *items, class_=kind)


def table(
    heading: Sequence[str],
    rows: Sequence[Sequence[Content]],
    *,
    numbers: Iterable[int],
    names: Sequence[str] = (),
) -> Html:
    """A table; of its columns ``numbers`` are set to the right. ``names`` are what its rows are found by."""
    kinds = ["number" if n in set(numbers) else None for n in range(len(heading))]
    cells = [tag("th", text, class_=kind) for text, kind in zip(heading, kinds, strict=True)]
    lines = []
    for number, row in enumerate(rows):
        name = names[number] if names else None
        lines.append(
            tag("tr", *(tag("td", c, class_=k) for c, k in zip(row, kinds, strict=True)), data_name=name)
        )
    return tag("table", tag("thead", tag("tr", *cells)), tag("tbody", *lines))


def number_text(value: object) -> str:
    """A number for people; what is none, as a dash."""
    if not isinstance(value, int | float):
        return DASH
    is_long = isinstance(value, int) or 1e4 <= abs(value) < 1e9
    text = count_text(round(value)) if is_long else f"{value:.4g}"
    return text.replace("-", MINUS)


def count_text(value: int) -> str:
    """A whole number for people."""
    return f"{value:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")
