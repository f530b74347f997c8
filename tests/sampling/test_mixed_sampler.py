"""Mixtures of samplers draw from each in proportion to its weight."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

import zpatch as zp
from zpatch.errors import NothingToDrawError, OptionError, SamplingError

ONE_VOXEL = (4, 5, 3)


def subject_of(label: int = 2, name: str = "a") -> zp.Subject:
    labels = np.zeros((10, 10, 10), np.uint8)
    labels[ONE_VOXEL] = label
    return zp.Subject(name=name, t1=zp.ScalarImage(np.ones((10, 10, 10))), seg=zp.LabelMap(labels))


def at_the_voxel(sampler: zp.RandomSampler, subject: zp.Subject, count: int = 4000) -> int:
    return sum(place.index == (2, 3, 1) for place in sampler.locations(subject, count, rng=5))


@pytest.mark.parametrize("weights", [(1, 1), (2, 1), (0.25, 0.75), (1, 0)])
def test_each_draw_picks_a_sampler_in_proportion_to_its_weight(weights: tuple[float, float]) -> None:
    uniform, label = weights[0] / sum(weights), weights[1] / sum(weights)
    mixed = zp.MixedSampler([(weights[0], zp.UniformSampler(4)), (weights[1], zp.LabelSampler(4))])
    seen = at_the_voxel(mixed, subject_of())
    assert binomtest(seen, 4000, label + uniform / 7**3).pvalue > 1e-4


def test_where_one_cannot_draw_the_others_take_its_part() -> None:
    empty = subject_of(label=0)
    parts = [(1, zp.UniformSampler(4)), (5, zp.LabelSampler(4)), (2, zp.LabelSampler(4, "seg", {7: 1}))]
    mixed = zp.MixedSampler(parts)
    starts = np.array([place.index for place in mixed.locations(empty, 3000, rng=0)])
    assert binomtest(int((starts == 3).all(axis=1).sum()), 3000, 1 / 7**3).pvalue > 1e-4
    assert starts.min() == 0
    assert starts.max() == 6
    with pytest.raises(
        NothingToDrawError, match=r"no sampler of the mixture can draw: .*'seg' of subject 'a'"
    ):
        zp.MixedSampler(parts[1:]).locations(empty, 1)


def test_a_map_that_is_wrong_is_still_an_error() -> None:
    subject = zp.Subject(name="a", where=zp.SamplingMap(np.full((10, 10, 10), -1.0)))
    mixed = zp.MixedSampler([(1, zp.UniformSampler(4)), (1, zp.WeightedSampler(4, "where"))])
    with pytest.raises(SamplingError, match="negative"):
        mixed.locations(subject, 1)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([], "at least one sampler"),
        ([(0, zp.UniformSampler(4))], "at least one sampler of a weight above 0"),
        ([(-1, zp.UniformSampler(4))], "finite and at least 0, not -1"),
        ([(float("nan"), zp.UniformSampler(4))], "finite and at least 0, not nan"),
        ([zp.UniformSampler(4)], "pairs of a weight and a sampler"),
        ([(zp.UniformSampler(4), 1)], "pairs of a weight and a sampler"),
        ([(1, zp.GridSampler(patch_size=4))], "a sampler that draws"),
        ([(1, zp.UniformSampler(4)), (1, zp.LabelSampler(5))], "must have one patch_size"),
        ([(1, zp.UniformSampler(4)), (1, zp.LabelSampler(4, padding_mode="edge"))], "these differ"),
    ],
)
def test_a_mixture_that_cannot_be_is_an_error(parts: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        zp.MixedSampler(parts)


def test_probabilities_that_are_a_list_are_an_error_that_shows_a_dictionary() -> None:
    with pytest.raises(OptionError, match=r"must be a dictionary by class, as \{0: 1, 1: 3\}, not \[1, 3\]"):
        zp.LabelSampler(4, "seg", [1, 3])  # type: ignore[arg-type]
