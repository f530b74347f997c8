"""The door to NIfTI files: headers read without touching voxels, voxels streamed slab by slab, and exact
writing. The only module that knows nibabel or gzip."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import itertools
import math
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from zpatch.errors import NiftiError
from zpatch.geometry import Affine, Triple, max_corner_distance
from zpatch.layout import Layout
from zpatch.memory import format_bytes
from zpatch.schema import Source, padded_to_4d

try:
    from isal import igzip, igzip_lib

    _gzip: ModuleType = igzip
    _BROKEN_GZIP: tuple[Any, ...] = (gzip.BadGzipFile, EOFError, zlib.error, igzip_lib.error)
except ImportError:  # no wheel for this platform: the standard library is slower, and as exact
    _gzip = gzip
    _BROKEN_GZIP = (gzip.BadGzipFile, EOFError, zlib.error)

SUFFIXES = (".nii", ".nii.gz")
GZIP_LEVEL = 1
MAX_HEADER_BYTES = 64 * 2**20
MAX_FORM_VOXELS = 0.01

_GZIP_MAGIC = b"\x1f\x8b"
_NIFTI1_BYTES, _NIFTI2_BYTES = 348, 540
_EXTENSION_FLAG_BYTES = 4
_GEOMETRY_FIELDS = (
    *("qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("sform_code", "srow_x", "srow_y", "srow_z", "xyzt_units"),
)
_TIME_UNITS = ("sec", "msec", "usec")
_TRAILING = "{} trailing bytes after the last voxel"

Warn = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Slab:
    """Some planes of a volume as they arrive: ``voxels`` is (c, z, y, x), ``shard`` its place in units
    of the layout's shards along c and z."""

    shard: tuple[int, int]
    voxels: NDArray[Any]


