"""Centres are drawn exactly by their masses, from few reads of chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import scipy.stats
from numpy.typing import NDArray

from zpatch.geometry.boxes import PatchLocation
from zpatch.sampling.centre_draws import AllowedMass, ReadChunks, draw_centres
from zpatch.store.voxel_index import ChunkGrid, sum_masses, sum_table

DRAWS = 20_000


def draws(
    masses: NDArray[Any], chunk: int, allowed: PatchLocation, *, count: int = DRAWS, seed: int = 0
) -> NDArray[np.int64] | None:
    """Centres drawn by masses (I, J, K), through an index of their chunks."""
    mass, read = allowed_mass(masses, chunk, allowed)
    return draw_centres([(mass, count)], read, np.random.default_rng(seed))[0]


def allowed_mass(masses: NDArray[Any], chunk: int, allowed: PatchLocation) -> tuple[AllowedMass, ReadChunks]:
    """The mass in a box of masses (I, J, K), and the function that reads chunks."""
    grid = ChunkGrid(masses.shape, (chunk, chunk, chunk))  # type: ignore[arg-type]

    def read(boxes: Sequence[PatchLocation]) -> list[NDArray[Any]]:
        return [masses[None, *box.to_slices()] for box in boxes]

    return AllowedMass(sum_masses(grid, read, channel), grid, allowed, channel), read


def channel(voxels: NDArray[Any]) -> NDArray[Any]:
    """The only channel of voxels (1, I, J, K)."""
    return np.asarray(voxels[0])


def follow(found: NDArray[np.int64] | None, masses: NDArray[Any], allowed: PatchLocation) -> bool:
    """Whether draws are all inside a box and follow its masses, by a chi-square test."""
    assert found is not None
    law = np.zeros(masses.shape)
    law[allowed.to_slices()] = masses[allowed.to_slices()]
    law /= law.sum()
    seen = np.bincount(np.ravel_multi_index(tuple(found.T), law.shape), minlength=law.size).reshape(law.shape)
    assert not seen[law == 0].any()
    if (law > 0).sum() == 1:
        return True
    return bool(scipy.stats.chisquare(seen[law > 0], law[law > 0] * len(found)).pvalue > 1e-3)


WHOLE = PatchLocation((0, 0, 0), (7, 8, 9))
BOXES = [
    WHOLE,
    PatchLocation((1, 1, 1), (5, 6, 7)),  # whole chunks inside: draws are rejected
    PatchLocation((2, 3, 1), (2, 3, 2)),  # no whole chunk inside: the part inside is counted
    PatchLocation((0, 0, 5), (7, 1, 1)),
    PatchLocation((3, 4, 5), (1, 1, 1)),
]


@pytest.mark.parametrize("allowed", BOXES, ids=str)
@pytest.mark.parametrize("chunk", [1, 2, 3, 16])
@pytest.mark.parametrize("kind", ["weights", "counts", "members"])
def test_centres_are_drawn_by_their_masses(
    rng: np.random.Generator, allowed: PatchLocation, chunk: int, kind: str
) -> None:
    masses = rng.integers(1, 5, WHOLE.size).astype(np.uint8)
    masses[rng.random(WHOLE.size) < 0.3] = 0
    masses[3, 4, 5] = 1
    if kind == "weights":
        masses = masses * rng.uniform(0.2, 1, WHOLE.size).astype(np.float32)
    if kind == "members":
        masses = masses > 0
    assert follow(draws(masses, chunk, allowed), masses, allowed)


def test_chunks_of_very_unequal_mass_are_drawn_by_their_masses() -> None:
    masses = np.zeros(WHOLE.size)
    masses[0], masses[3, 2, 2], masses[3, 2, 3] = 1e9, 3, 1  # almost all mass is outside the box
    allowed = PatchLocation((1, 1, 1), (5, 6, 7))
    assert follow(draws(masses, 2, allowed), masses, allowed)


def test_a_single_chunk_with_mass_among_many_is_drawn_from() -> None:
    masses = np.zeros((20, 20, 20), bool)
    masses[10, 11, 12] = True
    allowed = PatchLocation((5, 5, 5), (10, 10, 10))
    found = draws(masses, 2, allowed, count=10)
    assert found is not None
    assert found.tolist() == [[10, 11, 12]] * 10


@pytest.mark.parametrize("chunk", [2, 3, 16])
@pytest.mark.parametrize("outside", [(0, 0, 0), (6, 7, 8), (0, 4, 4), (2, 4, 4), (3, 4, 8)])
def test_without_mass_in_the_box_there_is_no_draw(chunk: int, outside: tuple[int, int, int]) -> None:
    masses = np.zeros(WHOLE.size)
    masses[outside] = 1
    assert draws(masses, chunk, PatchLocation((3, 3, 3), (2, 2, 2)), count=5) is None


def test_zero_draws_give_zero_centres() -> None:
    found = draws(np.ones(WHOLE.size), 2, WHOLE, count=0)
    assert found is not None
    assert found.shape == (0, 3)


def test_the_same_generator_gives_the_same_centres(rng: np.random.Generator) -> None:
    masses = rng.random(WHOLE.size)
    one, same, other = (draws(masses, 3, WHOLE, count=50, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)  # type: ignore[arg-type]


def often_rejected() -> tuple[NDArray[Any], PatchLocation]:
    """Masses, and a box with an eighth of them: of 20,000 draws some hundreds are rejected 32 times."""
    masses, allowed = np.full((10, 10, 10), 7.0), PatchLocation((1, 1, 1), (8, 8, 8))
    masses[allowed.to_slices()] = 1
    return masses, allowed


def test_a_draw_does_not_depend_on_earlier_draws() -> None:
    masses, allowed = often_rejected()
    mass, read = allowed_mass(masses, 2, allowed)

    def drawn(count: int, seed: int) -> NDArray[np.int64] | None:
        return draw_centres([(mass, count)], read, np.random.default_rng(seed))[0]

    few, many = drawn(10, 1), drawn(DRAWS, 2)
    np.testing.assert_array_equal(drawn(DRAWS, 2), many)
    np.testing.assert_array_equal(drawn(10, 1), few)
    np.testing.assert_array_equal(draws(masses, 2, allowed, seed=2), many)
    assert follow(many, masses, allowed)


def test_the_mass_in_the_box_is_counted_once_for_all_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    masses, allowed = often_rejected()
    mass, read = allowed_mass(masses, 2, allowed)
    counted = []
    count = AllowedMass._count
    monkeypatch.setattr(AllowedMass, "_count", lambda self, read: counted.append(self) or count(self, read))
    for seed in range(3):
        draw_centres([(mass, 1000), (mass, 1000)], read, np.random.default_rng(seed))
    assert counted == [mass]


def test_a_chunk_of_several_draws_is_read_once(rng: np.random.Generator) -> None:
    masses = rng.random((8, 8, 8))
    grid = ChunkGrid((8, 8, 8), (4, 4, 4))
    read: list[PatchLocation] = []

    def read_chunks(boxes: Sequence[PatchLocation]) -> list[NDArray[Any]]:
        read.extend(boxes)
        return [masses[None, *box.to_slices()] for box in boxes]

    table = sum_table(np.array([masses[box.to_slices()].sum() for box in grid.boxes()]))
    mass = AllowedMass(table, grid, PatchLocation((0, 0, 0), (8, 8, 8)), channel)
    draw_centres([(mass, 500), (mass, 500)], read_chunks, rng)
    assert len(read) == 8
