"""Tiles of slides as voxels: those that tifffile and OpenSlide read, each tile decoded once."""

from __future__ import annotations

import functools
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import slides_made
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from processes import close_slides
from slides_made import MADE, Made, write, write_svs
from streams import START_METHODS, items, stop_forkserver, stream

import zpatch as zp
from zpatch.errors import DamageError
from zpatch.geometry.patch_grid import PatchGrid
from zpatch.runtime.dask_graphs import Scheduler
from zpatch.slides import tiff_file, tiff_level
from zpatch.slides.tiles import Decoder, Four
from zpatch.sources.chunk_cache import cached
from zpatch.sources.tiled_source import TiledSource
from zpatch.sources.voxel_sources import ArraySource

MAPPED = {
    "contiguous", "contiguous strips", "big-endian", "planar contiguous", "stack", "imagej",
}  # fmt: skip
SOME = ["tiles jpeg", "planar", "strips zlib", "ome channels last", "sixteen bits", "one bit", "imagej"]

Files = Callable[[str], tuple[Path, Made]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Files]:
    """Files by their names, each written once."""
    folder = tmp_path_factory.mktemp("slides")
    yield functools.cache(lambda name: write(name, folder))
    close_slides(folder)


def whole(image: zp.Image) -> NDArray[Any]:
    return image.read(zp.PatchLocation((0, 0, 0), image.spatial_shape))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[int, Four]]:
    """How often each tile of each level was decoded."""
    counts: Counter[tuple[int, Four]] = Counter()
    decoder = tiff_level.TiffLevel.decoder

    def counting(level: tiff_level.TiffLevel) -> Decoder:
        decode = decoder(level)

        def count(place: Four, memory: NDArray[Any]) -> NDArray[Any] | None:
            counts[level.number, place] += 1
            return decode(place, memory)

        return count

    monkeypatch.setattr(tiff_level.TiffLevel, "decoder", counting)
    return counts


@pytest.mark.parametrize("name", MADE)
def test_every_pixel_of_every_level_is_as_tifffile_reads_it(made: Files, name: str) -> None:
    path, how = made(name)
    image = zp.ScalarImage(path)
    assert isinstance(image.source, ArraySource if name in MAPPED else TiledSource)
    for level in range(len(image.levels)):
        image = zp.ScalarImage(path, level=level)
        wanted = how.voxels(path, level)
        assert image.dtype == wanted.dtype.newbyteorder(image.dtype.byteorder)
        np.testing.assert_array_equal(whole(image), wanted)


@pytest.mark.parametrize("name", SOME)
def test_groups_of_boxes_are_read_into_memory_of_any_strides_and_types(made: Files, name: str) -> None:
    path, how = made(name)
    image, voxels = zp.ScalarImage(path), how.voxels(path)

    @given(st.data())
    def check(data: st.DataObject) -> None:
        size = [data.draw(st.integers(1, n)) for n in image.spatial_shape]
        starts = st.tuples(*(st.integers(0, n - s) for n, s in zip(image.spatial_shape, size, strict=True)))
        boxes = [zp.PatchLocation(at, tuple(size)) for at in data.draw(st.lists(starts, max_size=4))]
        channels = st.lists(st.integers(0, image.shape[0] - 1), min_size=1, max_size=4)
        picked = data.draw(st.none() | channels)
        read = image if picked is None else zp.ScalarImage(path, channels=picked)
        wanted = voxels if picked is None else voxels[picked]
        dtype = data.draw(st.sampled_from([image.dtype, np.dtype(np.float32)]))
        order = data.draw(st.permutations(range(5)))
        shape = [len(boxes), read.shape[0], *size]
        memory = np.full([shape[axis] for axis in order], 77, dtype)
        out = memory.transpose(np.argsort(order))[..., :: data.draw(st.sampled_from([1, -1]))]
        scheduler: Scheduler = data.draw(st.sampled_from(["sync", "threads"]))
        zp.read_group([read], boxes, [out], scheduler=scheduler)
        for box, found in zip(boxes, out, strict=True):
            np.testing.assert_array_equal(found, wanted[:, *box.to_slices()])

    check()


