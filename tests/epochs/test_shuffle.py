"""The shuffle of an epoch: each patch once, never far from its number, at random."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zpatch.epochs.shuffle import BLOCK, SPREAD, Shuffle

shuffles = st.builds(
    Shuffle,
    seed=st.integers(-(2**63), 2**64),
    epoch=st.integers(0, 2**32),
    total=st.integers(1, 3 * BLOCK),
    window=st.integers(1, 400),
)


def order_of(shuffle: Shuffle) -> np.ndarray:
    """The numbers of patches in the order of handing out."""
    return np.argsort(shuffle.places(0, shuffle.total))


@given(shuffles)
def test_each_patch_has_a_place_of_its_own_near_its_number(shuffle: Shuffle) -> None:
    places = shuffle.places(0, shuffle.total)
    assert sorted(places.tolist()) == list(range(shuffle.total))
    assert np.abs(places - np.arange(shuffle.total)).max() < shuffle.window


@given(shuffles, st.data())
def test_places_are_known_without_those_of_patches_far_away(shuffle: Shuffle, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, shuffle.total - 1))
    stop = data.draw(st.integers(first + 1, shuffle.total))
    whole = shuffle.places(0, shuffle.total)
    np.testing.assert_array_equal(shuffle.places(first, stop), whole[first:stop])
    # The end of the epoch changes only the places near it.
    longer = dataclasses.replace(shuffle, total=shuffle.total + 500)
    far = max(0, shuffle.total - shuffle.window)
    np.testing.assert_array_equal(longer.places(0, longer.total)[:far], whole[:far])


@given(shuffles)
def test_no_more_than_a_window_of_patches_wait(shuffle: Shuffle) -> None:
    """When a patch is handed out, all up to the one that is read last by then have arrived."""
    order = order_of(shuffle)
    read = np.maximum.accumulate(order) + 1
    assert (read - np.arange(shuffle.total)).max() <= shuffle.window


def test_a_window_of_one_keeps_the_order_of_reading() -> None:
    assert Shuffle(3, 4, 2000, 1).places(0, 2000).tolist() == list(range(2000))


def test_half_of_the_window_waits_on_average_and_the_first_batch_needs_a_part_of_it() -> None:
    waiting, first = [], []
    for seed in range(20):
        order = order_of(Shuffle(seed, 0, 6000, 300))
        read = np.maximum.accumulate(order) + 1
        waiting.append(np.mean((read - np.arange(6000))[300:5700]))
        first.append(read[7])
    assert 120 < np.mean(waiting) < 160
    assert np.mean(first) < 90


def test_seeds_and_epochs_have_different_orders() -> None:
    orders = {tuple(order_of(Shuffle(s, e, 50, 50)).tolist()) for s in range(5) for e in range(5)}
    assert len(orders) == 25


@pytest.mark.parametrize("number", [0, 700, 1500])
def test_distances_are_uniform(number: int) -> None:
    """Chi-square of the distance of the key of one patch, over seeds."""
    drawn = [int(Shuffle(seed, 1, 2**20, 50)._keys(number, number + 1)[0]) - number for seed in range(5000)]
    counts = np.bincount(drawn, minlength=50)
    assert len(counts) == 50
    assert ((counts - 100) ** 2 / 100).sum() < 49 + 5 * np.sqrt(2 * 49)


@pytest.mark.parametrize("window", [16, 100, 300])
def test_patches_that_are_read_one_after_the_other_are_spread_evenly(window: int) -> None:
    late = Shuffle(0, 0, BLOCK, window)._keys(0, BLOCK) - np.arange(BLOCK)
    parts = late.reshape(-1, SPREAD) * SPREAD // window
    assert (np.abs(np.sort(parts, axis=1) - np.arange(SPREAD)) <= 1).all()


def sliding(total: int, window: int, rng: np.random.Generator) -> np.ndarray:
    """The order of versions before: each patch is drawn from a buffer that is always full."""
    buffer, order = list(range(window)), []
    for following in range(window, total + window):
        place = int(rng.integers(len(buffer)))
        order.append(buffer[place])
        if following < total:
            buffer[place] = following
        else:
            buffer.pop(place)
    return np.array(order)


def distinct_subjects(order: np.ndarray) -> float:
    """Subjects in a batch of 8, where ten patches are taken of each."""
    batches = (order // 10)[: len(order) // 8 * 8].reshape(-1, 8)
    return float(np.mean([len(set(batch)) for batch in batches.tolist()]))


def test_batches_have_as_many_subjects_as_with_a_buffer_that_is_always_full() -> None:
    rng = np.random.default_rng(0)
    before = np.mean([distinct_subjects(sliding(6000, 300, rng)) for _ in range(5)])
    now = np.mean([distinct_subjects(order_of(Shuffle(seed, 0, 6000, 300))) for seed in range(5)])
    assert now >= 0.95 * before


def test_places_beyond_the_window_are_not_correlated() -> None:
    """Autocorrelation of how far patches are moved, at lags of more than the window: that of white noise."""
    window, total = 100, 40 * BLOCK
    moved = order_of(Shuffle(5, 0, total, window)) - np.arange(total)
    moved = moved[window:-window] - moved[window:-window].mean()
    spectrum = np.abs(np.fft.rfft(moved, 2 * len(moved))) ** 2
    correlation = np.fft.irfft(spectrum)[: len(moved) // 2] / np.sum(moved**2)
    beyond = correlation[window + 1 : 20 * window]
    assert np.abs(beyond).max() < 5 / np.sqrt(total)
