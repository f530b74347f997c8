"""Tiles that cannot be decoded: read as 0, counted once by whichever process, or an error where strict."""

from __future__ import annotations

import signal
import warnings
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import slides_made
import tifffile
import torch
from numpy.typing import NDArray
from processes import eventually

import zpatch as zp
from zpatch.errors import DamageError, QueueError
from zpatch.records.names import UNFINISHED
from zpatch.slides.tiles import DamagedTileError

pytestmark = pytest.mark.usefixtures("one_thread", "small_chunks")

TILE = 64
BAD = (2, 7, 11)  # numbers of tiles, five in a row
OPTIONS: dict[str, Any] = {"image": "slide", "patch_size": 40, "patch_overlap": 8, "batch_size": 2}


class Same(torch.nn.Module):
    """Gives its input back, after a while."""

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return batch + 1


def damaged_slide(folder: Path) -> Path:
    """A slide of 5 x 4 tiles of which three are garbage."""
    path = slides_made.write_svs(folder / "bad.svs", slides_made.small(), tile=TILE, levels=())
    with tifffile.TiffFile(path) as file:
        page = file.series[0].keyframe
        places = [(page.dataoffsets[n], page.databytecounts[n]) for n in BAD]
    data = bytearray(path.read_bytes())
    for offset, count in places:
        data[offset : offset + count] = bytes(count)
    path.write_bytes(data)
    return path


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return damaged_slide(tmp_path_factory.mktemp("bad"))


def subject(path: Path, **options: Any) -> zp.Subject:
    return zp.Subject(name="bad", slide=zp.ScalarImage(path, **options))


def predicted(path: Path, out: Path, **options: Any) -> tuple[zp.Image, list[str]]:
    """The prediction, and the warnings."""
    with warnings.catch_warnings(record=True, action="always") as caught:
        found = zp.predict(Same(), [subject(path)], out, **{**OPTIONS, **options})[0].prediction
    return found, [str(each.message) for each in caught]


def voxels(image: zp.Image) -> NDArray[Any]:
    return image.read(zp.PatchLocation((0, 0, 0), image.spatial_shape))


def assert_filled(path: Path, image: zp.Image) -> None:
    """The pixels of damaged tiles are those of 0, all others are the slide's."""
    source = zp.ScalarImage(path)
    wanted = voxels(source.with_source(source.source.filling())).astype(np.float32)
    is_bad = np.zeros(image.spatial_shape, bool)
    for number in BAD:
        y, x = divmod(number, 5)
        is_bad[x * TILE : (x + 1) * TILE, y * TILE : (y + 1) * TILE] = True
    assert not wanted[:, is_bad].any()
    assert wanted[:, ~is_bad].all(axis=0).mean() > 0.9
    np.testing.assert_allclose(voxels(image), wanted + 1, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"jobs": 2}, {"max_memory": "8 GB"}, {"batch_size": 1}])
def test_damaged_tiles_are_filled_counted_once_and_warned_of(
    slide: Path, out: Path, options: dict[str, Any]
) -> None:
    found, warned = predicted(slide, out, **options)
    assert_filled(slide, found)
    assert found.record is not None
    assert found.record.stats["damaged_tiles"] == len(BAD)
    assert warned == [
        "damaged tiles were read as 0 for bad/prediction (3); restore the file, and predict it again"
    ]
    *each, total = [text for text in found.record.warnings if text.startswith("damaged: ")]
    assert total == "damaged: 3 tiles in all were read as 0"
    places = [f"damaged: {slide}: the tile in column {n % 5}, row {n // 5} " for n in BAD]
    assert all(text.startswith(place) for place, text in zip(sorted(places), each, strict=True))
    assert zp.verify(out).ok


def test_a_tile_outside_the_mask_is_not_counted(slide: Path, out: Path) -> None:
    mask = np.zeros(zp.ScalarImage(slide).spatial_shape, np.uint8)
    mask[:60, 150:] = 1
    images = {"slide": zp.ScalarImage(slide), "mask": zp.LabelMap(mask)}
    found = zp.predict(Same(), [zp.Subject(**images)], out, mask="mask", **OPTIONS)[0].prediction
    assert found.record is not None
    assert "damaged_tiles" not in found.record.stats


@pytest.mark.parametrize("options", [{}, {"jobs": 2}])
def test_strict_stops_at_a_damaged_tile_and_names_it(slide: Path, out: Path, options: dict[str, Any]) -> None:
    with pytest.raises(
        DamageError, match=rf"damaged: {slide}: the tile in column \d, row \d .*restore the file"
    ):
        predicted(slide, out, strict=True, **options)
    assert not (out / "bad").exists()


def test_a_strict_run_refuses_what_an_earlier_one_filled(slide: Path, out: Path) -> None:
    predicted(slide, out)
    with pytest.raises(
        DamageError, match=r"bad/prediction \(3\); .*leave out strict=True, or say overwrite=True"
    ):
        predicted(slide, out, strict=True)
    found, warned = predicted(slide, out)
    assert_filled(slide, found)
    assert len(warned) == 1


def test_other_readers_raise_the_error(slide: Path) -> None:
    with pytest.raises(DamagedTileError, match="column 2, row 0"):
        voxels(zp.ScalarImage(slide))
    queue = zp.Queue([subject(slide)], zp.UniformSampler(200), max_length=2, patches_per_volume=1)
    with queue, pytest.raises(QueueError, match=f"DamagedTileError: damaged: {slide}: the tile in column"):
        list(queue)


def test_a_resampled_slide_is_filled_too(slide: Path, out: Path) -> None:
    with pytest.warns(UserWarning, match=r"bad/prediction \(3\)"):
        found = zp.predict(Same(), [subject(slide, mpp=0.9)], out, **OPTIONS)[0].prediction
    assert found.spacing[:2] == pytest.approx((0.9, 0.9))


SLOWLY = """
import sys, time
sys.path[:0] = sys.argv[3:]
import test_damaged_tiles as tests
from zpatch.planning import regions
import functools
from zpatch.chunks.layout import plan_output_layout
regions.plan_output_layout = functools.partial(plan_output_layout, chunk=8)
regions.SHARD_BYTES, regions.SMALLEST_SHARD_BYTES = 2**16, 2**12

forward = tests.Same.forward
tests.Same.__call__ = lambda self, batch: (time.sleep(0.05), forward(self, batch))[1]
tests.predicted(tests.Path(sys.argv[1]), tests.Path(sys.argv[2]))
"""


def test_a_run_that_is_killed_and_resumed_counts_the_same_and_writes_the_same_bytes(
    slide: Path, tmp_path: Path, out: Path
) -> None:
    whole, _ = predicted(slide, tmp_path / "whole.zarr")
    with forked.start(SLOWLY, slide, out, Path(__file__).parent, Path(__file__).parent.parent) as child:
        eventually(lambda: list((out / UNFINISHED).glob("*/*/.damaged/*.json")), "a note of a damaged tile")
        child.send_signal(signal.SIGKILL)
        assert child.wait() != 0
    found, warned = predicted(slide, out)
    assert found.record is not None
    assert found.record.stats["damaged_tiles"] == len(BAD)
    assert len(warned) == 1
    np.testing.assert_array_equal(voxels(found), voxels(whole))
