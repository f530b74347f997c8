"""The page as HTML: no text of a store becomes markup, and templates name all that they use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import UndefinedError
from report_pages import Page

from zpatch.report.labels import LabelColours
from zpatch.report.page import TEMPLATES, page_html
from zpatch.report.problems import Problem
from zpatch.report.summary import CohortSummary
from zpatch.store.verification import VerificationReport


@given(st.text())
def test_text_never_becomes_markup(text: str) -> None:
    template = TEMPLATES.from_string('<p title="{{ text }}">{{ text }}</p><i>.</i>')
    page = Page(template.render(text=text))
    assert [name for name, _ in page.elements] == ["p", "i"]
    if text.isprintable():
        assert (page.text, page.all("p")[0]["title"]) == (f"{text}.", text)


@given(st.text(min_size=1))
def test_a_page_has_the_same_elements_whatever_the_texts_of_its_store(text: str) -> None:
    assert [name for name, _ in page_with(text).elements] == [name for name, _ in page_with("x").elements]


def page_with(text: str) -> Page:
    attributes: dict[str, Any] = {"tool": text, "created": text, "prediction": {text: text}}
    checked = VerificationReport(Path("store"), 1, 1, 1, True, (), (), ())
    summary = CohortSummary(Path("store"), attributes, checked)
    summary.models[text, text, text], summary.inputs = 1, text
    problems = [Problem(text, text, text, is_damage=True)]
    return Page("".join(page_html(summary, problems, LabelColours([]), 0, [])))


def test_a_name_that_a_template_does_not_know_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="'nothing' is undefined"):
        TEMPLATES.from_string("{{ nothing }}").render()
