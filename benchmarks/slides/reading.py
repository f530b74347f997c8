"""Reading patches of a slide: the contenders, their times in one process, and a sweep.

All read the same patches of the finest level, as RGB. A library is imported when its function runs, and is
used as its documentation recommends for arrays.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from benchmarks.measure import Run, settle
from benchmarks.peer import Peer
from benchmarks.slides.pictures import TILE

PATCH, TOGETHER = 512, 16
SWEPT, OVERLAP = 1024, 128
MOST_APART = 2  # of 255: libraries with other releases of libjpeg may round otherwise
HALF_VECTOR = 16  # bytes: libjpeg-turbo writes rows that are aligned to 32 past the cache, which is slower

ZPATCH, LIMIT = "zpatch", "limit: each tile decoded once by imagecodecs"
OPENSLIDE, TIFFSLIDE = "openslide-python", "tiffslide"
ZARR, DASK = "tifffile through zarr", "tifffile through zarr and dask"
MONAI, MONAI_OPENSLIDE = "MONAI WSIReader, tifffile", "MONAI WSIReader, openslide"

Place = tuple[int, int]  # x, y
Pixels = NDArray[Any]
Reader = Callable[[Sequence[Place], int], Sequence[Any]]


@dataclass(frozen=True, slots=True)
class Contender(Peer):
    """A way to read: ``open(path)`` gives a reader of square patches, from their places and their side.

    ``pip_name`` is the name of the distribution, if it is not that of the package. One of ``few`` patches
    reads only the first of a group, as it takes long; a ``bare`` one gives no pixels.
    """

    name: str
    open: Callable[[Path], Reader]
    package: str = "zpatch"
    pip_name: str = ""
    few: bool = False
    bare: bool = False

    @property
    def distribution(self) -> str:
        """The name under which its library is installed."""
        return self.pip_name or self.package

    @property
    def patches(self) -> int:
        """How many patches of a group it reads."""
        return 1 if self.few else TOGETHER


def zpatch_image(path: Path) -> Any:
    """The slide as an image."""
    import zpatch as zp

    return zp.ScalarImage(path)


def _locations(places: Sequence[Place], side: int) -> list[Any]:
    from zpatch import PatchLocation

    return [PatchLocation((x, y, 0), (side, side, 1)) for x, y in places]


def _open_zpatch(path: Path) -> Reader:
    image = zpatch_image(path)
    return lambda places, side: image.read_group(_locations(places, side))


def _open_contiguous(dtype: type, path: Path) -> Reader:
    """Batches as networks want them, in memory that is used again, as a queue's."""
    image = zpatch_image(path)

    @functools.cache
    def memory(count: int, side: int) -> Pixels:
        return np.zeros((count, 3, side, side, 1), dtype)

    def read(places: Sequence[Place], side: int) -> Sequence[Any]:
        found: Pixels = image.read_group(_locations(places, side), out=memory(len(places), side))
        return list(found)

    return read


def _open_limit(path: Path) -> Reader:
    """From memory, and into memory where decoding is fastest."""
    import imagecodecs

    data, (width, height), tile_of = encoded_tiles(path)
    whole = np.empty(TILE * TILE * 3 + 3 * HALF_VECTOR, np.uint8)
    skipped = (HALF_VECTOR - whole.ctypes.data) % (2 * HALF_VECTOR)
    tile = whole[skipped : skipped + TILE * TILE * 3].reshape(TILE, TILE, 3)

    def read(places: Sequence[Place], side: int) -> Sequence[Any]:
        for number in covering(places, side, (width, height)):
            first, stop = tile_of(number)
            imagecodecs.jpeg8_decode(data[first:stop], outcolorspace="RGB", out=tile)
        return []

    return read


def encoded_tiles(path: Path) -> tuple[Any, Place, Callable[[int], Place]]:
    """The bytes of a slide, the width and height of its finest level, and where each of its tiles is."""
    import tifffile

    with tifffile.TiffFile(path) as file:
        page: Any = file.pages[0]
        offsets, counts = page.dataoffsets, page.databytecounts
        size = page.imagewidth, page.imagelength
    data: Any = np.memmap(path, np.uint8, "r")
    return memoryview(data), size, lambda n: (offsets[n], offsets[n] + counts[n])


