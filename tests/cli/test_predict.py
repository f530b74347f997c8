"""Options of ``zpatch predict``: the choices, defaults and names of the library."""

from __future__ import annotations

import dataclasses
from typing import Any

import click
import pytest

from zpatch.blending import reduction
from zpatch.cli.predict import predict_command
from zpatch.cli.prediction_inputs import reductions
from zpatch.geometry.padding import PADDING_MODES
from zpatch.images import normalization
from zpatch.planning.prediction_options import PredictOptions
from zpatch.tiling.windows import OVERLAP_MODES

PARAMETERS: dict[str | None, Any] = {parameter.name: parameter for parameter in predict_command.params}
OF_THE_COMMAND = {
    "store", "output", "model", "axes", "time", "channels", "include", "exclude", "dry_run", "no_resume",
    "json", "mpp", "level", "slide_mpp", "tissue",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("overlap_mode", OVERLAP_MODES),
        ("padding_mode", PADDING_MODES),
        ("normalize", normalization.MODES),
    ],
)
def test_the_command_offers_the_choices_of_the_library(name: str, choices: tuple[str, ...]) -> None:
    assert isinstance(PARAMETERS[name].type, click.Choice)
    assert tuple(PARAMETERS[name].type.choices) == choices


@pytest.mark.parametrize(
    ("texts", "reduce"),
    [
        (["none"], None),
        (["threshold"], ("threshold", 0.5)),
        (["threshold:0.25"], ("threshold", 0.25)),
        (["seg=argmax"], {"seg": "argmax"}),
        (
            ["seg=argmax", "dist=none", "edge=threshold:2"],
            {"seg": "argmax", "dist": None, "edge": ("threshold", 2)},
        ),
    ],
)
def test_reductions_are_one_for_all_outputs_or_one_for_each(texts: list[str], reduce: Any) -> None:
    assert reductions(texts) == reduce


@pytest.mark.parametrize("texts", [["argmax", "none"], ["seg=argmax", "none"], ["seg=argmax", "seg=none"]])
def test_reductions_that_contradict_each_other_are_refused(texts: list[str]) -> None:
    text = f"^{' '.join(texts)}: give one for all outputs, or one for each as OUTPUT=HOW$"
    with pytest.raises(click.BadParameter, match=text) as error:
        reductions(texts)
    assert error.value.param_hint == "--reduce"


def test_the_help_names_every_reduction() -> None:
    for name in (*reduction._FUNCTIONS, "threshold:T", "none"):
        assert name in PARAMETERS["reduce"].help


@pytest.fixture
def parsed() -> dict[str, Any]:
    """The parameters of the command where only the required ones are given."""
    arguments = ["in.zarr", "out.zarr", "--model", "net.pt2", "--patch-size", "16"]
    return predict_command.make_context("predict", arguments).params


def test_the_command_has_every_option_of_a_prediction_under_its_name(parsed: dict[str, Any]) -> None:
    options = {field.name for field in dataclasses.fields(PredictOptions)}
    assert parsed.keys() - OF_THE_COMMAND == options - {"resume"}


def test_the_defaults_are_those_of_the_library(parsed: dict[str, Any]) -> None:
    options = PredictOptions.of(image="t1", patch_size=16)
    given = {**parsed, "image": "t1", "reduce": None, "resume": not parsed["no_resume"]}
    assert PredictOptions.of(**{f.name: given[f.name] for f in dataclasses.fields(options)}) == options
    assert parsed["reduce"] == ("none",)
