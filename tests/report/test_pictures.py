"""The pictures of a report: the right planes, the right way round, in little memory."""

from __future__ import annotations

import base64
import itertools
import re
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nibabel.orientations import apply_orientation, inv_ornt_aff
from numpy.typing import NDArray
from report_pages import Page, change, page_of, pixels_of, save, store_of

import zpatch as zp
import zpatch.cli
from zpatch.report import planes
from zpatch.report.markup import tag
from zpatch.report.pictures import GREYS, OUTLINE_SIDE, LabelColours
from zpatch.report.planes import Plane, views_of
from zpatch.report.png import png
from zpatch.report.report import write_report
from zpatch.report.summary import histogram_of


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32))
def test_pixels_come_back_from_png(height: int, width: int, seed: int) -> None:
    image = pytest.importorskip("PIL.Image")
    import io

    rng = np.random.default_rng(seed)
    palette = [(n, 255 - n, n // 2, n) for n in range(10)]
    grey, rgb = (rng.integers(0, 256, (height, width, *more), dtype=np.uint8) for more in ((), (3,)))
    numbers = rng.integers(0, 10, (height, width), dtype=np.uint8)
    cases = [
        (png(grey), "L", grey),
        (png(rgb), "RGB", rgb),
        (png(numbers, palette), "RGBA", np.array(palette, np.uint8)[numbers]),
    ]
    for data, mode, wanted in cases:
        found = np.asarray(image.open(io.BytesIO(data)).convert(mode))
        np.testing.assert_array_equal(found, wanted)
        np.testing.assert_array_equal(pixels_of(base64.b64encode(data).decode()), wanted)


@given(st.text())
def test_text_never_becomes_markup(text: str) -> None:
    page = Page(tag("p", text, title=text) + tag("i", "."))
    assert [name for name, _ in page.elements] == ["p", "i"]
    if text.isprintable():
        assert (page.text, page.all("p")[0]["title"]) == (f"{text}.", text)


def grey_of(values: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    shade = np.clip((values.astype(np.float64) - low) / (high - low), 0, 1)
    return np.rint(np.rint(shade.astype(np.float32) * (GREYS - 1)) * 255 / (GREYS - 1)).astype(np.uint8)


def test_pictures_are_the_planes_through_the_middle_of_the_labels(cohort_store: Path, tmp_path: Path) -> None:
    page = page_of(cohort_store, tmp_path, include=["sub-01"])
    subject = zp.Cohort(cohort_store)["sub-01"]
    voxels = subject.t1.data[0]
    low, high = (subject.t1.statistics["foreground"][f"percentile_{q}"] for q in ("0_5", "99_5"))
    i, j, k = (sum(ends) // 2 for ends in zip(*subject.seg.statistics["foreground_box"], strict=True))
    planes = [voxels[:, :, k], voxels[:, j, :], voxels[i, :, :]]
    for found, plane in zip(page.pictures()[::2], planes, strict=True):
        np.testing.assert_array_equal(found, grey_of(plane, low, high).T[::-1, ::-1])
    assert f"axial, K {k} of {voxels.shape[2]}" in page.text


def test_however_a_volume_lies_in_its_file_its_pictures_are_the_same(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    voxels, affine = rng.integers(1, 999, (7, 8, 9), dtype=np.int16), np.diag([2.0, 3.0, 4.0, 1.0])
    ways = itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3))
    for number, (axes, signs) in enumerate(ways):
        turn = np.array([*zip(axes, signs, strict=True)])
        turned = affine @ inv_ornt_aff(turn, voxels.shape)
        save(tmp_path / "source" / f"s{number:02}" / "t1.nii", apply_orientation(voxels, turn), turned)
    store = store_of(tmp_path)
    for subject in zp.Cohort(store):  # the middle of an even extent is the lower of two in the file's order
        change(store, subject.name, "t1", stats={**subject.t1.statistics, "foreground_box": None})
    low, high = (zp.Cohort(store)[0].t1.statistics["foreground"][f"percentile_{q}"] for q in ("0_5", "99_5"))
    for subject in zp.Cohort(store):
        record, folder = subject.t1.record, subject.t1.folder
        assert [view.name for view in views_of(record)] == ["axial", "coronal", "sagittal"]
        assert views_of(record)[0].edges == ("R", "L", "A", "P")
        assert views_of(record)[2].edges == ("A", "P", "S", "I")
        for view, plane in zip(
            views_of(record), (voxels[:, :, 4], voxels[:, 4, :], voxels[3, :, :]), strict=True
        ):
            axis, extent = int(np.argmax(np.abs(record.affine_array[:3, view.normal]))), record.spatial_shape
            at = {0: 3, 1: 4, 2: 4}[axis]
            at = at if record.affine[axis][view.normal] > 0 else extent[view.normal] - 1 - at
            values = Plane(folder, record, view, at, range(1)).means(plane.shape[::-1], lambda v: v * 1.0)[0]
            np.testing.assert_array_equal(values, plane.T[::-1, ::-1])
    assert low < high


def test_a_volume_whose_place_nobody_said_is_shown_as_it_comes(tmp_path: Path) -> None:
    voxels = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
    save(tmp_path / "source" / "s" / "t1.nii", voxels)
    store = store_of(tmp_path)
    page = page_of(store, tmp_path)
    low, high = (zp.Cohort(store)[0].t1.statistics["foreground"][f"percentile_{q}"] for q in ("0_5", "99_5"))
    np.testing.assert_array_equal(page.pictures()[0], grey_of(voxels[:, :, 3], low, high).T)
    assert "IJ, K 3 of 6" in page.text
    assert "axial, " not in page.text


def test_a_flat_image_has_one_picture_and_colours_are_colours(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    rgb = rng.integers(0, 256, (30, 20, 1, 3), dtype=np.uint8)
    slide = rgb.view([("R", "u1"), ("G", "u1"), ("B", "u1")])[..., 0]
    save(tmp_path / "source" / "s" / "he.nii", slide, unit="micron")
    page = page_of(store_of(tmp_path), tmp_path)
    [found] = page.pictures()
    np.testing.assert_allclose(found, rgb[:, :, 0].transpose(1, 0, 2), atol=255 / (GREYS - 1) / 2 + 1)
    assert "µm" in page.text


def test_a_series_in_time_is_shown_at_three_points_and_channels_one_by_one(tmp_path: Path) -> None:
    series = np.full((5, 6, 7, 9), 3, np.int16) + np.arange(9, dtype=np.int16)
    save(tmp_path / "source" / "s" / "bold.nii", series, np.eye(4))
    save(tmp_path / "source" / "s" / "one.nii", series[..., 0], np.eye(4))
    image = nib.Nifti1Image(series[..., :5], np.eye(4))
    image.to_filename(tmp_path / "source" / "s" / "dwi.nii")
    page = page_of(store_of(tmp_path), tmp_path)
    titles = re.findall(r"(?:time point|channel) \d of \d", page.text)
    assert titles == [
        *(f"time point {n} of 9" for n in (1, 5, 9)),
        *(f"channel {n} of 5" for n in (1, 2, 3)),
    ]
    assert len(page.all("figure")) == 3 * (3 + 3 + 1)
    greys = [int(np.unique(picture)[0]) for picture in page.pictures()[0:9:3]]
    assert greys == sorted(set(greys))


def test_outlines_follow_the_borders_of_labels(tmp_path: Path) -> None:
    labels = np.zeros((20, 20, 20), np.uint8)
    labels[4:12, 4:16, 4:16], labels[12:16, 4:16, 4:16] = 5, 9
    save(tmp_path / "source" / "s" / "t1.nii", np.arange(8000, dtype=np.int16).reshape(20, 20, 20), np.eye(4))
    save(tmp_path / "source" / "s" / "seg.nii", labels, np.eye(4))
    page = page_of(store_of(tmp_path), tmp_path)
    outline = page.pictures()[1]
    colours = LabelColours([5, 9])
    zoom = OUTLINE_SIDE // 20
    shown = labels[:, :, 9].T[::-1, ::-1].repeat(zoom, 0).repeat(zoom, 1)
    drawn = outline[..., 3] > 0
    for value in (5, 9):
        red, green, blue = bytes.fromhex(colours.of(value)[1:])
        of_value = drawn & (outline[..., :3] == (red, green, blue)).all(axis=-1)
        assert of_value.any()
        assert (shown[of_value] == value).all()
    inner = np.zeros(shown.shape, bool)
    inner[2:-2, 2:-2] = True
    for axis, shift in itertools.product((0, 1), (-2, -1, 1, 2)):
        inner &= np.roll(shown, shift, axis) == shown
    assert not drawn[inner | (shown == 0)].any()
    assert drawn[~inner & (shown != 0)].all()
    assert f"{8 * 12 * 12 / 1000:.3g} ml" in page.text


def test_a_second_label_map_is_dashed_and_one_on_another_grid_is_not_drawn_over(tmp_path: Path) -> None:
    labels = np.zeros((12, 12, 12), np.uint8)
    labels[3:9, 3:9, 3:9] = 1
    save(tmp_path / "source" / "s" / "t1.nii", np.arange(1728, dtype=np.int16).reshape(12, 12, 12), np.eye(4))
    save(tmp_path / "source" / "s" / "a_seg.nii", labels, np.eye(4))
    save(tmp_path / "source" / "s" / "b_seg.nii", labels, np.eye(4))
    store = store_of(tmp_path)
    page = page_of(store, tmp_path)
    _, solid, dashed = page.pictures()[:3]
    assert 0.3 < (dashed[..., 3] > 0).sum() / (solid[..., 3] > 0).sum() < 0.7
    record = zp.Cohort(store).store.records["s", "b_seg"]
    moved = [[1, 0, 0, 5.0], *record.affine[1:]]
    change(store, "s", "b_seg", affine=moved)
    page = page_of(store, tmp_path)
    assert len(page.pictures()) == 3 * 2 + 3
    assert "its affine puts voxels up to 5 voxels from where that of" in page.text


def test_channels_of_a_label_map_are_labels(tmp_path: Path) -> None:
    one_hot = np.zeros((8, 8, 8, 3), np.uint8)
    one_hot[1:7, 1:7, 1:7, 0] = one_hot[2:6, 2:6, 2:6, 2] = 1
    image = nib.Nifti1Image(one_hot, np.eye(4))
    (tmp_path / "source" / "s").mkdir(parents=True)
    image.to_filename(tmp_path / "source" / "s" / "tumour_mask.nii")
    page = page_of(store_of(tmp_path), tmp_path)
    assert ("channel 1" in page.text, "channel 2" in page.text, "channel 3" in page.text) == (
        True,
        False,
        True,
    )
    assert len({tuple(colour) for colour in page.pictures()[0].reshape(-1, 4).tolist()}) == 3


@given(st.lists(st.integers(-(2**63) + 1, 2**63 - 1), max_size=300))
def test_a_label_has_one_colour_and_neighbours_have_different_ones(values: list[int]) -> None:
    colours, present = LabelColours(values), sorted({*values} - {0})
    found = [colours.of(value) for value in present]
    assert len(set(found)) == min(len(found), 254)
    assert all(a != b for a, b in itertools.pairwise(found))
    assert colours.numbers(np.array(0)) == 0


# Reading planes


@pytest.mark.parametrize("kind", ["means", "nearest"])
def test_tiles_and_blocks_give_what_the_whole_plane_gives(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    voxels = rng.integers(0, 200, (90, 70, 50), dtype=np.int16)
    save(tmp_path / "source" / "s" / "t1.nii", voxels, np.eye(4))
    image = zp.Cohort(store_of(tmp_path, chunk=16))[0].t1
    for view, size in itertools.product(views_of(image.record), [(10, 10), (23, 17), (50, 50)]):
        plane = Plane(image.folder, image.record, view, 20, range(1))

        def pixels(plane: Plane = plane, size: tuple[int, int] = size) -> NDArray[Any]:
            return plane.means(size, lambda v: v / 1.0) if kind == "means" else plane.nearest(size)

        monkeypatch.setattr(planes, "TILE_SIDE", 10_000)
        whole = pixels()
        monkeypatch.setattr(planes, "TILE_SIDE", 13)
        np.testing.assert_allclose(pixels(), whole, rtol=1e-12)
        assert whole.shape == (1, *size)
        if kind == "means" and size == (10, 10):
            full = plane.means(view.size(image.spatial_shape), lambda v: v / 1.0)[0]
            h, w = full.shape
            np.testing.assert_allclose(
                whole[0], full.reshape(10, h // 10, 10, w // 10).mean(axis=(1, 3)), rtol=1e-12
            )
        if kind == "nearest":
            assert np.isin(whole, voxels).all()


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32))
def test_fewer_pixels_keep_the_mean_and_constants(number: int, pixels: int, seed: int) -> None:
    pixels = min(number, pixels)
    values = np.random.default_rng(seed).random((2, number, 3))
    found = planes._area_means(values, pixels, 1)
    assert found.shape == (2, pixels, 3)
    np.testing.assert_allclose(found.mean(axis=1), values.mean(axis=1))
    np.testing.assert_allclose(planes._area_means(np.ones((1, number)), pixels, 1), 1)


def test_only_the_planes_are_read_and_of_a_series_only_what_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "source" / "s" / "bold.nii", np.ones((40, 41, 42, 30), np.int16), np.eye(4))
    store = store_of(tmp_path)
    boxes = []

    def spied(array: Any, first: Any, stop: Any) -> Any:
        boxes.append(np.subtract(stop, first))
        return read(array, first, stop)

    read = planes.read_region
    monkeypatch.setattr(planes, "read_region", spied)
    page_of(store, tmp_path)
    assert len(boxes) == 9
    assert all(box[0] == 1 and sorted(box)[1] == 1 for box in boxes)


def test_a_coarser_level_is_read_where_it_has_enough_voxels(tmp_path: Path) -> None:
    save(tmp_path / "source" / "s" / "he.nii", np.full((1500, 1300, 1), 7, np.uint8))
    store = store_of(tmp_path, pyramid=True)
    shutil.rmtree(store / "s" / "he" / "0" / "c")
    [record] = zp.Cohort(store).store.records.values()
    assert record.levels[0].shape == (1, 650, 750)
    assert page_of(store, tmp_path).pictures()[0].shape == (444, 512)


def test_memory_does_not_grow_with_the_plane(tmp_path: Path) -> None:
    peaks = []
    for side in (3000, 9000):
        folder = tmp_path / str(side)
        save(folder / "source" / "s" / "he.nii", np.full((side, side, 1), 7, np.uint8))
        store = store_of(folder)
        tracemalloc.start()
        write_report(store, folder / "report.html")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 50e6
    assert peaks[1] < 1.5 * peaks[0]


def test_a_histogram_counts_the_foreground(cohort_store: Path) -> None:
    for subject in zp.Cohort(cohort_store):
        image = subject.t1
        found = histogram_of(image.folder, image.record)
        values = image.data[image.data != 0].astype(np.float64)
        inside = np.histogram(values, len(found.counts), (found.low, found.high))[0]
        tolerance = 0 if image.record.dtype == "<i2" else 0.01 * inside.sum()
        np.testing.assert_allclose(found.counts, inside, atol=tolerance)
        assert found.counts.sum() > 0.98 * values.size