@dataclass(frozen=True, slots=True)
class NiftiFile:
    """What the header of a NIfTI file says.

    ``raw_header`` is everything before the first voxel, extensions included. ``shape`` is that of the
    array to store: ``(z, y, x)`` or, where the file has more than three axes or RGB voxels,
    ``(c, z, y, x)`` with all further axes in one. ``dtype`` is the file's own, ``channel_dtype`` that
    of one channel in little-endian order.
    """

    path: Path
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
        """How many bytes of colour a voxel has: 3 or 4; 1 where voxels are numbers."""
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

    def slabs(self, layout: Layout, warn: Warn = lambda text: None) -> Iterator[Slab]:
        """Stream the voxels in file order, one row of shards at a time.

        The gzip stream is drained to its end, where its checksum is compared; until the iterator is
        exhausted nothing that it gave may be trusted. ``warn`` is told what was odd.
        """
        channels, nz, ny, nx = padded_to_4d(self.shape)
        together, depth, _, _ = padded_to_4d(layout.shards)
        with _open_voxels(self) as stream:
            for c, z in itertools.product(range(0, channels, together), range(0, nz, depth)):
                volumes, planes = min(together, channels - c) // self.colours, min(depth, nz - z)
                flat = self._read_voxels(stream, volumes * planes * ny * nx)
                voxels = flat.reshape(volumes, planes, ny, nx, self.colours)
                voxels = np.moveaxis(voxels, -1, 1).reshape(-1, planes, ny, nx)
                yield Slab((c // together, z // depth), voxels)
            self._drain(stream, warn)

    def _read_voxels(self, stream: IO[bytes], count: int) -> NDArray[Any]:
        raw = np.empty(count, dtype=self.dtype)
        view = raw.view(np.uint8).data.cast("B")
        filled = 0
        while filled < len(view):
            got = stream.readinto(view[filled:])  # type: ignore[attr-defined]
            if not got:
                raise NiftiError(
                    f"{self.path}: it ends before its last voxel (the header declares "
                    f"{format_bytes(self.voxel_bytes)}); copy the file again"
                )
            filled += got
        if self.colours > 1:
            return raw.view(np.uint8)
        if not raw.dtype.isnative:
            raw = raw.byteswap(inplace=True).view(self.channel_dtype)
        return raw

    def _drain(self, stream: IO[bytes], warn: Warn) -> None:
        trailing = 0
        while rest := stream.read(2**20):
            trailing += len(rest)
        if trailing and self.compressed:
            warn(_TRAILING.format(trailing))


def read_header(path: Path) -> NiftiFile:
    """Read and check the header of a ``.nii`` or ``.nii.gz``, by its first bytes."""
    try:
        with path.open("rb") as stream:
            compressed = stream.read(2) == _GZIP_MAGIC
    except OSError as error:
        raise NiftiError(f"{path}: it cannot be read ({error.strerror})") from None
    opener = _gzip.open if compressed else open
    try:
        with opener(path, "rb") as stream:
            header, raw = _parse(path, stream)
    except _BROKEN_GZIP as error:
        raise NiftiError(f"{path}: broken gzip data ({error}); copy the file again") from None
    return _described(path, header, raw, compressed)


def _parse(path: Path, stream: IO[bytes]) -> tuple[Any, bytes]:
    raw = stream.read(_NIFTI1_BYTES)
    little, big = (int.from_bytes(raw[:4], order) for order in ("little", "big"))
    kinds = {_NIFTI1_BYTES: nib.Nifti1Header, _NIFTI2_BYTES: nib.Nifti2Header}
    kind = kinds.get(little) or kinds.get(big)
    if kind is None or len(raw) < _NIFTI1_BYTES:
        raise NiftiError(f"{path}: it is not a NIfTI file (its first bytes are no NIfTI header)")
    length = little if little in kinds else big
    raw += stream.read(length - len(raw))
    if len(raw) < length:
        raise NiftiError(f"{path}: it ends inside its header; copy the file again")
    header: Any = kind(raw, endianness="<" if little in kinds else ">", check=False)  # type: ignore[no-untyped-call]
    magic = bytes(header["magic"].tobytes()).rstrip(b"\0")[:3]
    if magic in (b"ni1", b"ni2"):
        raise NiftiError(f"{path}: it is the header of a .hdr/.img pair; save it as .nii first")
    if magic not in (b"n+1", b"n+2"):
        raise NiftiError(f"{path}: it is not a NIfTI file (its magic is {magic!r})")
    offset = float(header["vox_offset"])
    if not length + _EXTENSION_FLAG_BYTES <= offset <= MAX_HEADER_BYTES or offset % 1:
        raise NiftiError(f"{path}: its voxels cannot start at byte {offset:g}, as its header says")
    raw += stream.read(int(offset) - length)
    if len(raw) < offset:
        raise NiftiError(f"{path}: it ends before its first voxel; copy the file again")
    return header, raw


def _described(path: Path, header: Any, raw: bytes, compressed: bool) -> NiftiFile:
    warnings: list[str] = []
    dims = tuple(int(n) for n in header["dim"][1 : 1 + max(int(header["dim"][0]), 0)])
    if not 1 <= int(header["dim"][0]) <= 7 or min(dims) < 1:
        raise NiftiError(f"{path}: it declares impossible dimensions {header['dim'].tolist()}")
    dtype = _voxel_type(path, header)
    needed = len(raw) + math.prod(dims) * dtype.itemsize
    if not compressed:
        present = os.path.getsize(path)
        if present < needed:
            raise NiftiError(
                f"{path}: it has {format_bytes(present)} where its header declares "
                f"{format_bytes(needed)}; copy the file again"
            )
        if present > needed:
            warnings.append(_TRAILING.format(present - needed))
    if compressed != (path.suffix == ".gz"):
        warnings.append("its name does not fit its compression")
    if int(header["bitpix"]) != dtype.itemsize * 8:
        warnings.append(f"bitpix is {int(header['bitpix'])} for voxels of {dtype.itemsize * 8} bits")
    affine, affine_source = _best_affine(path, header, warnings)
    slope, inter = _scaling(path, header, warnings)
    space, time = header.get_xyzt_units()
    return NiftiFile(
        path=path,
        compressed=compressed,
        raw_header=raw,
        dims=dims,
        dtype=dtype,
        affine=affine,
        affine_source=affine_source,
        slope=slope,
        inter=inter,
        has_time=time in _TIME_UNITS and len(dims) == 4,
        spatial_unit={"mm": "millimeter", "meter": "meter", "micron": "micrometer"}.get(space),
        warnings=tuple(warnings),
    )


def _voxel_type(path: Path, header: Any) -> np.dtype[Any]:
    try:
        dtype: np.dtype[Any] = np.dtype(header.get_data_dtype())
    except (HeaderDataError, KeyError):
        raise NiftiError(f"{path}: unknown voxel type {int(header['datatype'])}") from None
    if dtype.names is None and (dtype.kind not in "iufc" or dtype.itemsize > 8 * (1 + (dtype.kind == "c"))):
        raise NiftiError(f"{path}: voxels of type {dtype} are not supported; save it as float64")
    return dtype


def _best_affine(path: Path, header: Any, warnings: list[str]) -> tuple[Affine, str]:
    """The affine by nibabel's own order: sform, qform, then voxel sizes alone."""
    if int(header["sform_code"]) > 0:
        affine = np.asarray(header.get_sform(), dtype=np.float64)
        if _usable(affine):
            if _qform_differs(header, affine):
                warnings.append("its qform puts voxels elsewhere than its sform, which is taken")
            return affine, "sform"
        warnings.append("its sform is singular or not finite")
    if int(header["qform_code"]) > 0:
        with contextlib.suppress(HeaderDataError):
            affine = np.asarray(header.get_qform(), dtype=np.float64)
            if _usable(affine):
                return affine, "qform"
        warnings.append("its qform is singular or not finite")
    if any("form is singular" in w for w in warnings):
        raise NiftiError(f"{path}: neither its sform nor its qform is usable; repair its header")
    affine = np.asarray(header.get_base_affine(), dtype=np.float64)
    warnings.append("it has neither sform nor qform: only voxel sizes are known")
    if not _usable(affine):
        warnings.append("a voxel size is zero, negative or not finite: taken as 1 mm")
        affine = np.eye(4)
    return affine, "pixdim"


def _qform_differs(header: Any, sform: Affine) -> bool:
    if int(header["qform_code"]) <= 0:
        return False
    with contextlib.suppress(HeaderDataError):
        qform = np.asarray(header.get_qform(), dtype=np.float64)
        i, j, k = (int(n) for n in (*header["dim"][1:4], 1, 1)[:3])
        return _usable(qform) and max_corner_distance(sform, qform, (i, j, k)) > MAX_FORM_VOXELS
    return False


def _usable(affine: Affine) -> bool:
    return bool(np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3])) > 1e-12)