def test_boxes_over_the_border_are_padded(made: Files) -> None:
    path, how = made("tiles jpeg")
    box = zp.PatchLocation((280, 190, 0), (40, 40, 1))
    [[found]] = zp.read_group([zp.ScalarImage(path)], [box], padding_mode="reflect")
    padded = np.pad(how.voxels(path), [(0, 0), (0, 40), (0, 40), (0, 0)], mode="reflect")
    np.testing.assert_array_equal(found, padded[:, *box.to_slices()])


def test_a_slide_and_its_mask_are_read_as_one_group_with_each_tile_decoded_once(
    made: Files, decoded: Counter[tuple[int, Four]]
) -> None:
    path, how = made("tiles jpeg")
    mask_path, mask_how = made("one bit tiles")
    images = [zp.ScalarImage(path), zp.LabelMap(mask_path)]
    boxes = [zp.PatchLocation((x, 40, 0), (60, 60, 1)) for x in (50, 60, 70, 200)]
    for scheduler in ("sync", "threads"):
        decoded.clear()
        found = zp.read_group(images, boxes, scheduler=scheduler)  # type: ignore[call-overload]
        for voxels, each in zip((how.voxels(path), mask_how.voxels(mask_path)), found, strict=True):
            for box, patch in zip(boxes, each, strict=True):
                np.testing.assert_array_equal(patch, voxels[:, *box.to_slices()])
        covering = {(x // 80, y // 64) for b in boxes for x in range(b.index[0], b.index[0] + 60)
                    for y in range(40, 100)}  # fmt: skip
        of_mask = {(x // 64, y // 64) for b in boxes for x in range(b.index[0], b.index[0] + 60)
                   for y in range(40, 100)}  # fmt: skip
        assert sum(decoded.values()) == len(covering) + len(of_mask)


def test_tiles_of_a_planar_file_are_decoded_for_the_channels_that_are_read(
    made: Files, decoded: Counter[tuple[int, Four]]
) -> None:
    path, how = made("planar")
    image = zp.ScalarImage(path, channels=[2, 0])
    found = image.read(zp.PatchLocation((0, 0, 0), (80, 64, 1)))
    np.testing.assert_array_equal(found, how.voxels(path)[[2, 0], :80, :64])
    assert decoded == {(0, (0, 0, 0, 0)): 1, (0, (2, 0, 0, 0)): 1}


@pytest.mark.parametrize("name", ["tiles jpeg", "strips zlib", "ome channels", "planar"])
def test_a_dask_view_has_the_same_voxels(made: Files, name: str) -> None:
    path, how = made(name)
    view = zp.ScalarImage(path).dask
    np.testing.assert_array_equal(view[:, 20:150, 30:, :].compute(), how.voxels(path)[:, 20:150, 30:, :])


@pytest.mark.parametrize("swept_axis", [0, 1])
@pytest.mark.parametrize("name", ["tiles jpeg", "ome channels", "strips zlib", "planar"])
def test_a_sweep_decodes_each_tile_exactly_once(
    made: Files, name: str, swept_axis: int, decoded: Counter[tuple[int, Four]]
) -> None:
    path, how = made(name)
    image, voxels = zp.ScalarImage(path), how.voxels(path)
    grid = PatchGrid.over(image.spatial_shape, (50, 46, 1), (20, 10, 0))
    ranges = tuple(range(count) for count in grid.counts)
    source, done = cached(image.source, grid, swept_axis, ranges)  # type: ignore[arg-type]
    sweep = image.with_source(source)
    axes = (swept_axis, *(axis for axis in range(3) if axis != swept_axis))
    for steps in np.ndindex(*(grid.counts[axis] for axis in axes)):
        position = tuple(steps[axes.index(axis)] for axis in range(3))
        box = grid.at(position)  # type: ignore[arg-type]
        np.testing.assert_array_equal(sweep.read(box), voxels[:, *box.to_slices()])
        done(position)  # type: ignore[arg-type]
    tiles = zip(image.source.level.shape, image.source.level.tile, strict=True)  # type: ignore[attr-defined]
    assert set(decoded.values()) == {1}
    assert len(decoded) == np.prod([slides_made.number_of_tiles(n, t) for n, t in tiles])


@pytest.mark.parametrize("method", START_METHODS)
def test_workers_under_every_start_method_read_the_same(tmp_path: Path, method: str) -> None:
    svs = write_svs(tmp_path / "a.svs", slides_made.small(), tile=64)
    planar, _ = write("planar", tmp_path)
    mapped, _ = write("contiguous", tmp_path)
    subjects = [
        zp.Subject(name=path.stem, slide=zp.ScalarImage(path), half=zp.ScalarImage(path, mpp=1, slide_mpp=1))
        for path in (svs, planar, mapped)
    ]
    options: dict[str, Any] = {"max_length": 6, "patches_per_volume": 3, "seed": 3}
    sampler = zp.UniformSampler(48)
    alone = stream(subjects, sampler, **options)
    assert stream(subjects, sampler, num_workers=1, start_method=method, **options) == alone
    assert alone[0][2][0][3] == (3, 48, 48, 1)
    if method == "forkserver":
        stop_forkserver()


def test_a_queue_over_slides_resumes(tmp_path: Path) -> None:
    svs = write_svs(tmp_path / "a.svs", slides_made.small(), tile=64)
    subjects = [zp.Subject(name=f"s{n}", slide=zp.ScalarImage(svs)) for n in range(3)]
    options: dict[str, Any] = {"max_length": 6, "patches_per_volume": 3, "seed": 3}
    whole_epoch = stream(subjects, zp.UniformSampler(32), **options)
    with zp.Queue(subjects, zp.UniformSampler(32), **options) as queue:
        passing = iter(queue)
        first = items([next(passing) for _ in range(4)])
        state = queue.state_dict()
        passing.close()  # type: ignore[attr-defined]
    with zp.Queue(subjects, zp.UniformSampler(32), **options) as queue:
        queue.load_state_dict(state)
        assert first + items(queue) == whole_epoch


def test_a_source_is_pickled_without_its_open_file(made: Files) -> None:
    path, how = made("ome channels")
    image = zp.ScalarImage(path, channels=[1])
    whole(image)
    again = pickle.loads(pickle.dumps(image))
    np.testing.assert_array_equal(whole(again), how.voxels(path)[1:])


def test_files_are_opened_anew_where_many_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiff_file._open, "_limit", 2)
    paths = []
    for number in range(5):
        made = slides_made.plain(lambda n=number: slides_made.small() // (n + 1), tile=(64, 64))
        made.write(tmp_path / f"{number}.tif")
        paths.append(tmp_path / f"{number}.tif")
    images = [zp.ScalarImage(path) for path in paths]
    for _ in range(2):
        for number, image in enumerate(images):
            wanted = slides_made.small().transpose(2, 1, 0)[..., None] // (number + 1)
            np.testing.assert_array_equal(whole(image), wanted)


@pytest.mark.parametrize("name", ["tiles jpeg", "contiguous"])
@pytest.mark.parametrize("change", ["cut", "replaced", "removed", "touched"])
def test_a_file_that_changes_under_its_reader_is_damage(tmp_path: Path, name: str, change: str) -> None:
    if name == "contiguous" and change in ("replaced", "removed", "touched"):
        pytest.skip("a map keeps the file that it was made of")
    path, _ = write(name, tmp_path)
    image = zp.ScalarImage(path)
    whole(image)
    if change == "cut":
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 4)
    elif change == "replaced":
        path.unlink()
        slides_made.plain(lambda: slides_made.small()[::-1], tile=(64, 80), compression="zlib").write(path)
    elif change == "removed":
        path.unlink()
    else:
        with path.open("r+b") as file:
            file.write(b"II")
    with pytest.raises(DamageError, match=str(path)):
        whole(image)
