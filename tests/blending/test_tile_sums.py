"""The compiled loop against numpy: a weighted part is added in any memory order, or refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from zpatch.blending import tile_sums

ORDERS = st.permutations(range(4))


@pytest.mark.skipif(tile_sums._compiled_add is None, reason="no compiler was at hand")
@given(st.tuples(*[st.integers(1, 9)] * 4), ORDERS, ORDERS, st.booleans())
def test_the_compiled_loop_adds_a_weighted_part_in_any_memory_order(
    shape: tuple[int, ...], sum_order: list[int], part_order: list[int], is_first: bool
) -> None:
    rng = np.random.default_rng(0)

    def laid_out(order: list[int]) -> NDArray[np.float32]:
        memory = rng.normal(size=[shape[axis] for axis in order]).astype(np.float32)
        return memory.transpose(np.argsort(order))

    sums, part = laid_out(sum_order), laid_out(part_order)
    i, j, k = (rng.random(n, dtype=np.float32) for n in shape[1:])
    product = part * (i[:, None, None].astype(np.float64) * j[:, None] * k)
    expected = product if is_first else sums + product
    assert tile_sums._compiled_add is not None
    tile_sums._compiled_add([(sums, part, i, j, k, is_first)])
    np.testing.assert_allclose(sums, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(tile_sums._compiled_add is None, reason="no compiler was at hand")
def test_the_compiled_loop_refuses_what_does_not_fit() -> None:
    sums, part = np.zeros((2, 2, 3, 4, 5), np.float32)
    one = np.ones(1, np.float32)
    i, j, k = (np.ones(n, np.float32) for n in (3, 4, 5))
    for arguments in (
        (sums.astype(np.float64), part, i, j, k),
        (sums, part[:1], i, j, k),
        (sums, part, i, j, one),
        (sums[0], part[0], i, j, k),
    ):
        assert tile_sums._compiled_add is not None
        with pytest.raises(ValueError, match="do not fit each other"):
            tile_sums._compiled_add([(*arguments, False)])


@pytest.mark.skipif(tile_sums._compiled_add is None, reason="no compiler was at hand")
@given(st.lists(st.tuples(st.integers(1, 40), st.booleans()), min_size=1, max_size=5), st.booleans())
def test_parts_that_continue_each_other_give_the_same_bytes_as_one_by_one(
    pieces: list[tuple[int, bool]], is_split: bool
) -> None:
    rng = np.random.default_rng(0)
    patch = rng.normal(size=(2, 3, 4, sum(length for length, _ in pieces) + 2)).astype(np.float32)
    i, j = (rng.random(n, dtype=np.float32) for n in (3, 4))
    additions, first = [], 0
    for length, is_first in pieces:
        at = first + (is_split and len(additions) > 1)  # the others do not follow the first two
        part = patch[..., at : at + length]
        sums = rng.normal(size=part.shape).astype(np.float32)
        additions.append((sums, part, i, j, rng.random(length, dtype=np.float32), is_first))
        first += length
    alone = [(sums.copy(), *others) for sums, *others in additions]
    assert tile_sums._compiled_add is not None
    tile_sums._compiled_add(additions)
    for addition in alone:
        tile_sums._compiled_add([addition])
    for (sums, *_), (expected, *_) in zip(additions, alone, strict=True):
        np.testing.assert_array_equal(sums, expected)
