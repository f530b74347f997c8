"""Blended voxels are reduced to classes, to probabilities, or by a function."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray

from zpatch.blending import reduction
from zpatch.blending.reduction import (
    Finaliser,
    as_stored,
    check_channels,
    check_known,
    check_reduction,
    fitting_fill,
    kind_of,
    not_finite,
    reduce_channels,
)
from zpatch.errors import ModelError, OptionError

CHANNELS = 5


@pytest.fixture
def voxels(rng: np.random.Generator) -> torch.Tensor:
    """(C, I, J, K)."""
    return torch.from_numpy(rng.normal(size=(CHANNELS, 4, 3, 2)).astype(np.float32))


def test_none_leaves_the_voxels_as_they_are(voxels: torch.Tensor) -> None:
    assert torch.equal(reduce_channels(voxels, None), voxels)


def test_argmax_gives_the_first_channel_of_the_largest_value(voxels: torch.Tensor) -> None:
    voxels[3] = voxels[1]
    classes = reduce_channels(voxels, "argmax")
    np.testing.assert_array_equal(classes[0].numpy(), np.argmax(voxels.numpy(), axis=0))
    assert classes.shape == (1, 4, 3, 2)


@pytest.mark.parametrize(
    ("classes", "dtype"), [(2, torch.uint8), (256, torch.uint8), (257, torch.int16), (2**15 + 1, torch.int32)]
)
def test_argmax_gives_the_smallest_integers_that_hold_the_classes(classes: int, dtype: torch.dtype) -> None:
    voxels = torch.zeros(classes, 1, 1, 1)
    voxels[-1] = 1
    found = reduce_channels(voxels, "argmax")
    assert (found.dtype, found.item()) == (dtype, classes - 1)


def test_softmax_gives_probabilities_over_the_channels(voxels: torch.Tensor) -> None:
    powers = np.exp(voxels.numpy().astype(np.float64))
    np.testing.assert_allclose(reduce_channels(voxels, "softmax"), powers / powers.sum(axis=0), rtol=1e-5)


def test_sigmoid_gives_a_probability_for_each_channel(voxels: torch.Tensor) -> None:
    wanted = 1 / (1 + np.exp(-voxels.numpy().astype(np.float64)))
    np.testing.assert_allclose(reduce_channels(voxels, "sigmoid"), wanted, rtol=1e-5)


@pytest.mark.parametrize("limit", [0.5, 0, -1])
def test_threshold_marks_voxels_above_the_limit(voxels: torch.Tensor, limit: float) -> None:
    voxels[0, 0, 0, 0] = limit
    marks = reduce_channels(voxels, ("threshold", limit))
    assert marks.dtype == torch.uint8
    np.testing.assert_array_equal(marks, voxels.numpy() > limit)
    assert marks[0, 0, 0, 0] == 0


def test_a_function_may_change_the_channels(voxels: torch.Tensor) -> None:
    pairs = reduce_channels(voxels, lambda v: v[:2] * 3)
    assert torch.equal(pairs, voxels[:2] * 3)


def test_the_result_has_the_dtype_asked_for(voxels: torch.Tensor) -> None:
    assert reduce_channels(voxels, "argmax", torch.int64).dtype == torch.int64
    assert reduce_channels(voxels, None, torch.float16).dtype == torch.float16


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda v: v[:, :1], r"made \(5, 1, 3, 2\) of \(5, 4, 3, 2\); only the channels may change"),
        (lambda v: v[0], r"made \(4, 3, 2\) of \(5, 4, 3, 2\)"),
        (lambda v: v.numpy(), r"made ndarray of \(5, 4, 3, 2\)"),
    ],
)
def test_a_function_that_changes_more_than_channels_is_refused(
    voxels: torch.Tensor, function: Any, text: str
) -> None:
    with pytest.raises(ModelError, match=text):
        reduce_channels(voxels, function)


def positive_channels(voxels: torch.Tensor) -> torch.Tensor:
    """The channels with any positive voxel: as many as the values say."""
    return voxels[voxels.flatten(1).amax(1) > 0]


@pytest.mark.parametrize("channels", [None, 2])
def test_a_function_whose_number_of_channels_depends_on_the_values_is_refused(channels: int | None) -> None:
    finalise = Finaliser(positive_channels, channels=channels)
    assert len(finalise(torch.ones(2, 3, 3, 3)).voxels) == 2
    text = (
        r"made 0 channels of some voxels and 2 of others; the number of channels must not depend on the val"
    )
    with pytest.raises(ModelError, match=text):
        finalise(-torch.ones(2, 3, 3, 3))


@pytest.mark.parametrize(("is_stored", "dtype"), [(False, torch.float16), (True, torch.float32)])
def test_stored_final_voxels_are_cast_to_a_type_that_an_image_can_have(
    is_stored: bool, dtype: torch.dtype, voxels: torch.Tensor
) -> None:
    final = Finaliser("softmax", torch.float16, is_stored=is_stored)(voxels).voxels
    assert final.dtype == dtype
    assert torch.equal(final, reduce_channels(voxels, "softmax", torch.float16).to(dtype))


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.uint64])
def test_unsigned_integers_that_torch_does_not_compare_are_compared(dtype: Any) -> None:
    scores = np.array([[3, 40000, 7], [5, 39999, 7]], dtype=dtype).reshape(2, 3, 1, 1)
    for reduce, wanted in (("argmax", [1, 0, 0]), (("threshold", 6), [0, 1, 1, 0, 1, 1])):
        found = reduce_channels(torch.from_numpy(scores), reduce)  # type: ignore[arg-type]
        assert found.dtype == torch.uint8
        assert found.ravel().tolist() == wanted


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (torch.bool, torch.uint8),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
        (torch.uint16, torch.uint16),
    ],
)
def test_stored_voxels_have_a_type_that_an_image_can_have(dtype: torch.dtype, stored: torch.dtype) -> None:
    assert as_stored(torch.ones(1, 2, 2, 2).to(dtype)).dtype == stored


@pytest.mark.parametrize(
    ("fill", "dtype", "kept"),
    [(255.0, torch.uint8, 255), (1, torch.bool, 1), (-2.0, torch.int16, -2), (0.5, torch.float32, 0.5)],
)
def test_a_fill_that_fits_is_a_number_of_the_outputs_type(
    fill: float, dtype: torch.dtype, kept: float
) -> None:
    found = fitting_fill(fill, dtype)
    assert (found, type(found)) == (kept, type(kept))


@pytest.mark.parametrize("fill", [math.nan, math.inf, -math.inf])
def test_nan_and_infinite_fills_fit_floating_point_types_only(fill: float) -> None:
    for dtype in (torch.float16, torch.float32, torch.complex64):
        np.testing.assert_equal(fitting_fill(fill, dtype), fill)
    for dtype in (torch.uint8, torch.int64, torch.bool):
        with pytest.raises(OptionError, match=rf"fill={fill} does not fit .* {dtype}; choose another"):
            fitting_fill(fill, dtype)


@pytest.mark.parametrize(
    "reduce", ["argmin", "", 3, ("threshold",), ("threshold", "high"), ("limit", 1.0), ["threshold", 0.5]]
)
def test_an_unknown_reduction_is_refused_with_the_known_ones(reduce: Any) -> None:
    with pytest.raises(OptionError, match=r"reduce must be 'argmax', .*threshold.*, not ") as error:
        check_reduction(reduce)
    assert repr(reduce) in str(error.value)


@pytest.mark.parametrize(
    ("reduce", "kind"),
    [
        ("argmax", "label"),
        (("threshold", 0.5), "label"),
        ("softmax", "scalar"),
        ("sigmoid", "scalar"),
        (None, "scalar"),
        (torch.abs, "scalar"),
    ],
)
def test_classes_and_marks_are_label_maps_and_all_others_are_scalars(reduce: Any, kind: str) -> None:
    check_reduction(reduce)
    assert kind_of(reduce) == kind


@pytest.mark.parametrize("is_compiled", [True, False])
@given(
    npst.arrays(
        np.float32,
        st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 5), st.integers(1, 6)),
        elements=st.sampled_from([-1.0, 0.0, 1.0, 2.5, np.nan, np.inf, -np.inf]),
    ),
    st.permutations(range(4)),
)
def test_classes_are_numpys_argmax_in_any_memory_order_with_compiled_loops_and_without(
    is_compiled: bool, scores: NDArray[np.float32], order: list[int]
) -> None:
    voxels = torch.from_numpy(scores).permute(order).contiguous().permute(*np.argsort(order).tolist())
    with pytest.MonkeyPatch.context() as patch:
        if not is_compiled:
            patch.setattr(reduction, "_compiled", None)
        found = reduction.reduce_channels(voxels, "argmax")
    assert found.dtype == torch.uint8
    np.testing.assert_array_equal(found[0], scores.argmax(axis=0))


# Of several outputs


@pytest.mark.parametrize(
    ("reduce", "text"),
    [
        ("argmax", "class 0 everywhere, as the output 'seg' has one channel; use a threshold: 0.5 of "
         "probabilities, 0 of logits"),
        ("softmax", "1 everywhere, as the output 'seg' has one channel; use sigmoid"),
    ],
)  # fmt: skip
def test_a_reduction_of_one_channel_that_gives_one_value_is_refused(reduce: str, text: str) -> None:
    with pytest.raises(OptionError, match=f"^reduce='{reduce}' would give {re.escape(text)}$") as error:
        check_channels(reduce, 1, "seg")
    assert error.value.option == "reduce"
    check_channels(reduce, 2, "seg")
    with pytest.raises(OptionError, match="as the output has one channel"):
        check_channels(reduce, 1, None)


@pytest.mark.parametrize("reduce", [None, "sigmoid", ("threshold", 0.5), lambda v: v])
def test_other_reductions_may_be_of_one_channel(reduce: Any) -> None:
    check_channels(reduce, 1, "seg")


def test_an_option_that_names_an_unknown_output_is_refused_with_the_known_ones() -> None:
    check_known(["seg"], ["seg", "dist"], "reduce")
    text = r"^reduce: no output 'sge' in the network; did you mean 'seg'\? \(it has: seg, dist\)$"
    with pytest.raises(OptionError, match=text) as error:
        check_known(["seg", "sge"], ["seg", "dist"], "reduce")
    assert error.value.option == "reduce"


# Values that are not finite


@pytest.fixture(params=["compiled", "torch"])
def loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the compiled loop, and without a compiler."""
    if request.param == "torch":
        monkeypatch.setattr(reduction, "_compiled", None)
        monkeypatch.setattr(reduction, "_compiled_is_finite", None)


