"""The peers: each a small function that converts as the library's documentation says, as fast as it can.

A library is imported when its function runs, so that a missing one is reported and not fatal.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

LZ4 = {"cname": "lz4", "clevel": 5, "shuffle": "shuffle"}  # blosc, as zpatch's preset lz4

Conversion = Callable[[Path, Path], None]


@dataclass(frozen=True, slots=True)
class Peer:
    """A peer in conversion: ``convert(file, store)`` converts a file to an LZ4 store without pyramid."""

    name: str
    package: str
    module: str
    convert: Conversion

    @property
    def installed(self) -> bool:
        """Whether its library is installed."""
        return importlib.util.find_spec(self.module) is not None

    def __str__(self) -> str:
        return f"{self.name}, {version(self.package)}" if self.installed else self.name


def nifti_zarr(file: Path, store: Path) -> None:
    """Its default layout: chunks of 64, one file each."""
    _nii2zarr(file, store, chunk=64, shard=None)


def nifti_zarr_sharded(file: Path, store: Path) -> None:
    """The layout that zpatch chooses: chunks of 32, whole planes in a shard."""
    _nii2zarr(file, store, chunk=32, shard=_whole_planes(file))


def _nii2zarr(file: Path, store: Path, *, chunk: int, shard: tuple[int, int, int] | None) -> None:
    import niizarr  # type: ignore[import-untyped]

    # One level is the image itself; label=False keeps it from looking for the label values.
    niizarr.nii2zarr(
        str(file), str(store), chunk=chunk, shard=shard, nb_levels=1, label=False, compressor_options=LZ4
    )


def ngff_zarr(file: Path, store: Path) -> None:
    """Chunks of 64, one file each."""
    _ngff(file, store, chunk=64, chunks_per_shard=None)


def ngff_zarr_sharded(file: Path, store: Path) -> None:
    """The layout that zpatch chooses: chunks of 32, whole planes in a shard."""
    x, y, z = _whole_planes(file)
    _ngff(file, store, chunk=32, chunks_per_shard={"z": z // 32, "y": y // 32, "x": x // 32})


def _ngff(file: Path, store: Path, *, chunk: int, chunks_per_shard: dict[str, int] | None) -> None:
    import ngff_zarr
    import nibabel as nib

    image = ngff_zarr.nibabel_image_to_ngff_image(nib.load(file))
    # No scale factors: one level; no cache: it would write large images twice.
    levels = ngff_zarr.to_multiscales(image, scale_factors=[], chunks=chunk, cache=False)
    blosc = {"name": "blosc", "configuration": {**LZ4, "typesize": 2, "blocksize": 0}}
    ngff_zarr.to_ome_zarr(
        str(store), levels, version="0.5", chunks_per_shard=chunks_per_shard, compressors=[blosc]
    )


def _whole_planes(file: Path) -> tuple[int, int, int]:
    """The shard that zpatch plans for a file, (x, y, z)."""
    from zpatch.chunks.layout import plan_layout
    from zpatch.volume_files.formats import read_header

    header = read_header(file)
    z, y, x = plan_layout(header.shape, header.channel_dtype.itemsize).shards
    return x, y, z


CONVERTERS = (
    Peer("nifti-zarr", "nifti-zarr", "niizarr", nifti_zarr),
    Peer("nifti-zarr, sharded", "nifti-zarr", "niizarr", nifti_zarr_sharded),
    Peer("ngff-zarr", "ngff-zarr", "ngff_zarr", ngff_zarr),
    Peer("ngff-zarr, sharded", "ngff-zarr", "ngff_zarr", ngff_zarr_sharded),
)


def open_each_with_zarr(store: Path, names: list[str]) -> int:
    """Open the group and array of each image of some subjects by zarr-python; return how many there are."""
    import zarr

    images = [path.parent for name in names for path in sorted((store / name).glob("*/zarr.json"))]
    for image in images:
        array = zarr.open_group(image, mode="r")["0"]
        assert isinstance(array, zarr.Array)
    return len(images)
