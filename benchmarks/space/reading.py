"""Reading resampled patches: the contenders, and their times in one process.

All read the same boxes of the same grid. Their first voxels are multiples of the period after which voxels
of both grids coincide, so that ``interpolate``, which always begins at an outer face, is right too.
"""

from __future__ import annotations

import functools
import importlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.measure import Run, alternate, settle
from benchmarks.peer import Peer
from benchmarks.read.peers import in_stored_order, raw_voxels, zpatch_image

VOXEL_MM = (0.7, 0.7, 1.2)
SPACING = 1.0
PERIOD = (7, 7, 6)  # voxels of the new grid along x, y, z; 10, 10 and 5 of the old one
PATCH, TOGETHER = 96, 10
VALUE_RANGE_HU = 1200.0
TOLERANCE_HU = 1e-5 * VALUE_RANGE_HU

ZPATCH = "zpatch, resampled"
NATIVE = "zpatch, not resampled: as many voxels of the stored grid"
COVERING = "zpatch, the covering boxes only"
INTERPOLATE = "covering boxes, torch interpolate"
GRID_SAMPLE = "covering boxes, torch grid_sample"
SCIPY = "covering boxes, scipy affine_transform"
TORCHIO = "TorchIO Resample of the volume in memory"

Box = tuple[slice, slice, slice]
Triple = tuple[int, int, int]
Voxels = NDArray[Any]
Reader = Callable[["Group"], Sequence[Any]]

FACTORS = tuple(SPACING / size for size in VOXEL_MM)


def new_shape(shape: Sequence[int]) -> Triple:
    """Extent (x, y, z) of a volume with voxels of ``SPACING``."""
    i, j, k = (math.floor(n / factor + 0.5) for n, factor in zip(shape, FACTORS, strict=True))
    return i, j, k


def places(start: int, count: int, axis: int) -> NDArray[np.float64]:
    """Where voxels of the new grid lie on an axis (0 for x), in voxels of the old one."""
    middles = np.arange(start, start + count, dtype=np.float64) + 0.5
    return np.asarray(middles * FACTORS[axis] - 0.5, dtype=np.float64)


def covering(start: Sequence[int], shape: Sequence[int], size: Sequence[int]) -> tuple[Triple, Triple]:
    """First voxel and extent (x, y, z) of the stored voxels from which a box is interpolated linearly."""
    first, last = [], []
    for axis, (begin, n, count) in enumerate(zip(start, shape, size, strict=True)):
        ends = np.floor(places(begin, count, axis)[[0, -1]])
        first.append(max(0, int(ends[0])))
        last.append(min(n - 1, int(ends[1]) + 1))
    i, j, k = (b - a + 1 for a, b in zip(first, last, strict=True))
    return (first[0], first[1], first[2]), (i, j, k)


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """First voxels (x, y, z) of patches: ``starts`` on the new grid, ``stored`` others on the stored one."""

    starts: list[Triple]
    stored: list[Triple]


@dataclass(frozen=True, slots=True)
class Contender(Peer):
    """A way to read resampled patches: ``open(head, store)`` gives a reader of groups.

    ``slow`` contenders have fewer repetitions; ``bare`` ones give other voxels, and are not compared.
    """

    name: str
    open: Callable[[Path, Path], Reader]
    package: str = "zpatch"
    slow: bool = False
    bare: bool = False


def _locations(boxes: Sequence[tuple[Triple, Triple]]) -> list[Any]:
    from zpatch import PatchLocation

    return [PatchLocation(first, size) for first, size in boxes]


def _patches(starts: Sequence[Triple]) -> list[Any]:
    return _locations([(start, (PATCH,) * 3) for start in starts])


def _open_zpatch(head: Path, store: Path) -> Reader:
    image = zpatch_image(store).resampled(SPACING)
    return lambda group: image.read_group(_patches(group.starts))


def _open_native(head: Path, store: Path) -> Reader:
    image = zpatch_image(store)
    return lambda group: image.read_group(_patches(group.stored))


def _open_covering(head: Path, store: Path) -> Reader:
    image = zpatch_image(store)
    _, *shape = image.shape

    def read(group: Group) -> Sequence[Any]:
        boxes = [covering(start, shape, (PATCH,) * 3) for start in group.starts]
        return list(image.read_group(_locations(boxes)))

    return read