def covering(places: Sequence[Place], side: int, size: Place) -> list[int]:
    """The numbers of all tiles under some patches."""
    columns = -(-size[0] // TILE)
    return sorted(
        {
            row * columns + column
            for x, y in places
            for row in range(y // TILE, (y + side - 1) // TILE + 1)
            for column in range(x // TILE, (x + side - 1) // TILE + 1)
        }
    )


def _open_openslide(path: Path) -> Reader:
    import openslide

    slide = openslide.OpenSlide(path)

    def read(places: Sequence[Place], side: int) -> Sequence[Any]:
        return [np.asarray(slide.read_region(place, 0, (side, side)).convert("RGB")) for place in places]

    return read


def _open_tiffslide(path: Path) -> Reader:
    import tiffslide

    slide = tiffslide.TiffSlide(path)
    return lambda places, side: [slide.read_region(at, 0, (side, side), as_array=True) for at in places]


def _zarr_array(path: Path) -> Any:
    import tifffile
    import zarr

    zarr.config.set({"threading.max_workers": 1})
    return zarr.open_array(tifffile.imread(path, aszarr=True, series=0, level=0), mode="r")


def _open_zarr(path: Path) -> Reader:
    array = _zarr_array(path)
    return lambda places, side: [array[y : y + side, x : x + side] for x, y in places]


def _open_dask(path: Path) -> Reader:
    import dask.array as da

    array = da.from_zarr(_zarr_array(path))
    return lambda places, side: [
        array[y : y + side, x : x + side].compute(scheduler="sync") for x, y in places
    ]


def _open_monai(backend: str, path: Path) -> Reader:
    from monai.data.wsi_reader import WSIReader

    reader = WSIReader(backend=backend, level=0)
    slide = reader.read(path)

    def read(places: Sequence[Place], side: int) -> Sequence[Any]:
        found = [reader.get_data(slide, location=(y, x), size=(side, side))[0] for x, y in places]
        return [pixels.transpose(1, 2, 0) for pixels in found]

    return read


CONTENDERS = (
    Contender(ZPATCH, _open_zpatch),
    Contender("zpatch, contiguous (C, I, J, K)", functools.partial(_open_contiguous, np.uint8)),
    Contender("zpatch, contiguous float32", functools.partial(_open_contiguous, np.float32)),
    Contender(LIMIT, _open_limit, "imagecodecs", bare=True),
    Contender(OPENSLIDE, _open_openslide, "openslide", "openslide-python"),
    Contender(TIFFSLIDE, _open_tiffslide, "tiffslide"),
    Contender(ZARR, _open_zarr, "tifffile"),
    Contender(DASK, _open_dask, "tifffile"),
    Contender(MONAI, functools.partial(_open_monai, "tifffile"), "monai", few=True),
    Contender(MONAI_OPENSLIDE, functools.partial(_open_monai, "openslide"), "monai"),
)


def contender_of(name: str) -> Contender:
    """The contender of that name."""
    return next(contender for contender in CONTENDERS if contender.name == name)


def drawn(size: Place, rng: np.random.Generator, count: int) -> list[list[Place]]:
    """Groups of random places of patches."""
    most = np.subtract(size, PATCH) + 1
    groups = rng.integers(0, most, (count, TOGETHER, 2)).tolist()
    return [[(x, y) for x, y in group] for group in groups]


def reading_times(path: str, names: str, rounds: str, groups: str) -> dict[str, dict[str, list[float]]]:
    """Seconds of a patch of each contender, of the clock and of the processor, on one core.

    Each round has other groups, and begins with another contender. The pixels are compared before.
    """
    settle(one_core=True)
    _, size, _ = encoded_tiles(Path(path))
    rng, those = np.random.default_rng(0), [contender_of(name) for name in json.loads(names)]
    readers = {contender.name: contender.open(Path(path)) for contender in those}
    _check(Path(path), those, readers, drawn(size, rng, 1)[0])
    found = {name: {"clock": [], "processor": []} for name in readers}  # type: ignore[var-annotated]
    for number in range(int(rounds)):
        places = drawn(size, rng, int(groups))
        turn = number % len(those)
        for contender in (*those[turn:], *those[:turn]):
            some = [group[: contender.patches] for group in (places[:1] if contender.few else places)]
            clock, processor = _seconds(functools.partial(_read_all, readers[contender.name], some))
            patches = len(some) * contender.patches
            found[contender.name]["clock"].append(clock / patches)
            found[contender.name]["processor"].append(processor / patches)
    return found


def _read_all(reader: Reader, groups: Sequence[Sequence[Place]]) -> None:
    for group in groups:
        reader(group, PATCH)


def _seconds(run: Run) -> tuple[float, float]:
    begin = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - begin[0], time.process_time() - begin[1]


def _check(
    path: Path, those: Sequence[Contender], readers: Mapping[str, Reader], places: Sequence[Place]
) -> None:
    expected = [expected_patch(path, place) for place in places]
    for contender in those:
        found = readers[contender.name](places[: contender.patches], PATCH)
        assert contender.bare or len(found) == contender.patches
        for pixels, right in zip(map(as_picture, found), expected, strict=False):
            apart = int(np.abs(pixels.astype(np.int16) - right).max())
            assert apart <= MOST_APART, f"{contender.name}: pixels differ by {apart}"


def as_picture(pixels: Any) -> Pixels:
    """The pixels of a reader as (y, x, c); those of zpatch are (C, I, J, K)."""
    array: Pixels = np.asarray(pixels)
    return array[..., 0].T if array.ndim == 4 else array


def expected_patch(path: Path, place: Place) -> Pixels:
    """A patch put together from its tiles."""
    import imagecodecs

    data, size, tile_of = encoded_tiles(path)
    columns, (x, y) = -(-size[0] // TILE), place
    numbers = covering([place], PATCH, size)
    left, top = x // TILE, y // TILE
    side = (PATCH // TILE + 1) * TILE
    canvas = np.zeros((side, side, 3), np.uint8)
    for number in numbers:
        first, stop = tile_of(number)
        row, column = (number // columns - top) * TILE, (number % columns - left) * TILE
        canvas[row : row + TILE, column : column + TILE] = imagecodecs.jpeg8_decode(data[first:stop])
    row, column = y - top * TILE, x - left * TILE
    return canvas[row : row + PATCH, column : column + PATCH]


# A sweep.


def sweep(path: str, columns: str, rounds: str) -> dict[str, Any]:
    """Seconds of a patch in a sweep over the first columns of the grid, by zpatch and by openslide, in turns.

    Also the number of tiles under these patches, and how many of them zpatch decoded in one sweep.
    """
    settle(one_core=True)
    runs: dict[str, Callable[[], int]] = {ZPATCH: lambda: _sweep_zpatch(Path(path), int(columns))}
    if contender_of(OPENSLIDE).installed:
        runs[OPENSLIDE] = lambda: _sweep_openslide(Path(path), int(columns))
    with mock.patch("zpatch.slides.tiff_file.OpenPage.read", autospec=True, side_effect=_read) as read:
        runs[ZPATCH]()
    places = list(swept(Path(path), int(columns)))
    _, size, _ = encoded_tiles(Path(path))
    found: dict[str, dict[str, list[float]]] = {name: {"clock": [], "processor": []} for name in runs}
    for number in range(int(rounds)):
        for name in list(runs) if number % 2 else list(runs)[::-1]:
            clock, processor = _seconds(runs[name])
            found[name]["clock"].append(clock / len(places))
            found[name]["processor"].append(processor / len(places))
    tiles = len(covering(places, SWEPT, size))
    return {"times": found, "decoded": read.call_count, "tiles": tiles, "patches": len(places)}


def _read(page: Any, offset: int, count: int) -> bytes:
    return os.pread(page._descriptor, count, offset)


def _grid(path: Path) -> Any:
    from zpatch.geometry.patch_grid import PatchGrid

    return PatchGrid.over(zpatch_image(path).spatial_shape, (SWEPT, SWEPT, 1), (OVERLAP, OVERLAP, 0))


def swept(path: Path, columns: int) -> Iterator[Place]:
    """The places of the patches of a sweep, column by column."""
    grid = _grid(path)
    for i in range(columns):
        for j in range(grid.counts[1]):
            x, y, _ = grid.at((i, j, 0)).index
            yield x, y


def _sweep_zpatch(path: Path, columns: int) -> int:
    """As a prediction reads: tiles are held until no later patch needs them."""
    from zpatch.sources.chunk_cache import cached
    from zpatch.sources.group_read import read_boxes

    grid, image = _grid(path), zpatch_image(path)
    ranges = range(columns), range(grid.counts[1]), range(1)
    source, done = cached(image.source, grid, 0, ranges)
    for i in ranges[0]:
        for j in ranges[1]:
            read_boxes(source, [grid.at((i, j, 0))])
            done((i, j, 0))
    return columns


def _sweep_openslide(path: Path, columns: int) -> int:
    read = _open_openslide(path)
    for place in swept(path, columns):
        read([place], SWEPT)
    return columns


# Memory.


def read_some(path: str, name: str, groups: str) -> None:
    """Open a slide, and read some groups; none only opens it and imports what reading does."""
    contender = contender_of(name)
    reader = contender.open(Path(path))
    _, size, _ = encoded_tiles(Path(path))
    reader([(0, 0)] if not contender.few else [], 2)
    for group in drawn(size, np.random.default_rng(1), int(groups)):
        reader(group[: contender.patches], PATCH)
