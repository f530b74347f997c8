"""Randomness is a function of an address: no order, no state, no global generator."""

# ruff: noqa: NPY002 - the global generator is what some of these tests watch

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zpatch.sampling.randomness import Purpose, as_generator, rng

ADDRESS = {"seed": 5, "epoch": 1, "subject": 2, "draw": 3, "purpose": Purpose.SHUFFLE}
PINNED_LOCATIONS = [6770011163908399540, 16370436835273523892]
PINNED_TRANSFORM = [4208570424885461696, 18000126788701765821]
UINT64 = st.integers(0, 2**64 - 1)


def words(generator: np.random.Generator, count: int = 4) -> list[int]:
    """The next raw 64-bit words of a stream."""
    return [int(word) for word in generator.bit_generator.random_raw(count)]


@given(UINT64, UINT64, UINT64, UINT64, st.sampled_from(Purpose))
def test_the_same_address_gives_the_same_stream(
    seed: int, epoch: int, subject: int, draw: int, purpose: Purpose
) -> None:
    first = words(rng(seed, epoch, subject, draw, purpose=purpose))
    words(rng(seed, epoch, subject, draw ^ 1, purpose=purpose), 100)
    assert words(rng(seed, epoch, subject, draw, purpose=purpose)) == first


@pytest.mark.parametrize("field", ADDRESS)
@pytest.mark.parametrize("other", [0, 4])
def test_an_address_that_differs_in_one_field_gives_another_stream(field: str, other: int) -> None:
    changed: dict[str, Any] = {**ADDRESS, field: Purpose.TRANSFORM if field == "purpose" else other}
    assert not set(words(rng(**changed), 100)) & set(words(rng(**ADDRESS), 100))


def test_streams_of_neighbouring_addresses_share_no_word() -> None:
    addresses = itertools.product(range(3), range(3), range(3), range(3), Purpose)
    streams = [words(rng(*address, purpose=purpose), 64) for *address, purpose in addresses]
    assert len(set(itertools.chain(*streams))) == 3**4 * len(Purpose) * 64


def test_seeds_differ_in_all_their_64_bits() -> None:
    seeds = [1 << bit for bit in range(64)]
    assert len({words(rng(seed), 1)[0] for seed in seeds}) == 64


def test_streams_are_the_same_in_every_version_of_zpatch() -> None:
    """A queue's saved state is resumed by a later version: an address must not change its meaning."""
    assert words(rng(1, 2, 3, 4), 2) == PINNED_LOCATIONS
    assert words(rng(1, 2, 3, 4, purpose=Purpose.TRANSFORM), 2) == PINNED_TRANSFORM


def test_the_global_generators_are_never_written() -> None:
    python, legacy, tensor = random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()
    for generator in (rng(1, 2, 3, 4), as_generator(None), as_generator(7)):
        generator.random(1000)
        generator.permutation(100)
    assert random.getstate() == python
    after = np.random.get_state(legacy=False)
    assert np.array_equal(after["state"]["key"], legacy["state"]["key"])
    assert after["state"]["pos"] == legacy["state"]["pos"]
    assert torch.equal(torch.get_rng_state(), tensor)


def test_the_global_generators_are_never_read() -> None:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    streams = []
    try:
        for seed in (0, 1):
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            streams.append((words(rng(3)), words(as_generator(3))))
            fresh = words(as_generator(None))
            assert fresh != words(as_generator(None))
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
    assert streams[0] == streams[1]


def test_a_generator_is_returned_unchanged() -> None:
    generator = np.random.default_rng(0)
    assert as_generator(generator) is generator


@pytest.mark.parametrize("seed", [7, np.int64(7), np.uint8(7)])
def test_an_integer_seed_is_the_address_of_that_seed(seed: Any) -> None:
    assert words(as_generator(seed)) == words(rng(7))


def test_without_a_seed_each_generator_is_a_fresh_one() -> None:
    assert words(as_generator(None)) != words(as_generator(None))
