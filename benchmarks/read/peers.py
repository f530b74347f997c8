"""The contenders in reading: each writes its own store of a volume, opens it, and reads groups of boxes.

A library is imported when its function runs, and is used as its documentation recommends for speed.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.peer import Peer

PRESET = "lz4"  # zpatch's default, which the goals are for; also the codec of peers that have the choice
CHUNK = 32
BLOSC: dict[str, Any] = {"cname": PRESET, "clevel": 5, "shuffle": "shuffle"}
ZPATCH, FLOOR = f"zpatch, {PRESET}", f"floor: chunks decoded once, {PRESET}"
ZPATCH_NONE, MEMORY_MAP = "zpatch, none", "numpy memory map, copied"
CONTIGUOUS = f"{ZPATCH}, contiguous (C, I, J, K)"
BLOSC2 = "blosc2 as in nnU-Net"
ZARR, DASK = "zarr-python, zpatch's store", "dask from_zarr, zpatch's store"
TENSORSTORE = ("tensorstore, chunk 32 in shards", "tensorstore, chunk 64 in shards")

Box = tuple[slice, slice, slice]
Voxels = NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Boxes (z, y, x) to read as a group, the same as locations, and the chunks of 32 that they touch."""

    boxes: list[Box]
    locations: list[Any]
    chunks: list[int]

    @classmethod
    def of(cls, starts: NDArray[np.int64], patch: int, shape: tuple[int, ...]) -> Group:
        """The cubes with these first voxels (n, 3)."""
        from zpatch import PatchLocation

        boxes = [tuple(slice(a, a + patch) for a in start) for start in starts.tolist()]
        locations = [PatchLocation((x, y, z), (patch,) * 3) for z, y, x in starts.tolist()]
        grid = [-(-n // CHUNK) for n in shape]
        chunks: set[int] = set()
        for box in boxes:
            ranges = [range(s.start // CHUNK, (s.stop - 1) // CHUNK + 1) for s in box]
            chunks.update((z * grid[1] + y) * grid[2] + x for z, y, x in itertools.product(*ranges))
        return cls(boxes, locations, sorted(chunks))  # type: ignore[arg-type]


Reader = Callable[[Group], Sequence[Any]]


@dataclass(frozen=True, slots=True)
class Contender(Peer):
    """A way to read: ``make(head, store)`` writes the store that ``open(store)`` reads.

    ``head`` is a folder of ``data.plain_head``. ``slow`` contenders have fewer repetitions; ``bare`` ones
    only decode, and give no voxels.
    """

    name: str
    store: str
    make: Callable[[Path, Path], object]
    open: Callable[[Path], Reader]
    package: str = "zpatch"
    slow: bool = False
    bare: bool = False

    def __str__(self) -> str:
        peer = self.package in ("blosc2", "tensorstore", "zarr", "dask")
        return f"{self.name}, {version(self.package)}" if peer and self.installed else self.name


def raw_voxels(head: Path) -> Voxels:
    """The voxels (z, y, x) of a head, memory-mapped."""
    voxels: Voxels = np.load(head / "voxels.npy", mmap_mode="r")
    return voxels


def zpatch_of(name: str, **options: Any) -> Contender:
    """zpatch, on a store that was converted with these options."""

    def make(head: Path, store: Path) -> None:
        convert(head / "source", store, **options)

    return Contender(name, name, make, _open_zpatch)


def convert(source: Path, store: Path, **options: Any) -> None:
    """Convert into a new store."""
    import zpatch as zp

    report = zp.convert(source, store, **options)
    assert not report.failures


def _open_zpatch(store: Path) -> Reader:
    image = zpatch_image(store)
    return lambda group: image.read_group(group.locations)


def _open_contiguous(store: Path) -> Reader:
    """Patches as networks want them, in memory that is used again, as a queue's."""
    image = zpatch_image(store)
    return lambda group: image.read_group(
        group.locations, out=[_memory(number, at.size) for number, at in enumerate(group.locations)]
    )


@functools.cache
def _memory(number: int, size: tuple[int, int, int]) -> Voxels:
    return np.zeros((1, *size), "<i2")


def zpatch_image(store: Path) -> Any:
    """The one image of a store."""
    import zpatch as zp

    return zp.Cohort(store)["sub-01"].ct


def in_stored_order(voxels: Any) -> Voxels:
    """The voxels of a reader as (z, y, x); those of zpatch are (C, I, J, K)."""
    array = np.asarray(voxels)
    return array[0].T if array.ndim == 4 else array


def _open_floor(store: Path) -> Reader:
    """Decompression only: each chunk once, from memory into the same small block."""
    from numcodecs import blosc

    blosc.use_threads = False
    frames = dict(_chunk_frames(zpatch_image(store).folder / "0"))
    scratch = np.empty((CHUNK,) * 3, dtype="<i2")

    def read(group: Group) -> Sequence[Any]:
        decompress = blosc.decompress
        for chunk in group.chunks:
            decompress(frames[chunk], scratch)
        return ()

    return read


def _chunk_frames(folder: Path) -> Iterator[tuple[int, bytes]]:
    """The compressed chunks of a sharded array, without their checksums, by number in the array's C order."""
    import zarr

    array: Any = zarr.open_array(folder, mode="r")
    grid = [-(-n // c) for n, c in zip(array.shape, array.chunks, strict=True)]
    in_shard = [s // c for s, c in zip(array.shards, array.chunks, strict=True)]
    for shard in itertools.product(
        *(range(-(-n // s)) for n, s in zip(array.shape, array.shards, strict=True))
    ):
        data = folder.joinpath("c", *map(str, shard)).read_bytes()
        index = np.frombuffer(data[-16 * int(np.prod(in_shard)) - 4 : -4], "<u8").reshape(*in_shard, 2)
        for within in np.ndindex(*in_shard):
            position = [s * n + w for s, n, w in zip(shard, in_shard, within, strict=True)]
            if all(p < n for p, n in zip(position, grid, strict=True)):
                offset, length = index[within].tolist()
                yield int(np.ravel_multi_index(position, grid)), data[offset : offset + length - 4]


def _make_nothing(head: Path, store: Path) -> None:
    store.symlink_to(head / "voxels.npy")


def _open_memory_map(store: Path) -> Reader:
    voxels = np.load(store, mmap_mode="r")
    return lambda group: [voxels[box].copy() for box in group.boxes]


def _blosc2_of(name: str, chunk: int) -> Contender:
    def make(head: Path, store: Path) -> None:
        import blosc2

        blosc2.asarray(
            np.array(raw_voxels(head)),
            urlpath=str(store),
            mode="w",
            chunks=(chunk,) * 3,
            blocks=(32,) * 3,
            cparams={"codec": blosc2.Codec.LZ4HC, "clevel": 5},
        )

    return Contender(name, f"chunk-{chunk}.b2nd", make, _open_blosc2, "blosc2")


def _open_blosc2(store: Path) -> Reader:
    """Opened as in nnU-Net, but once instead of for each patch, which would be slower."""
    import blosc2

    blosc2.set_nthreads(1)
    array = blosc2.open(str(store), mode="r", mmap_mode="r", dparams={"nthreads": 1})
    return lambda group: [array[box] for box in group.boxes]


def _tensorstore_of(name: str, chunk: int) -> Contender:
    def make(head: Path, store: Path) -> None:
        voxels = raw_voxels(head)
        # Whole planes, like the shards of zpatch.
        layer = [2 * CHUNK, *(-(-n // 64) * 64 for n in voxels.shape[1:])]
        created = {**_tensorstore_spec(store), "metadata": _zarr3_metadata(voxels, layer, chunk)}
        _open_tensorstore(created, create=True).write(voxels).result()

    def open_it(store: Path) -> Reader:
        import tensorstore

        array = _open_tensorstore(_tensorstore_spec(store))

        def read(group: Group) -> Sequence[Any]:
            with tensorstore.Batch() as batch:
                asked = [array[box].read(batch=batch) for box in group.boxes]
            return [future.result() for future in asked]

        return read

    return Contender(name, f"tensorstore-{chunk}", make, open_it, "tensorstore")


def _open_tensorstore(spec: dict[str, Any], **options: Any) -> Any:
    """One thread each for copying and reading, which is fastest on one core. Files are mapped, nothing is
    cached."""
    import tensorstore

    one = {"limit": 1}
    context = tensorstore.Context(
        {"data_copy_concurrency": one, "file_io_concurrency": one, "file_io_mode": {"mode": "memmap"}}
    )
    return tensorstore.open(spec, context=context, **options).result()


def _tensorstore_spec(store: Path) -> dict[str, Any]:
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(store)},
        "recheck_cached_metadata": False,
        "recheck_cached_data": False,
    }


def _zarr3_metadata(voxels: Voxels, shard: list[int], chunk: int) -> dict[str, Any]:
    little: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}
    blosc = {"name": "blosc", "configuration": {**BLOSC, "typesize": 2, "blocksize": 0}}
    sharding = {
        "chunk_shape": [chunk] * 3,
        "codecs": [little, blosc],
        "index_codecs": [little, {"name": "crc32c"}],
    }
    return {
        "shape": list(voxels.shape),
        "data_type": "int16",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }


def _make_zarr(head: Path, store: Path) -> None:
    """Chunks of 64, each in its own file."""
    import zarr
    from zarr.codecs import BloscCodec

    voxels = raw_voxels(head)
    array = zarr.create_array(
        store, shape=voxels.shape, dtype=voxels.dtype, chunks=(64,) * 3, compressors=BloscCodec(**BLOSC)
    )
    array[:] = voxels


def _open_zarr(store: Path) -> Reader:
    array = _zarr_array(store)
    return lambda group: [array[box] for box in group.boxes]


def _open_dask(store: Path) -> Reader:
    """The usual call: one block for each chunk."""
    return _dask_reader(store)


def _open_dask_in_blocks(store: Path) -> Reader:
    """Blocks of 128, which are fewer tasks: the part of a block in a box is read as one."""
    return _dask_reader(store, chunks=(128,) * 3)


def _dask_reader(store: Path, **options: Any) -> Reader:
    import dask.array as da

    array = da.from_zarr(_zarr_array(store), **options)
    return lambda group: [array[box].compute(scheduler="sync") for box in group.boxes]


def _zarr_array(store: Path) -> Any:
    """The array of a store of zpatch or zarr. One thread and large batches are fastest on one core."""
    import zarr

    zarr.config.set({"threading.max_workers": 1, "codec_pipeline.batch_size": 64})
    inside = store / "sub-01" / "ct" / "0"
    return zarr.open_array(inside if inside.exists() else store, mode="r")


def _floor_of(codec: str) -> Contender:
    stored = zpatch_of(f"zpatch, {codec}", codec=codec)
    return Contender(
        f"floor: chunks decoded once, {codec}", stored.store, stored.make, _open_floor, bare=True
    )


_DEFAULT = zpatch_of(ZPATCH, codec=PRESET)
CONTENDERS = (
    *(zpatch_of(f"zpatch, {codec}", codec=codec) for codec in ("lz4", "lz4hc", "none")),
    Contender(CONTIGUOUS, ZPATCH, _DEFAULT.make, _open_contiguous),
    *map(_floor_of, ("lz4", "lz4hc")),
    Contender(MEMORY_MAP, "voxels.npy", _make_nothing, _open_memory_map),
    _blosc2_of(BLOSC2, 96),
    _blosc2_of("blosc2, chunk 64", 64),
    *(_tensorstore_of(name, chunk) for name, chunk in zip(TENSORSTORE, (32, 64), strict=True)),
    Contender(ZARR, ZPATCH, _DEFAULT.make, _open_zarr, "zarr", slow=True),
    Contender("zarr-python, chunk 64", "zarr-64", _make_zarr, _open_zarr, "zarr", slow=True),
    Contender(DASK, ZPATCH, _DEFAULT.make, _open_dask, "dask", slow=True),
    Contender(f"{DASK}, blocks of 128", ZPATCH, _DEFAULT.make, _open_dask_in_blocks, "dask", slow=True),
    Contender(
        "dask from_zarr, chunk 64, blocks of 128",
        "zarr-64",
        _make_zarr,
        _open_dask_in_blocks,
        "dask",
        slow=True,
    ),
)


def contender_of(name: str) -> Contender:
    """The contender of that name; an unknown name is that of a store of zpatch."""
    return next((c for c in CONTENDERS if c.name == name), None) or zpatch_of(name)
