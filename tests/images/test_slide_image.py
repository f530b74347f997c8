"""Slides at some micrometres per pixel: the level that is read, its pixels, and where they lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import slides_made
import tifffile
import torch
from numpy.typing import NDArray

import zpatch as zp
from zpatch.errors import OptionError
from zpatch.sources.resampled_source import ResampledSource

MPP = 0.5
SIZE = 903, 604  # width and height, odd at some levels
CENTRES = [(200.0, 150.0), (640.0, 420.0)]
RADIUS = 60.0


def discs() -> NDArray[np.uint8]:
    """Two black discs on white, (height, width, 3), with soft edges."""
    x, y = np.meshgrid(np.arange(SIZE[0]), np.arange(SIZE[1]))
    far = np.min([np.hypot(x - cx, y - cy) for cx, cy in CENTRES], axis=0)
    grey = np.clip((far - RADIUS) * 255 + 128, 0, 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("discs") / "discs.svs"
    return slides_made.write_svs(path, discs(), mpp=MPP, levels=(2, 4, 16), compression="zlib")


def whole(image: zp.Image) -> NDArray[Any]:
    return image.read(zp.PatchLocation((0, 0, 0), image.spatial_shape))


def centroids(darkness: NDArray[Any], affine: NDArray[Any]) -> list[tuple[float, float]]:
    """The centres of mass (x, y) of both discs, in micrometres, of (I, J) on the grid of an affine."""
    i, j = np.indices(darkness.shape)
    x, y = (affine[row, axis] * n + affine[row, 3] for row, axis, n in ((0, 0, i), (1, 1, j)))
    left = x < MPP * (CENTRES[0][0] + CENTRES[1][0]) / 2
    return [
        (float((x * part).sum() / part.sum()), float((y * part).sum() / part.sum()))
        for part in (darkness * left, darkness * ~left)
    ]


def assert_at_the_discs(found: list[tuple[float, float]], within_um: float) -> None:
    for (x, y), (cx, cy) in zip(found, CENTRES, strict=True):
        assert np.hypot(x - MPP * cx, y - MPP * cy) < within_um


@pytest.mark.parametrize(
    "options", [{"level": n} for n in range(4)] + [{"mpp": m} for m in (0.75, 1, 1.3, 3, 6)]
)
def test_every_level_and_mpp_lies_over_the_finest_level(slide: Path, options: dict[str, Any]) -> None:
    image = zp.ScalarImage(slide, **options)
    assert image.spatial_unit == "micrometer"
    darkness = 255 - whole(image)[0, :, :, 0].astype(np.float64)
    assert_at_the_discs(centroids(darkness, image.affine), 0.25 * MPP)


@pytest.mark.parametrize(
    ("mpp", "level", "spacing", "resampled"),
    [
        (0.5, 0, 0.5, False),
        (0.52, 0, 0.5, False),
        (0.6, 0, 0.6, True),
        (0.96, 1, 1.0, False),
        (1.0, 1, 1.0, False),
        (1.04, 1, 1.0, False),
        (1.5, 1, 1.5, True),
        (7.7, 3, 8.0, False),
        (7.5, 2, 7.5, True),
        (9.0, 3, 9.0, True),
    ],
)
def test_the_level_and_whether_it_is_resampled(
    slide: Path, mpp: float, level: int, spacing: float, resampled: bool
) -> None:
    image = zp.ScalarImage(slide, mpp=mpp)
    assert image.spacing[:2] == pytest.approx((spacing, spacing))
    assert isinstance(image.source, ResampledSource) == resampled
    assert (image.opened.part or "level 0") == f"level {level}"
    assert [level.mpp for level in image.levels] == [0.5, 1.0, 2.0, 8.0]
    assert [level[:2] for level in image.levels] == [SIZE, (451, 302), (225, 151), (56, 37)]


def test_labels_are_picked_and_never_mixed(slide: Path, tmp_path: Path) -> None:
    labels = np.where(discs()[..., 0] < 128, 7, 2).astype(np.uint8)
    size = {"resolution": (2e4, 2e4), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(tmp_path / "a.tif", labels, tile=(64, 64), compression="zlib", **size)
    found = zp.LabelMap(tmp_path / "a.tif", mpp=1.3)
    assert found.dtype == np.uint8
    assert set(np.unique(whole(found))) == {2, 7}
    assert_at_the_discs(centroids(whole(found)[0, :, :, 0] == 7, found.affine), MPP)


@pytest.mark.parametrize("options", [{}, {"level": 2}, {"mpp": 1.3}])
def test_a_mask_on_another_grid_is_put_on_that_of_the_slide(
    slide: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    mask = np.where(slides_made.halved(discs(), 3)[..., 0] < 128, 1, 0).astype(np.uint8)
    step = {"resolution": (2e4 / 3, 2e4 / 3), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(tmp_path / "a.tif", mask, tile=(64, 64), compression="zlib", **step)
    subject = zp.Subject(slide=zp.ScalarImage(slide, **options), tumour=zp.LabelMap(tmp_path / "a.tif"))
    assert subject.spatial_shape == subject.slide.spatial_shape
    assert subject.tumour.dtype == np.uint8
    x, y = np.transpose(centroids(whole(subject.tumour)[0, :, :, 0] == 1, subject.slide.affine))
    corner = MPP * (3 - 1) / 2  # the affine of a plain file begins in the middle of its first pixel
    assert_at_the_discs(list(zip(x + corner, y + corner, strict=True)), 2 * MPP)


def test_pixels_may_be_of_other_sizes_along_x_and_y(tmp_path: Path) -> None:
    pixels = slides_made.small()
    path = slides_made.write_ome(tmp_path / "a.ome.tif", pixels, "YXS", size=(0.25, 0.5))
    image = zp.ScalarImage(path, mpp=1.0)
    assert image.spacing[:2] == (1.0, 1.0)
    assert image.shape == (3, 76, 104, 1)  # of the level of 151 x 104 pixels
    both = zp.ScalarImage(path, mpp=(0.5, 1.0))
    assert both.opened.part == "level 1"
    assert both.spacing[:2] == (0.5, 1.0)
    assert zp.ScalarImage(path).levels[0].mpp == pytest.approx(0.375)


def test_an_unknown_mpp_is_stated_by_its_user(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, slides_made.small(), tile=(64, 64), compression="zlib", photometric="rgb")
    with pytest.raises(
        OptionError, match=r"does not state its micrometres per pixel.*say slide_mpp= "
    ) as error:
        zp.ScalarImage(path, mpp=0.5)
    assert error.value.option == "slide_mpp"
    image = zp.ScalarImage(path)
    assert (image.levels[0].mpp, image.spatial_unit, image.spacing) == (None, None, (1.0, 1.0, 1.0))
    stated = zp.ScalarImage(path, mpp=1.0, slide_mpp=(0.5, 0.25))
    assert stated.spacing[:2] == (1.0, 1.0)
    assert stated.shape == (3, 151, 52, 1)
    with pytest.raises(OptionError, match=r"tumour= has another shape.*which the slide does not state"):
        zp.Subject(slide=image, tumour=zp.LabelMap(np.zeros((30, 20, 1), np.uint8), affine=np.eye(4)))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"level": 4}, "level must be 0 to 3, not 4"),
        ({"level": -1}, "level must be 0 to 3, not -1"),
        ({"level": 1.0}, "level must be 0 to 3, not 1.0"),
        ({"level": "1"}, "level must be 0 to 3, not '1'"),
        ({"level": 0, "mpp": 1}, "mpp= and level= both choose a level"),
        ({"mpp": 0.4}, "mpp=0.4 is finer than its finest level, 0.5 micrometres per pixel; ask for mpp=0.5"),
        ({"mpp": 1e6}, "one pixel of mpp=1e\\+06 is larger than the slide, of 451.5 x 302 micrometres"),
        ({"mpp": 0}, "mpp must be one positive number"),
        ({"slide_mpp": "a"}, "slide_mpp must be one positive number"),
        ({"time": 1}, "time must be 0, not 1"),
    ],
)
def test_options_that_do_not_fit_are_one_line(slide: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(OptionError, match=text):
        zp.ScalarImage(slide, **options)


def test_options_of_slides_are_refused_for_other_images(tmp_path: Path) -> None:
    for options in ({"mpp": 1.0}, {"level": 1}, {"slide_mpp": 1.0}):
        with pytest.raises(OptionError, match="is for slides and TIFF files"):
            zp.ScalarImage(np.zeros((3, 3, 3)), **options)  # type: ignore[arg-type]


# Samplers


@pytest.fixture
def subject(slide: Path) -> zp.Subject:
    """The slide, with a coarse mask of its discs: a two-hundredth of its pixels."""
    mask = (255 - slides_made.halved(discs(), 16)[..., 0].T > 128).astype(np.uint8)[..., None]
    affine = np.diag([16 * MPP, 16 * MPP, 1, 1])
    affine[:2, 3] = MPP * 15 / 2
    return zp.Subject(slide=zp.ScalarImage(slide), rough=zp.LabelMap(mask, affine=affine))


def test_a_size_of_one_number_is_a_patch_of_one_plane(subject: zp.Subject) -> None:
    parts = [(1.0, zp.UniformSampler(32)), (2.0, zp.LabelSampler(32, "rough"))]
    for sampler in (zp.UniformSampler(32), zp.WeightedSampler(32, "rough"), zp.MixedSampler(parts)):
        for place in sampler.locations(subject, 4, rng=0):
            assert place.size == (32, 32, 1)
        with zp.Queue([subject], sampler, max_length=4, patches_per_volume=4) as queue:
            assert {tuple(patch.slide.data.shape) for patch in queue} == {(3, 32, 32, 1)}
    grid = zp.GridSampler(subject, 200, 20)
    assert grid.patch_size == (200, 200, 1)
    assert grid.patch_overlap == (20, 20, 0)
    assert len(grid) == 5 * 4


def test_centres_follow_a_coarse_mask(subject: zp.Subject) -> None:
    places = zp.WeightedSampler(1, "rough").locations(subject, 4000, rng=5)
    found = np.zeros(subject.spatial_shape[:2], np.int64)
    np.add.at(found, tuple(np.array([place.index[:2] for place in places]).T), 1)
    mask = whole(subject.rough)[0, :, :, 0] > 0
    assert not found[~mask].any()
    halves = [part for disc in (slice(0, 420), slice(420, None)) for part in (
        np.s_[disc, : 0 + 150], np.s_[disc, 150:420], np.s_[disc, 420:])]  # fmt: skip
    seen = np.array([found[half].sum() for half in halves], float)
    wanted = np.array([mask[half].sum() for half in halves]) / mask.sum() * len(places)
    seen, wanted = seen[wanted > 5], wanted[wanted > 5]
    assert len(wanted) >= 4
    assert ((seen - wanted) ** 2 / wanted).sum() < 20.5  # 0.001 of chi-square of 5 degrees of freedom


# Prediction


class Darkness(torch.nn.Module):
    """Inverts the first channel of (B, C, x, y)."""

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return 255 - batch[:, :1]


@pytest.mark.parametrize("mpp", [0.5, 0.8, 1.0, 2.9])
def test_a_prediction_at_an_mpp_lies_over_the_slide(slide: Path, out: Path, mpp: float) -> None:
    subject = zp.Subject(slide=zp.ScalarImage(slide, mpp=mpp))
    found = zp.predict(Darkness(), [subject], out, image="slide", patch_size=128, patch_overlap=16)[
        0
    ].prediction
    assert found.shape == (1, *subject.slide.spatial_shape)
    assert found.spatial_unit == "micrometer"
    np.testing.assert_allclose(found.affine, subject.slide.affine)
    dark = whole(found)[0, :, :, 0] > 128
    assert_at_the_discs(centroids(dark.astype(float), found.affine), mpp / 2)


def test_a_prediction_inside_tissue_is_that_of_the_whole_slide(subject: zp.Subject, out: Path) -> None:
    options: dict[str, Any] = {"image": "slide", "patch_size": 96, "patch_overlap": 16}
    every = whole(zp.predict(Darkness(), [subject], out, **options)[0].prediction)
    masked = zp.predict(Darkness(), [subject], out.with_name("b.zarr"), mask="rough", **options)[0].prediction
    inside = whole(subject.rough)[0, :, :, 0] > 0
    np.testing.assert_array_equal(whole(masked)[0, inside], every[0, inside])
    assert masked.record is not None
    assert masked.record.stats["skipped"] > 0.3 * inside.size