def _scaling(path: Path, header: Any, warnings: list[str]) -> tuple[float, float]:
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not math.isfinite(slope):
        return 1.0, 0.0  # as the standard says: no scaling
    if not math.isfinite(inter):
        raise NiftiError(f"{path}: its scl_inter is {inter}; repair its header")
    return slope, inter


@contextlib.contextmanager
def _open_voxels(file: NiftiFile) -> Iterator[IO[bytes]]:
    opener = _gzip.open if file.compressed else open
    try:
        with opener(file.path, "rb") as stream:
            _skip(stream, len(file.raw_header))
            yield stream
    except _BROKEN_GZIP as error:
        raise NiftiError(f"{file.path}: broken gzip data ({error}); copy the file again") from None
    except OSError as error:
        raise NiftiError(f"{file.path}: it cannot be read ({error.strerror})") from None


def _skip(stream: IO[bytes], count: int) -> None:
    while count:
        count -= len(stream.read(min(count, 2**20))) or count


def fingerprint(path: Path, folder: Path) -> Source:
    """What tells a source file from another or a later one; its path is told from ``folder``."""
    try:
        status = path.stat()
        with path.open("rb") as stream:
            checksum = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        raise NiftiError(f"{path}: it cannot be read ({error.strerror})") from None
    relative = path.relative_to(folder).as_posix()
    return Source(relative, status.st_size, status.st_mtime_ns, checksum)


def header_of(raw_header: bytes) -> Any:
    """The nibabel header of raw header bytes, in its own byte order and with its extensions."""
    kind = nib.Nifti2Header if _is_nifti2(raw_header) else nib.Nifti1Header
    return kind.from_fileobj(io.BytesIO(raw_header), check=False)


def _is_nifti2(raw_header: bytes) -> bool:
    sizes = {int.from_bytes(raw_header[:4], order) for order in ("little", "big")}
    return _NIFTI2_BYTES in sizes


def make_header(
    spatial_shape: Triple,
    channels: int,
    dtype: np.dtype[Any],
    affine: Affine,
    *,
    like: bytes | None = None,
) -> bytes:
    """A raw header for an image that was no NIfTI file; NIfTI-2 where a side is over 32,767 voxels.

    ``like`` is the raw header of an image on the same grid, whose sform, qform and units are taken over.
    """
    dims = (*spatial_shape, channels) if channels > 1 else spatial_shape
    kind = nib.Nifti2Header if max(dims) > np.iinfo(np.int16).max else nib.Nifti1Header
    header: Any = kind()  # type: ignore[no-untyped-call]
    header.set_data_dtype(dtype)
    header.set_data_shape(dims)
    if like is None:
        header.set_sform(affine, code="scanner")
        try:
            header.set_qform(affine, code="scanner", strip_shears=False)
        except HeaderDataError:  # a sheared affine has no qform, and nibabel has set its code by now
            header["qform_code"] = 0
        header.set_xyzt_units("mm")
    else:
        source = header_of(like)
        for name in _GEOMETRY_FIELDS:
            header[name] = source[name]
        header["pixdim"][:4] = source["pixdim"][:4]
    header["vox_offset"] = header.single_vox_offset
    header["magic"] = header.single_magic
    header["scl_slope"], header["scl_inter"] = 1, 0
    return bytes(header.binaryblock) + bytes(_EXTENSION_FLAG_BYTES)


def write_nifti(
    path: Path, raw_header: bytes, slabs: Iterator[NDArray[Any]], *, dtype: np.dtype[Any]
) -> None:
    """Write raw header bytes, then the slabs in file order as ``dtype``; gzip where the name says so.

    The file appears whole or not at all.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as raw, contextlib.ExitStack() as stack:
            stream: Any = raw
            if path.name.endswith(".gz"):
                stream = stack.enter_context(
                    _gzip.GzipFile(filename="", mode="wb", compresslevel=GZIP_LEVEL, fileobj=raw, mtime=0)
                )
            stream.write(raw_header)
            for slab in slabs:
                stream.write(np.ascontiguousarray(slab, dtype=dtype).data.cast("B"))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
