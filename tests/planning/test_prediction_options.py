"""Options of a prediction: one list, which the function and the command line both keep to."""

from __future__ import annotations

import dataclasses
import inspect
import json
from typing import Any

import pytest

import zpatch as zp
from zpatch.errors import OptionError, PatchOverlapError, PatchSizeError
from zpatch.networks.model_identity import identity
from zpatch.planning.prediction_options import OF_THE_GRID, OF_THE_NETWORK, OF_THE_RUN, PredictOptions

FIELDS = {field.name: field for field in dataclasses.fields(PredictOptions)}


def test_predict_has_the_options_as_parameters_in_the_same_order_and_with_the_same_defaults() -> None:
    parameters = dict(list(inspect.signature(zp.predict).parameters.items())[3:])  # model, subjects, output
    assert [*parameters] == [*FIELDS, "progress", "on_times"]
    assert parameters["patch_overlap"].default == 0
    assert PredictOptions.of(image="t1", patch_size=16).patch_overlap == (0, 0, 0)
    assert parameters["model_axes"].default is None  # which depends on what is predicted
    assert PredictOptions.of(image="t1", patch_size=16).model_axes == FIELDS["model_axes"].default
    assert PredictOptions.of(image="t1", patch_size=16, of_slides=True).model_axes == "yx"
    for name, field in FIELDS.items():
        if field.default is not dataclasses.MISSING and name != "model_axes":
            assert parameters[name].default == field.default, name
            assert type(parameters[name].default) is type(field.default), name


def test_options_that_voxels_depend_on_are_stored_and_no_others() -> None:
    options = PredictOptions.of(image=["t1", "t2"], patch_size=(16, 8, 1), patch_overlap=(4, 2, 0))
    assert options.stored() == {
        "image": ["t1", "t2"],
        "patch_size": [16, 8, 1],
        "patch_overlap": [4, 2, 0],
        "overlap_mode": "hann",
        "reduce": "None",
        "batch_size": 1,
        "padding_mode": None,
        "normalize": None,
        "mask": None,
        "fill": "0.0",
    }
    added = {*OF_THE_GRID, "context"}
    assert {*options.stored(), *added, *OF_THE_NETWORK, *OF_THE_RUN} == FIELDS.keys()
    assert dataclasses.replace(options, context=(2, 4)).stored() == options.stored() | {"context": [2, 4]}
    other = dataclasses.replace(options, spacing=(1.5, None, 2.0)).stored()
    assert other == options.stored() | {
        "spacing": [1.5, None, 2.0],
        "orientation": None,
        "align": None,
        "output_grid": "native",
    }


@pytest.mark.parametrize(
    ("option", "value", "stored"),
    [
        ("reduce", "argmax", "'argmax'"),
        ("reduce", ("threshold", 0.5), "('threshold', 0.5)"),
        ("reduce", abs, identity(abs)),
        ("mask", "brain", "brain"),
        ("mask", print, identity(print)),
        ("fill", float("nan"), "nan"),
        ("fill", 3, "3.0"),
        ("padding_mode", "reflect", "reflect"),
    ],
)
def test_each_option_is_stored_as_json(option: str, value: Any, stored: Any) -> None:
    options = PredictOptions.of(**{"image": "t1", "patch_size": 16, option: value})
    assert options.stored()[option] == stored
    assert json.loads(json.dumps(options.stored(), allow_nan=False)) == options.stored()


@pytest.mark.parametrize("mode", [None, "constant"])
def test_patches_are_read_with_the_padding_mode_or_with_the_edge(mode: str | None) -> None:
    options = PredictOptions.of(image="t1", patch_size=16, padding_mode=mode)
    assert (options.reading_mode, options.pads_border) == (mode or "edge", mode is not None)


def test_options_are_accepted_in_the_forms_of_predict() -> None:
    options = PredictOptions.of(image="t1", patch_size=16, patch_overlap=(4, 4, 0))
    assert (options.image, options.patch_size, options.patch_overlap) == (("t1",), (16,) * 3, (4, 4, 0))
    assert PredictOptions.of(image=["t1", "t2"], patch_size=16).image == ("t1", "t2")


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"image": []}, OptionError, "image= names no image to predict from"),
        ({"batch_size": 0}, OptionError, "batch_size must be at least 1, not 0"),
        ({"jobs": -1}, OptionError, "jobs must be at least 1, not -1"),
        ({"overlap_mode": "mean"}, OptionError, "overlap_mode must be one of"),
        ({"reduce": "argmin"}, OptionError, "reduce must be 'argmax'"),
        ({"padding_mode": "mirror"}, OptionError, "padding_mode must be"),
        ({"normalize": "minmax"}, OptionError, "normalize must be one of zscore, clip, not 'minmax'"),
        ({"max_memory": "much"}, OptionError, "'much' is not a number of bytes"),
        ({"patch_size": 0}, PatchSizeError, "patch_size"),
        ({"patch_overlap": 3}, PatchOverlapError, "even"),
        ({"patch_overlap": 16}, PatchOverlapError, "smaller"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        PredictOptions.of(**{"image": "t1", "patch_size": 16, **options})
