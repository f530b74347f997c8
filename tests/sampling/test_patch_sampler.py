"""Samplers pad volumes that are smaller than the patch, and users write samplers of their own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import chisquare

import zpatch as zp
from zpatch.errors import OptionError, PatchLocationError, PatchSizeError

SHAPE = (5, 12, 9)
MODES = {"constant": {"constant_values": -7}, "edge": {}, "reflect": {}, "symmetric": {}, "wrap": {}}


def subject_of(shape: Any = SHAPE) -> zp.Subject:
    rng = np.random.default_rng(0)
    t1 = rng.integers(0, 100, shape).astype(np.int16)
    labels = rng.integers(0, 3, shape).astype(np.uint8)
    return zp.Subject(name="a", t1=zp.ScalarImage(t1), seg=zp.LabelMap(labels), where=zp.SamplingMap(t1))


def samplers(patch_size: Any, **options: Any) -> list[zp.RandomSampler]:
    return [
        zp.UniformSampler(patch_size, **options),
        zp.WeightedSampler(patch_size, "where", **options),
        zp.LabelSampler(patch_size, "seg", {1: 1, 2: 3}, **options),
        zp.MixedSampler(
            [(1, zp.UniformSampler(patch_size, **options)), (1, zp.LabelSampler(patch_size, **options))]
        ),
    ]


def padded(voxels: NDArray[Any], patch: NDArray[Any], mode: str, options: dict[str, Any]) -> NDArray[Any]:
    missing = np.maximum(patch - voxels.shape, 0)
    return np.pad(voxels, [(n // 2, n - n // 2) for n in missing], mode=mode, **options)  # type: ignore[call-overload]


@given(
    st.tuples(*[st.integers(1, 9)] * 3),
    st.tuples(*[st.integers(1, 9)] * 3),
    st.sampled_from(list(MODES)),
    st.integers(0, 2**32),
)
def test_patches_are_those_of_the_padded_volume(shape: Any, patch_size: Any, mode: str, seed: int) -> None:
    subject, patch = subject_of(shape), np.array(patch_size)
    before = np.maximum(patch - shape, 0) // 2
    t1 = padded(subject.t1.data[0], patch, mode, MODES[mode])
    seg = padded(subject.seg.data[0], patch, mode, {"constant_values": 0} if mode == "constant" else {})
    sampler = zp.UniformSampler(patch_size, padding_mode=mode, fill=-7)
    for taken in sampler(subject, 3, rng=seed):
        first = taken.location.index + before
        assert (first >= 0).all()
        assert (first + patch <= t1.shape).all()
        box = tuple(slice(a, a + p) for a, p in zip(first, patch, strict=True))
        np.testing.assert_array_equal(taken.t1.data[0].numpy(), t1[box])
        np.testing.assert_array_equal(taken.seg.data[0].numpy(), seg[box])
        corner = subject.t1.affine @ [*taken.location.index, 1]
        np.testing.assert_allclose(taken.t1.affine[:, 3], corner)


@pytest.mark.parametrize("number", range(4))
def test_a_short_axis_has_one_place_and_the_law_of_the_others_holds(number: int) -> None:
    subject = subject_of()
    sampler = samplers((8, 4, 4), padding_mode="edge")[number]
    starts = np.array([place.index for place in sampler.locations(subject, 20_000, rng=1)])
    assert set(starts[:, 0].tolist()) == {-1}
    seg, where = subject.seg.data[0], subject.where.data[0].astype(float)
    uniform = np.ones(SHAPE)
    classes = [(seg == c) / (seg[:, 2:11, 2:8] == c).sum() for c in (1, 2)]
    nonzero = (seg != 0) / (seg[:, 2:11, 2:8] != 0).sum()
    law = [uniform, where, classes[0] + 3 * classes[1], uniform / (5 * 9 * 6) + nonzero][number]
    expected = law[:, 2:11, 2:8].sum(axis=0)
    seen = np.zeros(expected.shape)
    np.add.at(seen, (starts[:, 1], starts[:, 2]), 1)
    possible = expected > 0
    assert not seen[~possible].any()
    assert chisquare(seen[possible], (expected * 20_000 / expected.sum())[possible]).pvalue > 1e-4


def test_a_volume_that_is_large_enough_is_not_padded_and_gives_the_same_patches() -> None:
    subject = subject_of()
    for plain, mode in zip(samplers(4), samplers(4, padding_mode="wrap"), strict=True):
        assert plain.locations(subject, 50, rng=3) == mode.locations(subject, 50, rng=3)


@pytest.mark.parametrize("number", range(4))
def test_without_a_mode_the_error_names_the_axis_and_the_remedy(number: int) -> None:
    with pytest.raises(PatchSizeError, match=r"axis I of 'a' \(5 voxels\).*say padding_mode='constant'"):
        samplers(8)[number].locations(subject_of(), 1)


def test_an_unknown_mode_is_an_error() -> None:
    with pytest.raises(OptionError, match="padding_mode must be one of constant"):
        zp.UniformSampler(4, padding_mode="mirror")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_queue_pads_small_subjects_among_large_ones(workers: int) -> None:
    subjects = [subject_of((4, 12, 9)), zp.Subject.of(subject_of((12, 12, 12)).images, name="b")]
    sampler = zp.UniformSampler(8, padding_mode="constant", fill=-7)
    with zp.Queue(subjects, sampler, patches_per_volume=4, num_workers=workers) as queue:
        patches = {(patch.subject, patch.location.index): patch for patch in queue}
    for (name, index), patch in patches.items():
        [expected] = sampler.read(subjects[name == "b"], [patch.location])
        np.testing.assert_array_equal(patch.t1.data.numpy(), expected.t1.data.numpy().astype(np.float32))
        assert (index[0] == -2) == (name == "a")


def test_padding_shows_in_the_repr_by_which_a_queue_knows_its_stream() -> None:
    shown = [repr(one) for mode in (None, "edge") for one in samplers(4, padding_mode=mode)]
    assert len(set(shown)) == 8
    assert shown[0] == "UniformSampler(patch_size=(4, 4, 4))"
    assert shown[4] == "UniformSampler(patch_size=(4, 4, 4), padding_mode='edge', fill=0)"


def named(name: str) -> zp.Subject:
    ones, zeros = np.ones((10, 10, 10)), np.zeros((10, 10, 10), np.uint8)
    return zp.Subject(name=name, t1=zp.ScalarImage(ones), seg=zp.LabelMap(zeros))


class Corners(zp.RandomSampler):
    """A strategy of a user: one of two opposite corners."""

    def starts(self, subject: zp.Subject, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        last = np.subtract(subject.spatial_shape, self.patch_size)
        return rng.integers(0, 2, size=(count, 1)) * last


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sampler_of_ones_own_works_in_a_queue_and_is_resumed(workers: int) -> None:
    subjects = [named(name) for name in "abc"]

    def queue() -> zp.Queue:
        return zp.Queue(subjects, Corners(4), patches_per_volume=6, num_workers=workers)

    with queue() as whole, queue() as first, queue() as second:
        wanted = [(patch.subject, patch.location.index) for patch in whole]
        seen = []
        for patch in first:
            seen.append((patch.subject, patch.location.index))
            if len(seen) == 7:
                break
        second.load_state_dict(first.state_dict())
        seen += [(patch.subject, patch.location.index) for patch in second]
    assert seen == wanted
    assert {index for _, index in wanted} == {(0, 0, 0), (6, 6, 6)}


class Wrong(zp.RandomSampler):
    def __init__(self, starts: Any, **options: Any) -> None:
        super().__init__(4, **options)
        self.given = starts

    def starts(self, subject: zp.Subject, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        return np.array(self.given)


@pytest.mark.parametrize(
    ("starts", "kind", "words"),
    [
        ([[0.0, 0.0, 0.0]], OptionError, r"Wrong.starts must give integers of shape \(1, 3\).*not float64"),
        ([0, 0, 0], OptionError, r"of shape \(1, 3\)"),
        ([[0, 7, 0]], PatchLocationError, r"a patch from 7 to 11 on axis J of 'a' \(10 voxels\)"),
        ([[0, 0, -1]], PatchLocationError, r"a patch from -1 to 3 on axis K"),
    ],
)
def test_locations_that_cannot_be_are_an_error_that_names_the_sampler(
    starts: Any, kind: type, words: str
) -> None:
    with pytest.raises(kind, match=words):
        Wrong(starts).locations(named("a"), 1)


def test_with_padding_a_sampler_of_ones_own_may_reach_over_the_border() -> None:
    [patch] = Wrong([[-2, 0, 8]], padding_mode="constant", fill=5)(named("a"), 1)
    assert patch.t1.data[0, :, 0, 0].tolist() == [5, 5, 1, 1] or patch.t1.data[0, :, 0, 0].tolist()[2:] == [
        1,
        1,
    ]
    assert patch.t1.data[0, :2].unique().tolist() == [5]
    assert patch.seg.data[0, :2].unique().tolist() == [0]
