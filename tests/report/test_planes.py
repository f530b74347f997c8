"""Planes of a volume: which planes, in which orientation, and read in little memory."""

from __future__ import annotations

import itertools
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nibabel.orientations import apply_orientation, inv_ornt_aff
from numpy.typing import NDArray
from report_pages import change, page_of, save, store_of

import zpatch as zp
from zpatch.report import planes
from zpatch.report.planes import Plane, views_of
from zpatch.report.report import write_report


def test_views_of_a_volume_do_not_depend_on_its_orientation_in_the_file(
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


@pytest.mark.parametrize("kind", ["means", "nearest"])
def test_tiles_and_blocks_equal_the_whole_plane(
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


def test_only_three_planes_of_the_shown_volumes_are_read(
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
