"""The door to nibabel: headers read without touching voxels, and voxels streamed slab by slab."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from zpatch.errors import NiftiError
from zpatch.geometry.affines import Affine
from zpatch.geometry.boxes import padded_to_4d
from zpatch.runtime import buffer_pool
from zpatch.runtime.byte_sizes import format_bytes
from zpatch.volume_files.byte_streams import is_gzip, open_bytes
from zpatch.volume_files.nifti_affine import best_affine
from zpatch.volume_files.signature import (
    EXTENSION_FLAG_BYTES,
    HEADER_VERSIONS,
    LEAVE_OUT,
    HeaderKind,
    header_kind,
    not_nifti,
)

SUFFIXES = (".nii", ".nii.gz", ".hdr")
MAX_HEADER_BYTES = 64 * 2**20
MAX_TRAILING_BYTES = 64 * 2**20
MAX_GZIP_RATIO = 1032  # of deflate: 258 bytes from 2 bits
READ_BYTES = 2**20

_SPATIAL_UNITS = {1: "meter", 2: "millimeter", 3: "micrometer"}  # xyzt_units modulo 8
_TIME_UNITS = (8, 16, 24)
_LINE_ENDS = ([13, 10, 26, 10], [0, 0, 0, 0])
_REPAIR = "repair its header, or copy the file again"
_TRAILING = "{} trailing bytes after the last voxel"

Warn = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Slab:
    """Consecutive planes of a volume that fill a row of shards.

    ``voxels`` is (c, z, y, x); ``shard`` is the index of that row among the shards along c and z.
    """

    shard: tuple[int, int]
    voxels: NDArray[Any]


@dataclass(frozen=True, slots=True)
class NiftiFile:
    """The checked contents of the header of a NIfTI file.

    Voxels start at ``voxel_offset`` in ``voxel_path``, which differs from ``path`` only for a .hdr/.img
    pair. ``raw_header`` is everything before the first voxel, extensions included. ``dims`` are the sides
    in the order of the file (I, J, K, ...). ``shape`` is that of the array to store: ``(z, y, x)`` or,
    where the file has more than three axes or RGB voxels, ``(c, z, y, x)`` with all further axes in one.
    ``dtype`` is the type in the file, ``channel_dtype`` the little-endian type of one channel. ``affine``
    maps (I, J, K) to ``spatial_unit``, and is from the sform, qform or pixdim, as ``affine_source`` says.
    ``slope`` and ``inter`` turn stored voxels into values. ``warnings`` say what is odd, a line each.
    """

    path: Path
    voxel_path: Path
    voxel_offset: int
    compressed: bool
    raw_header: bytes
    dims: tuple[int, ...]
    dtype: np.dtype[Any]
    affine: Affine
    affine_source: str
    slope: float
    inter: float
    has_time: bool
    spatial_unit: str | None
    warnings: tuple[str, ...]

    @property
    def colours(self) -> int:
        """The number of colour channels of a voxel: 3 (RGB) or 4 (RGBA); 1 where voxels are numbers."""
        return len(self.dtype.names) if self.dtype.names else 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the stored array."""
        nx, ny, nz = (*self.dims[:3], 1, 1)[:3]
        channels = math.prod(self.dims[3:]) * self.colours
        return (channels, nz, ny, nx) if len(self.dims) > 3 or self.colours > 1 else (nz, ny, nx)

    @property
    def axes(self) -> str:
        """Names of the stored axes."""
        return ("" if len(self.shape) == 3 else "t" if self.has_time else "c") + "zyx"

    @property
    def channel_dtype(self) -> np.dtype[Any]:
        """Little-endian type of one stored value."""
        return np.dtype(np.uint8 if self.colours > 1 else self.dtype.newbyteorder("<"))

    @property
    def voxel_bytes(self) -> int:
        """Bytes of all voxels, uncompressed."""
        return math.prod(self.dims) * self.dtype.itemsize

    def slabs(
        self,
        shard_extent: tuple[int, int],
        warn: Warn = lambda text: None,
        *,
        backwards: bool = False,
    ) -> Iterator[Slab]:
        """Stream the voxels in file order, one row of shards at a time.

        ``shard_extent`` is how many channels and planes a shard holds. With ``backwards`` rows are counted
        from the last plane, for a volume whose slowest axis is to be flipped.

        gzip data are read to their end, where their checksum is compared: do not trust any slab before the
        iterator is exhausted. ``warn`` is called with the text of each warning.
        """
        channels, nz, ny, nx = padded_to_4d(self.shape)
        together, depth = shard_extent
        with open_bytes(self.voxel_path, compressed=self.compressed) as stream:
            _skip(stream, self.voxel_offset)
            rows = rows_of(nz, depth, backwards=backwards)
            most = min(together, channels) // self.colours * min(depth, nz) * ny * nx
            for c, (row, planes) in itertools.product(range(0, channels, together), rows):
                volumes = min(together, channels - c) // self.colours
                flat = self._read_voxels(stream, volumes * planes * ny * nx, most)
                voxels = flat.reshape(volumes, planes, ny, nx, self.colours)
                voxels = np.moveaxis(voxels, -1, 1).reshape(-1, planes, ny, nx)
                yield Slab((c // together, row), voxels)
            self._drain(stream, warn)

    def _read_voxels(self, stream: IO[bytes], count: int, most: int) -> NDArray[Any]:
        """The next voxels, in memory for ``most``: that of an earlier slab, if it is no longer in use."""
        raw = buffer_pool.empty((most,), self.dtype)[:count]
        view = raw.view(np.uint8).data.cast("B")
        filled = 0
        while filled < len(view):
            got = stream.readinto(view[filled : filled + READ_BYTES])  # type: ignore[attr-defined]
            if not got:
                raise NiftiError(
                    f"{self.voxel_path}: it ends before its last voxel (the header declares "
                    f"{format_bytes(self.voxel_bytes)}); copy the file again"
                )
            filled += got
        if self.colours > 1:
            return raw.view(np.uint8)
        if not raw.dtype.isnative:
            raw = raw.byteswap(inplace=True).view(self.channel_dtype)
        return raw

    def _drain(self, stream: IO[bytes], warn: Warn) -> None:
        """Read gzip data to their end, up to a limit."""
        trailing, limit = 0, max(self.voxel_bytes, MAX_TRAILING_BYTES)
        while self.compressed and (rest := stream.read(2**20)):
            trailing += len(rest)
            if trailing > limit:
                raise NiftiError(
                    f"{self.voxel_path}: its gzip data go on for over {format_bytes(limit)} after its last "
                    f"voxel; write the file again"
                )
        if trailing:
            warn(_TRAILING.format(trailing))


def rows_of(planes: int, depth: int, *, backwards: bool) -> list[tuple[int, int]]:
    """Number and planes of each row of shards, in the order of the file."""
    rows = [(start // depth, min(depth, planes - start)) for start in range(0, planes, depth)]
    return rows[::-1] if backwards else rows


def nibabel_module() -> Any:
    """nibabel, imported when the first header is read: opening a store needs none."""
    import nibabel

    return nibabel


def parsed(kind: HeaderKind, raw: bytes) -> Any:
    """The nibabel header at the start of ``raw``; nothing is checked."""
    nib = nibabel_module()
    header = nib.Nifti1Header if kind.version == 1 else nib.Nifti2Header
    return header(raw[: kind.length], endianness=kind.byte_order, check=False)


def read_header(path: Path, *, affine: str = "sform") -> NiftiFile:
    """Read and check the header of a ``.nii``, ``.nii.gz`` or ``.hdr``, recognised by its first bytes.

    ``affine`` says which affine is taken where a header has both: ``sform`` or ``qform``.
    """
    compressed = is_gzip(path)
    with open_bytes(path, compressed=compressed) as stream:
        header, raw = _parse(path, stream)
    if bytes(header["magic"].tobytes())[:2] == b"ni":
        voxel_path, offset = image_of_pair(path), int(header["vox_offset"])
        return _described(path, header, raw, voxel_path, offset, is_gzip(voxel_path), affine)
    return _described(path, header, raw, path, len(raw), compressed, affine)


def _parse(path: Path, stream: IO[bytes]) -> tuple[Any, bytes]:
    """The header, and all bytes before the voxels: all bytes of the ``.hdr`` file of a pair."""
    raw = stream.read(min(HEADER_VERSIONS))
    kind = header_kind(raw)
    if kind is None or len(raw) < min(HEADER_VERSIONS):
        raise not_nifti(path, raw, cut=kind is not None)
    raw += stream.read(kind.length - len(raw))
    if len(raw) < kind.length:
        raise NiftiError(f"{path}: it ends inside its header; copy the file again")
    header = parsed(kind, raw)
    magic = bytes(header["magic"].tobytes()).rstrip(b"\0")[:3]
    if magic not in kind.magics:
        raise NiftiError(f"{path}: it is not a NIfTI file (its magic is {magic!r}); {LEAVE_OUT}")
    if kind.version == 2 and header["eol_check"].tolist() not in _LINE_ENDS:
        raise NiftiError(f"{path}: it was copied as text, which changes bytes; copy it again as binary")
    is_pair = magic == kind.magics[1]
    offset = float(header["vox_offset"])
    least = 0 if is_pair else kind.length + EXTENSION_FLAG_BYTES
    if not least <= offset <= MAX_HEADER_BYTES or offset % 1:
        raise NiftiError(f"{path}: its voxels cannot start at byte {offset:g}, as its header says; {_REPAIR}")
    if is_pair:
        raw += stream.read(MAX_HEADER_BYTES)
        if stream.read(1):
            raise NiftiError(f"{path}: its header is over {format_bytes(MAX_HEADER_BYTES)} long; {_REPAIR}")
        return header, raw
    raw += stream.read(int(offset) - kind.length)
    if len(raw) < offset:
        raise NiftiError(f"{path}: it ends before its first voxel; copy the file again")
    return header, raw


def image_of_pair(path: Path) -> Path:
    """The file of voxels that belongs to a ``.hdr`` file."""
    stem = path.name.removesuffix(".gz").removesuffix(".hdr").removesuffix(".nii")
    for suffix in (".img", ".img.gz"):
        if (image := path.with_name(stem + suffix)).exists():
            return image
    raise NiftiError(f"{path}: its voxels, {stem}.img, are not beside it; copy both files of the pair")


def _described(
    path: Path,
    header: Any,
    raw: bytes,
    voxel_path: Path,
    voxel_offset: int,
    compressed: bool,
    preferred_affine: str,
) -> NiftiFile:
    warnings: list[str] = []
    dims, dtype = _dims(path, header), _voxel_type(path, header)
    needed = voxel_offset + math.prod(dims) * dtype.itemsize
    trailing = _bytes_beyond(voxel_path, needed, compressed=compressed)
    if trailing:
        warnings.append(_TRAILING.format(trailing))
    if compressed != (voxel_path.suffix == ".gz"):
        warnings.append("its name does not fit its compression")
    if int(header["bitpix"]) != dtype.itemsize * 8:
        warnings.append(f"bitpix is {int(header['bitpix'])} for voxels of {dtype.itemsize * 8} bits")
    affine, affine_source = best_affine(path, header, preferred_affine, warnings)
    slope, inter = _scaling(path, header, warnings)
    units = int(header["xyzt_units"])
    return NiftiFile(
        path=path,
        voxel_path=voxel_path,
        voxel_offset=voxel_offset,
        compressed=compressed,
        raw_header=raw,
        dims=dims,
        dtype=dtype,
        affine=affine,
        affine_source=affine_source,
        slope=slope,
        inter=inter,
        has_time=units - units % 8 in _TIME_UNITS and len(dims) == 4,
        spatial_unit=_SPATIAL_UNITS.get(units % 8),
        warnings=tuple(warnings),
    )


def _dims(path: Path, header: Any) -> tuple[int, ...]:
    count = int(header["dim"][0])
    dims = tuple(int(n) for n in header["dim"][1 : 1 + max(count, 0)])
    if not 1 <= count <= 7 or min(dims) < 1:
        raise NiftiError(f"{path}: it declares impossible dimensions {header['dim'].tolist()}; {_REPAIR}")
    return dims


def _bytes_beyond(voxel_path: Path, needed: int, *, compressed: bool) -> int:
    """The number of bytes after the last voxel, or 0 for gzip data; a file that is too short is refused."""
    present = os.path.getsize(voxel_path)
    if present * (MAX_GZIP_RATIO if compressed else 1) < needed:
        raise NiftiError(
            f"{voxel_path}: it has {format_bytes(present)}{' of gzip data' if compressed else ''} where its "
            f"header declares {format_bytes(needed)}; copy the file again"
        )
    return 0 if compressed else present - needed


def _voxel_type(path: Path, header: Any) -> np.dtype[Any]:
    try:
        dtype: np.dtype[Any] = np.dtype(header.get_data_dtype())
    except (nibabel_module().spatialimages.HeaderDataError, KeyError):
        raise NiftiError(f"{path}: unknown voxel type {int(header['datatype'])}; {_REPAIR}") from None
    if dtype.names is None and (dtype.kind not in "iufc" or dtype.itemsize > 8 * (1 + (dtype.kind == "c"))):
        raise NiftiError(f"{path}: voxels of type {dtype} are not supported; save it as float64")
    return dtype


def _scaling(path: Path, header: Any, warnings: list[str]) -> tuple[float, float]:
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not math.isfinite(slope):
        return 1.0, 0.0  # as the standard says: no scaling
    if not math.isfinite(inter):
        raise NiftiError(f"{path}: its scl_inter is {inter}; repair its header")
    return slope, inter


def _skip(stream: IO[bytes], count: int) -> None:
    while count:
        count -= len(stream.read(min(count, 2**20))) or count