def _open_interpolate(head: Path, store: Path) -> Reader:
    """The boxes begin one period of z earlier, and these planes are cut off: interpolate repeats the first
    voxel of its input, where the place before it is needed (along z, the new voxels are smaller).
    """
    image = zpatch_image(store)
    _, *shape = image.shape
    scales = [1 / factor for factor in FACTORS[::-1]]
    cut = PERIOD[2]

    def read(group: Group) -> Sequence[Any]:
        before = [min(cut, z) for _, _, z in group.starts]
        starts = [(x, y, z - b) for (x, y, z), b in zip(group.starts, before, strict=True)]
        sizes = [(PATCH, PATCH, PATCH + b) for b in before]
        boxes = [_from_period(start, shape, size) for start, size in zip(starts, sizes, strict=True)]
        found = []
        for voxels, size, b in zip(image.read_group(_locations(boxes)), sizes, before, strict=True):
            tensor = torch.from_numpy(in_stored_order(voxels)).float()[None, None]
            found.append(interpolated(tensor, size[::-1], scales)[0, 0, b:].numpy())
        return found

    return read


def _from_period(start: Triple, shape: Sequence[int], size: Triple) -> tuple[Triple, Triple]:
    """The covering box, from the voxel on whose outer face the box begins."""
    first = [round(begin * factor) for begin, factor in zip(start, FACTORS, strict=True)]
    low, extent = covering(start, shape, size)
    i, j, k = (n - (a - b) for n, a, b in zip(extent, first, low, strict=True))
    return (first[0], first[1], first[2]), (i, j, k)


def interpolated(voxels: torch.Tensor, size: Sequence[int], scales: Sequence[float]) -> torch.Tensor:
    """``torch.nn.functional.interpolate(mode="trilinear", align_corners=False)``, by exact scales.

    The public function takes a size or scales, but not both: its sizes are rounded down.
    """
    found: torch.Tensor = torch.ops.aten.upsample_trilinear3d(voxels, list(size), False, *scales)
    return found


def _open_grid_sample(head: Path, store: Path) -> Reader:
    image = zpatch_image(store)
    _, *shape = image.shape

    def read(group: Group) -> Sequence[Any]:
        boxes = [covering(start, shape, (PATCH,) * 3) for start in group.starts]
        found = []
        for voxels, start, (first, size) in zip(
            image.read_group(_locations(boxes)), group.starts, boxes, strict=True
        ):
            tensor = torch.from_numpy(in_stored_order(voxels)).float()[None, None]
            along = [
                torch.from_numpy(2 * (places(s, PATCH, axis) - a) / (n - 1) - 1).float()
                for axis, (s, a, n) in enumerate(zip(start, first, size, strict=True))
            ]
            z, y, x = torch.meshgrid(*along[::-1], indexing="ij")
            grid = torch.stack([x, y, z], dim=-1)[None]
            sampled = torch.nn.functional.grid_sample(
                tensor, grid, mode="bilinear", padding_mode="border", align_corners=True
            )
            found.append(sampled[0, 0].numpy())
        return found

    return read


def _open_scipy(head: Path, store: Path) -> Reader:
    """A matrix given by its diagonal, which is faster; results are float32."""
    ndimage: Any = importlib.import_module("scipy.ndimage")
    image = zpatch_image(store)
    _, *shape = image.shape

    def read(group: Group) -> Sequence[Any]:
        boxes = [covering(start, shape, (PATCH,) * 3) for start in group.starts]
        found = []
        for voxels, start, (first, _) in zip(
            image.read_group(_locations(boxes)), group.starts, boxes, strict=True
        ):
            offset = [places(s, 1, axis)[0] - first[axis] for axis, s in enumerate(start)]
            found.append(
                ndimage.affine_transform(
                    in_stored_order(voxels),
                    FACTORS[::-1],
                    offset[::-1],
                    (PATCH,) * 3,
                    np.float32,
                    order=1,
                    mode="nearest",
                )
            )
        return found

    return read


