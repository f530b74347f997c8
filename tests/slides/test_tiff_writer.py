"""Exported OME-TIFF: tifffile, OpenSlide and libvips read the voxels of the store, and its levels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import slides_made
import tifffile
import torch
from numpy.typing import NDArray

import zpatch as zp
from zpatch.conversion import store_export
from zpatch.errors import OptionError, ZpatchError
from zpatch.slides import tiff_writer

SIZE = 700, 530


class Picked(torch.nn.Module):
    """Some channels of its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return torch.cat([batch, 255 - batch], dim=1)[:, : self.channels]


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "a.svs"
    return slides_made.write_svs(path, slides_made.picture(*SIZE), levels=(4,), compression="zlib")


def predicted(slide: Path, out: Path, channels: int, **options: Any) -> zp.Image:
    subject = zp.Subject(name="a", slide=zp.ScalarImage(slide))
    options = {"image": "slide", "patch_size": 256, "patch_overlap": 32, "pyramid": True, **options}
    return zp.predict(Picked(channels), [subject], out, **options)[0].prediction


def voxels(image: zp.Image) -> NDArray[Any]:
    return image.read(zp.PatchLocation((0, 0, 0), image.spatial_shape))


@pytest.mark.parametrize(
    ("channels", "options", "dtype"),
    [(3, {}, "float32"), (5, {}, "float32"), (1, {}, "float32"), (3, {"reduce": "argmax"}, "uint8")],
)
def test_every_level_is_that_of_the_store(
    slide: Path, out: Path, tmp_path: Path, channels: int, options: dict[str, Any], dtype: str
) -> None:
    image = predicted(slide, out, channels, **options)
    [path] = zp.export(out, tmp_path / "a.ome.tif")
    assert image.record is not None
    levels = len(image.record.levels) + 1
    assert levels > 2
    with tifffile.TiffFile(path) as file:
        assert file.is_ome
        [series] = file.series
        assert (series.dtype, len(series.levels)) == (np.dtype(dtype), levels)
        assert all(level.keyframe.is_tiled for level in series.levels)
        found = [level.asarray() for level in series.levels]
    again = zp.ScalarImage(path)
    assert again.opened.slide is not None
    assert again.opened.slide.mpp == pytest.approx((0.5, 0.5))
    np.testing.assert_array_equal(voxels(again), voxels(image))
    for number in range(1, levels):
        level = zp.Image(image.opened.level(number))
        wanted = voxels(level)[..., 0]
        np.testing.assert_array_equal(
            found[number].reshape(len(wanted), *found[number].shape[-2:]).swapaxes(1, 2), wanted
        )
        np.testing.assert_array_equal(voxels(zp.ScalarImage(path, level=number))[..., 0], wanted)


def test_colours_are_read_by_openslide_and_libvips_too(tmp_path: Path) -> None:
    pixels = slides_made.picture(*SIZE)
    halves = [pixels, slides_made.halved(pixels), slides_made.halved(pixels, 4)]
    shapes = [(3, level.shape[1], level.shape[0], 1) for level in halves]
    image = tiff_writer.TiffImage(shapes, np.dtype(np.uint8), mpp=(0.25, 0.5))
    path = tmp_path / "a.ome.tif"
    tiff_writer.write_ome_tiff(
        path, image, lambda level, _channel, _plane, first, stop: halves[level][first:stop]
    )
    with tifffile.TiffFile(path) as file:
        for level, wanted in zip(file.series[0].levels, halves, strict=True):
            np.testing.assert_array_equal(level.asarray(), wanted)
    pyvips, data = pytest.importorskip("pyvips"), path.read_bytes()
    np.testing.assert_array_equal(pyvips.Image.new_from_buffer(data, "").numpy(), pixels)
    np.testing.assert_array_equal(pyvips.Image.new_from_buffer(data, "", subifd=1).numpy(), halves[2])
    openslide = pytest.importorskip("openslide")
    with openslide.OpenSlide(path) as opened:
        found = np.asarray(opened.read_region((0, 0), 0, SIZE))[..., :3]
    np.testing.assert_array_equal(found, pixels)
    assert zp.ScalarImage(path).spacing[:2] == pytest.approx((0.25, 0.5))


def test_a_volume_is_written_in_planes_and_micrometres(cohort_store: Path, tmp_path: Path) -> None:
    subject = zp.Cohort(cohort_store)[0]
    name = next(iter(subject))
    image = subject[name]
    [path] = zp.export(cohort_store, tmp_path / "a.ome.tif", include=[subject.name], images=[name])
    again = zp.ScalarImage(path)
    np.testing.assert_array_equal(voxels(again), voxels(image))
    np.testing.assert_allclose(again.spacing, np.multiply(image.spacing, 1000), rtol=1e-5)


@pytest.mark.parametrize("dtype", ["int64", "uint64", "float64", "int8", "int32", "uint16"])
def test_types_that_ome_does_not_have_are_one_line(tmp_path: Path, dtype: str) -> None:
    (tmp_path / "source" / "a").mkdir(parents=True)
    nib.save(
        nib.Nifti1Image(np.ones((9, 8, 7), dtype), np.eye(4), dtype=dtype),
        tmp_path / "source" / "a" / "t1.nii.gz",
    )
    zp.convert(tmp_path / "source", tmp_path / "store.zarr")
    path = tmp_path / "a.ome.tif"
    if dtype in ("int64", "uint64"):
        with pytest.raises(OptionError, match=f"OME-TIFF has no voxels of {dtype}"):
            zp.export(tmp_path / "store.zarr", path)
        assert not path.exists()
        return
    zp.export(tmp_path / "store.zarr", path)
    assert zp.ScalarImage(path).dtype == np.dtype(dtype)


def test_what_fails_half_way_leaves_nothing(
    slide: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predicted(slide, out, 3)
    calls = iter(range(100))
    read = store_export.read_region

    def fail(*arguments: Any) -> Any:
        if next(calls) == 2:
            raise OSError(28, "No space left on device")
        return read(*arguments)

    monkeypatch.setattr(store_export, "read_region", fail)
    folder = tmp_path / "files"
    with pytest.raises((OSError, ZpatchError)):
        zp.export(out, folder / "a.ome.tif")
    assert not folder.exists() or not list(folder.iterdir())


def test_rows_are_read_one_row_of_tiles_at_a_time(tmp_path: Path) -> None:
    image = tiff_writer.TiffImage([(5, 20_000, 1100, 1)], np.dtype(np.uint16))
    asked: list[tuple[int | None, int, int]] = []

    def rows(_level: int, channel: int | None, _plane: int, first: int, stop: int) -> NDArray[Any]:
        asked.append((channel, first, stop))
        return np.zeros((stop - first, 20_000), np.uint16)

    tiff_writer.write_ome_tiff(tmp_path / "a.ome.tif", image, rows)
    assert asked == [(c, first, min(first + 512, 1100)) for c in range(5) for first in (0, 512, 1024)]
