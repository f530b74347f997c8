"""The pictures of a report: planes in grey or colour, with the outlines of labels over them."""

from __future__ import annotations

import base64
import io
import itertools
import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from report_pages import change, page_of, pixels_of, save, store_of

import zpatch as zp
from zpatch.report.labels import LabelColours
from zpatch.report.pictures import GREYS, OUTLINE_SIDE, png


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32))
def test_pixels_come_back_from_png(height: int, width: int, seed: int) -> None:
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
        assert data.startswith(b"\x89PNG\r\n\x1a\n")
        found = np.asarray(Image.open(io.BytesIO(data)).convert(mode))
        np.testing.assert_array_equal(found, wanted)
        np.testing.assert_array_equal(pixels_of(base64.b64encode(data).decode()), wanted)


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


def test_a_volume_without_an_affine_is_shown_in_stored_order(tmp_path: Path) -> None:
    voxels = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
    save(tmp_path / "source" / "s" / "t1.nii", voxels)
    store = store_of(tmp_path)
    page = page_of(store, tmp_path)
    low, high = (zp.Cohort(store)[0].t1.statistics["foreground"][f"percentile_{q}"] for q in ("0_5", "99_5"))
    np.testing.assert_array_equal(page.pictures()[0], grey_of(voxels[:, :, 3], low, high).T)
    assert "IJ, K 3 of 6" in page.text
    assert "axial, " not in page.text


def test_a_flat_image_has_one_picture_and_rgb_voxels_give_rgb_pixels(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    rgb = rng.integers(0, 256, (30, 20, 1, 3), dtype=np.uint8)
    slide = rgb.view([("R", "u1"), ("G", "u1"), ("B", "u1")])[..., 0]
    save(tmp_path / "source" / "s" / "he.nii", slide, unit="micron")
    page = page_of(store_of(tmp_path), tmp_path)
    [found] = page.pictures()
    np.testing.assert_allclose(found, rgb[:, :, 0].transpose(1, 0, 2), atol=255 / (GREYS - 1) / 2 + 1)
    assert "µm" in page.text


def test_a_time_series_is_shown_at_three_points_and_channels_one_by_one(tmp_path: Path) -> None:
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


def test_a_second_label_map_is_dashed_and_a_label_map_on_another_grid_is_drawn_alone(tmp_path: Path) -> None:
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
    assert "its affine moves voxels by up to 5 voxels relative to that of" in page.text


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
