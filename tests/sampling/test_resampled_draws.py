"""Centres on resampled maps: by the mass of the stored map inside each resampled voxel."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

import zpatch as zp
from zpatch.errors import SamplingError
from zpatch.sampling import resampled_draws

AFFINE = np.diag([0.7, 0.9, 1.3, 1.0])
FINE = 12  # points a side of a stored voxel, for the law
PATCH = 4


def subject_of(labels: NDArray[Any], kind: type[zp.Image] = zp.LabelMap) -> zp.Subject:
    return zp.Subject(seg=kind(labels, affine=AFFINE))


def rotated() -> zp.Image:
    turn, c, s = np.eye(4), np.cos(0.4), np.sin(0.4)
    turn[:2, :2] = [[c, -s], [s, c]]
    affine = turn @ np.diag([1, 1, 1.2, 1])
    affine[:3, 3] = [1, -1, 1]
    return zp.ScalarImage(np.zeros((10, 11, 12), np.float32), affine=affine)


GRIDS: dict[str, Any] = {
    "coarser": lambda s: s.resampled((1.5, 1.1, 1.6)),
    "finer": lambda s: s.resampled((0.5, 0.9, 0.8)),
    "coarser, linear": lambda s: s.resampled((1.5, 1.1, 1.6), label_interpolation="linear"),
    "turned": lambda s: s.oriented("PIL"),
    "turned and coarser": lambda s: s.oriented("PIL").resampled((1.8, 1.3, 1.0)),
    "oblique": lambda s: s.on_grid_of(rotated()),
}


def law(subject: zp.Subject, masses: NDArray[Any], member: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The mass of the stored voxels in each allowed resampled voxel that is a member."""
    _, sources = subject.seg.root
    matrix = np.eye(4)
    for source in sources:
        matrix = source.matrix @ matrix
    is_parallel = (np.count_nonzero(matrix[:3, :3], axis=0) == 1).all()
    found = (by_overlap if is_parallel else by_points)(matrix, masses, member.shape)
    allowed = np.zeros(member.shape, dtype=bool)
    allowed[tuple(slice(PATCH // 2, n - (PATCH - 1) // 2) for n in member.shape)] = True
    return np.where(member & allowed, found, 0)


def by_overlap(matrix: NDArray[Any], masses: NDArray[Any], shape: Any) -> NDArray[np.float64]:
    """Exactly: the overlap of voxels is a product over the axes."""
    found = masses.astype(float)
    axes = np.argmax(matrix[:3, :3] != 0, axis=1)
    for axis, new in enumerate(axes):
        ends = matrix[axis, new] * (np.arange(shape[new])[:, None] + [-0.5, 0.5]) + matrix[axis, 3]
        low, high = np.sort(ends, axis=1).T[..., None]
        voxels = np.arange(masses.shape[axis])
        overlap = np.clip(np.minimum(high, voxels + 0.5) - np.maximum(low, voxels - 0.5), 0, None)
        found = np.moveaxis(np.tensordot(overlap, found, (1, axis)), 0, axis)
    return found.transpose(np.argsort(axes))


def by_points(matrix: NDArray[Any], masses: NDArray[Any], shape: Any) -> NDArray[np.float64]:
    """By fine points."""
    axes = [(np.arange(n * FINE) + 0.5) / FINE - 0.5 for n in masses.shape]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    inverse, found = np.linalg.inv(matrix), np.zeros(shape)
    voxels = np.floor(points @ inverse[:3, :3].T + inverse[:3, 3] + 0.5).astype(int)
    inside = ((voxels >= 0) & (voxels < np.array(shape))).all(axis=-1)
    fine = masses.repeat(FINE, 0).repeat(FINE, 1).repeat(FINE, 2)
    np.add.at(found, tuple(voxels[inside].T), fine[inside] / FINE**3)
    return found


def check(centres: NDArray[np.int64], expected: NDArray[np.float64]) -> None:
    """A chi-square test of centres (n, 3) against probabilities; no centre where there is none."""
    counts = np.zeros(expected.shape)
    np.add.at(counts, tuple(centres.T), 1)
    assert counts[expected == 0].sum() == 0
    wanted = expected / expected.sum() * len(centres)
    often = wanted >= 5
    assert often.any()
    observed = [*counts[often], counts[~often].sum()]
    by_law = [*wanted[often], wanted[~often].sum()]
    if by_law[-1] < 5:
        observed, by_law = observed[:-1], by_law[:-1]
        by_law = list(np.array(by_law) * sum(observed) / sum(by_law))
    assert stats.chisquare(observed, by_law).pvalue > 1e-4


@pytest.mark.parametrize("grid", list(GRIDS))
def test_each_class_is_drawn_by_its_volume_inside_a_resampled_voxel(grid: str) -> None:
    rng = np.random.default_rng(1)
    labels = (rng.integers(1, 4, (14, 12, 10)) * (rng.random((14, 12, 10)) < 0.4)).astype(np.uint8)
    subject = GRIDS[grid](subject_of(labels))
    found = subject.seg.data[0]
    sampler = zp.LabelSampler(PATCH, "seg", {1: 1, 2: 1, 3: 2})
    count = 3000 if grid == "coarser, linear" else 12000  # it takes longer
    centres = np.array([at.index for at in sampler.locations(subject, count, rng=2)]) + PATCH // 2
    drawn = found[tuple(centres.T)]
    assert (
        stats.chisquare(np.bincount(drawn, minlength=4)[1:], [count / 4, count / 4, count / 2]).pvalue > 1e-4
    )
    for label in (1, 2, 3):
        check(centres[drawn == label], law(subject, labels == label, found == label))


@pytest.mark.parametrize("grid", ["coarser", "finer", "oblique"])
def test_weights_are_drawn_by_their_sum_inside_a_resampled_voxel(grid: str) -> None:
    weights = np.random.default_rng(3).exponential(size=(14, 12, 10)).astype(np.float32)
    weights[:3] = 0
    moved = GRIDS[grid](subject_of(weights, zp.SamplingMap))
    sampler = zp.WeightedSampler(PATCH, "seg")
    centres = np.array([at.index for at in sampler.locations(moved, 12000, rng=4)]) + PATCH // 2
    check(centres, law(moved, weights, moved.seg.data[0] > 0))


def test_a_class_that_the_coarser_map_has_lost_is_not_present() -> None:
    labels = np.zeros((16, 16, 16), np.uint8)
    labels[8:12, 8:12, 8:12] = 1
    labels[3, 3, 3] = 2  # between the voxels that are picked
    subject = zp.Subject(seg=zp.LabelMap(labels)).resampled(4.0)
    assert set(np.unique(subject.seg.data)) == {0, 1}
    sampler = zp.LabelSampler(2, "seg", {1: 1, 2: 1000})
    found = sampler.locations(subject, 50, rng=0)
    centres = np.array([at.index for at in found]) + 1
    assert (subject.seg.data[0][tuple(centres.T)] == 1).all()
    with pytest.raises(SamplingError, match="can be the centre"):
        zp.LabelSampler(2, "seg", {2: 1}).locations(subject, 1, rng=0)


def test_a_voxel_that_is_nearly_always_rejected_is_found_in_the_end() -> None:
    labels = np.ones((40, 40, 40), np.uint8)  # a class whose voxels nearly all lie where no patch fits
    subject = zp.Subject(seg=zp.LabelMap(labels)).resampled(1.9)
    size = tuple(n - 1 for n in subject.spatial_shape)
    found = zp.LabelSampler(size, "seg", {1: 1}).locations(subject, 400, rng=0)
    counts = np.unique([at.index for at in found], axis=0, return_counts=True)[1]
    assert len(counts) == 8
    assert stats.chisquare(counts).pvalue > 1e-4


def test_draws_depend_on_their_generator_alone() -> None:
    labels = np.random.default_rng(0).integers(0, 3, (20, 20, 20)).astype(np.uint8)
    subject = zp.Subject(seg=zp.LabelMap(labels)).resampled(1.7)
    sampler = zp.LabelSampler(4, "seg", {1: 1, 2: 3})
    first = sampler.locations(subject, 20, rng=5)
    sampler.locations(subject, 20, rng=6)
    assert sampler.locations(subject, 20, rng=5) == first
    again = zp.Subject(seg=zp.LabelMap(labels)).resampled(1.7)
    assert sampler.locations(again, 20, rng=5) == first


def test_a_stored_map_is_not_read_whole(cohort_store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = next(iter(zp.Cohort(cohort_store))).resampled(1.3)
    name = next(name for name, image in subject.images.items() if image.kind == "label")
    read: list[int] = []
    whole = zp.Image.read_group

    def watched(image: zp.Image, locations: Any, *args: Any, **kwargs: Any) -> Any:
        read.extend(int(np.prod(at.size)) for at in locations)
        return whole(image, locations, *args, **kwargs)

    monkeypatch.setattr(zp.Image, "read_group", watched)
    zp.LabelSampler(4, name).locations(subject, 4, rng=0)
    root, _ = subject[name].root
    chunk = int(
        np.prod([min(n, c) for n, c in zip(root.spatial_shape, root.source.chunk_shape, strict=True)])
    )
    assert max(read) <= chunk


def test_a_linear_map_is_asked_at_the_drawn_voxels_only() -> None:
    labels = np.random.default_rng(0).integers(0, 3, (20, 20, 20)).astype(np.uint8)
    subject = zp.Subject(seg=zp.LabelMap(labels)).resampled(1.7, label_interpolation="linear")
    root, sources = subject.seg.root
    found = resampled_draws.ResampledMap(subject.seg, root, sources)
    voxels = np.array([[1, 2, 3], [4, 4, 4]])
    masses = found.have_mass(
        voxels, lambda of: of[0] == 1, zp.PatchLocation((0, 0, 0), (20, 20, 20)), labels == 1
    )
    assert masses.tolist() == [subject.seg.data[0, 1, 2, 3] == 1, subject.seg.data[0, 4, 4, 4] == 1]