def _open_torchio(head: Path, store: Path) -> Reader:
    """The volume is in memory, as float32 because TorchIO rounds the results of other types. It is resampled
    to a grid, as for a spacing TorchIO would centre another one. Ten patches are cut out of the result.
    """
    import torchio

    sitk: Any = importlib.import_module("SimpleITK")
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    volume = torch.from_numpy(raw_voxels(head).astype(np.float32).T)[None]
    affine, target = np.diag([*VOXEL_MM, 1.0]), np.diag([*[SPACING] * 3, 1.0])
    target[:3, 3] = [(SPACING - size) / 2 for size in VOXEL_MM]
    resample = torchio.Resample((new_shape(volume.shape[1:]), target), copy=False)

    def read(group: Group) -> Sequence[Any]:
        resampled = resample(torchio.ScalarImage(tensor=volume, affine=affine)).data[0]
        patches = [resampled[x : x + PATCH, y : y + PATCH, z : z + PATCH].clone() for x, y, z in group.starts]
        return [patch.numpy().T for patch in patches]

    return read


CONTENDERS = (
    Contender(ZPATCH, _open_zpatch),
    Contender(NATIVE, _open_native, bare=True),
    Contender(COVERING, _open_covering, bare=True),
    Contender(INTERPOLATE, _open_interpolate),
    Contender(GRID_SAMPLE, _open_grid_sample, slow=True),
    Contender(SCIPY, _open_scipy, "scipy", slow=True),
    Contender(TORCHIO, _open_torchio, "torchio", slow=True),
)


class Groups:
    """The groups that all contenders read in a round; each round has others."""

    def __init__(self, shape: Sequence[int], count: int) -> None:
        self._shape, self._count = shape, count
        self._rng = np.random.default_rng(0)
        self.now: list[Group] = []
        self.renew()

    def renew(self) -> None:
        """Draw other groups."""
        self.now = [Group(self._starts(), self._stored()) for _ in range(self._count)]

    def _starts(self) -> list[Triple]:
        most = (np.array(new_shape(self._shape)) - PATCH) // PERIOD
        return self._drawn(most, PERIOD)

    def _stored(self) -> list[Triple]:
        return self._drawn(np.array(self._shape) - PATCH, (1, 1, 1))

    def _drawn(self, most: Voxels, period: Triple) -> list[Triple]:
        drawn = self._rng.integers(0, most + 1, size=(TOGETHER, 3)) * period
        return [(x, y, z) for x, y, z in drawn.tolist()]

    def read(self, reader: Reader) -> None:
        """Read all groups of the round."""
        for group in self.now:
            reader(group)


def reading_times(head: str, store: str, names: str, repetitions: str, groups: str) -> dict[str, list[float]]:
    """Seconds of each contender for the same groups, on one core. The voxels they read are checked first."""
    settle(one_core=True)
    torch.set_num_threads(1)
    voxels = raw_voxels(Path(head))
    drawn = Groups(voxels.shape[::-1], int(groups))
    expected = [expected_box(voxels, start, (PATCH,) * 3) for start in drawn.now[0].starts]
    runs: dict[str, Run] = {}
    for contender in (contender_of(name) for name in json.loads(names)):
        reader = contender.open(Path(head), Path(store))
        if not contender.bare:
            _check(contender.name, reader(drawn.now[0]), expected)
        runs[contender.name] = functools.partial(drawn.read, reader)
    alternate(runs, 1)
    return alternate(runs, int(repetitions), before_round=drawn.renew)


def contender_of(name: str) -> Contender:
    """The contender of that name."""
    return next(contender for contender in CONTENDERS if contender.name == name)


def _check(name: str, patches: Sequence[Any], expected: Sequence[Voxels]) -> None:
    for number, (found, right) in enumerate(zip(patches, expected, strict=True)):
        apart = np.abs(in_stored_order(found) - right).max()
        assert apart <= TOLERANCE_HU, f"{name}: a voxel of patch {number} differs by {apart} HU"


def expected_box(voxels: Voxels, start: Sequence[int], size: Sequence[int]) -> NDArray[np.float32]:
    """A box (z, y, x) of the resampled volume, by ``scipy.ndimage.map_coordinates`` of the whole volume."""
    ndimage: Any = importlib.import_module("scipy.ndimage")
    along = [places(s, n, axis) for axis, (s, n) in enumerate(zip(start, size, strict=True))]
    at = np.meshgrid(*along[::-1], indexing="ij")
    found: NDArray[np.float32] = ndimage.map_coordinates(voxels, at, np.float32, order=1, mode="nearest")
    return found