@pytest.mark.usefixtures("loop")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.complex64, torch.int16])
def test_voxels_that_are_not_finite_are_counted_once_whatever_their_channels(dtype: torch.dtype) -> None:
    voxels = torch.ones(3, 4, 3, 2).to(dtype)
    assert not_finite(voxels) == 0
    if dtype != torch.int16:
        voxels[0, 0, 0, 0] = voxels[2, 0, 0, 0] = math.nan
        voxels[1, 3] = math.inf
        voxels[0, 3] = -math.inf
        assert not_finite(voxels) == 1 + 6
        assert not_finite(voxels.permute(0, 3, 2, 1)) == 1 + 6


@pytest.mark.usefixtures("loop")
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
def test_one_voxel_that_is_not_finite_is_found_wherever_it_is(value: float) -> None:
    whole = torch.full((2, 5, 6, 7), 3.4e38)
    whole[0, 0] = 1e-45
    for voxels in (whole, whole.permute(0, 3, 2, 1), whole.permute(3, 1, 0, 2)[1:, ::2, :, 1:4]):
        assert not_finite(voxels) == 0
        for place in ([0, 0, 0, 0], [-1, -1, -1, -1], [1, 2, 1, 0]):
            before = voxels[*place].item()
            voxels[*place] = value
            assert not_finite(voxels) == 1
            voxels[*place] = before


@pytest.mark.usefixtures("loop")
def test_finite_voxels_whose_sum_is_too_large_are_finite() -> None:
    assert not_finite(torch.full((2, 4, 4, 4), 3e38)) == 0


@pytest.mark.usefixtures("loop")
@pytest.mark.parametrize("reduce", [None, "argmax", "softmax", lambda v: v.nan_to_num_(0)])
def test_voxels_are_counted_before_they_are_reduced(voxels: torch.Tensor, reduce: Any) -> None:
    finalise = Finaliser(reduce)
    assert finalise(voxels.clone()).not_finite == 0
    voxels[1, 0, 0, 0] = math.inf
    voxels[4, 3, 2, 1] = math.nan
    for turned in (voxels, voxels.permute(0, 3, 2, 1)):
        assert finalise(turned.clone()).not_finite == 2
