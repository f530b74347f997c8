"""The door to nibabel: headers of NIfTI files, read without touching voxels."""

from __future__ import annotations

import math
from pathlib import Path
from typing import IO, Any

import numpy as np

from zpatch.errors import VolumeFileError
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
from zpatch.volume_files.volume_file import VolumeFile
from zpatch.volume_files.voxel_parts import VoxelPart, checked_parts

SUFFIXES = (".nii", ".nii.gz", ".hdr")
MAX_HEADER_BYTES = 64 * 2**20

_SPATIAL_UNITS = {1: "meter", 2: "millimeter", 3: "micrometer"}  # xyzt_units modulo 8
_TIME_UNITS = (8, 16, 24)
_LINE_ENDS = ([13, 10, 26, 10], [0, 0, 0, 0])
_REPAIR = "repair its header, or copy the file again"


def nibabel_module() -> Any:
    """nibabel, imported when the first header is read: opening a store needs none."""
    import nibabel

    return nibabel


def parsed(kind: HeaderKind, raw: bytes) -> Any:
    """The nibabel header at the start of ``raw``; nothing is checked."""
    nib = nibabel_module()
    header = nib.Nifti1Header if kind.version == 1 else nib.Nifti2Header
    return header(raw[: kind.length], endianness=kind.byte_order, check=False)


def read_header(path: Path, *, affine: str = "sform") -> VolumeFile:
    """Read and check the header of a ``.nii``, ``.nii.gz`` or ``.hdr``, recognised by its first bytes.

    ``affine`` says which affine is taken where a header has both: ``sform`` or ``qform``.
    """
    with open_bytes(path, compression="gzip" if is_gzip(path) else "") as stream:
        header, raw = _parse(path, stream)
    if bytes(header["magic"].tobytes())[:2] == b"ni":
        return _described(path, header, raw, image_of_pair(path), int(header["vox_offset"]), affine)
    return _described(path, header, raw, path, len(raw), affine)


def _parse(path: Path, stream: IO[bytes]) -> tuple[Any, bytes]:
    """The header, and all bytes before the voxels: all bytes of the ``.hdr`` file of a pair."""
    raw = stream.read(min(HEADER_VERSIONS))
    kind = header_kind(raw)
    if kind is None or len(raw) < min(HEADER_VERSIONS):
        raise not_nifti(path, raw, cut=kind is not None)
    raw += stream.read(kind.length - len(raw))
    if len(raw) < kind.length:
        raise VolumeFileError(f"{path}: it ends inside its header; copy the file again")
    header = parsed(kind, raw)
    magic = bytes(header["magic"].tobytes()).rstrip(b"\0")[:3]
    if magic not in kind.magics:
        raise VolumeFileError(f"{path}: it is not a NIfTI file (its magic is {magic!r}); {LEAVE_OUT}")
    if kind.version == 2 and header["eol_check"].tolist() not in _LINE_ENDS:
        raise VolumeFileError(f"{path}: it was copied as text, which changes bytes; copy it again as binary")
    is_pair = magic == kind.magics[1]
    offset = float(header["vox_offset"])
    least = 0 if is_pair else kind.length + EXTENSION_FLAG_BYTES
    if not least <= offset <= MAX_HEADER_BYTES or offset % 1:
        raise VolumeFileError(
            f"{path}: its voxels cannot start at byte {offset:g}, as its header says; {_REPAIR}"
        )
    if is_pair:
        raw += stream.read(MAX_HEADER_BYTES)
        if stream.read(1):
            raise VolumeFileError(
                f"{path}: its header is over {format_bytes(MAX_HEADER_BYTES)} long; {_REPAIR}"
            )
        return header, raw
    raw += stream.read(int(offset) - kind.length)
    if len(raw) < offset:
        raise VolumeFileError(f"{path}: it ends before its first voxel; copy the file again")
    return header, raw


def image_of_pair(path: Path) -> Path:
    """The file of voxels that belongs to a ``.hdr`` file."""
    stem = path.name.removesuffix(".gz").removesuffix(".hdr").removesuffix(".nii")
    for suffix in (".img", ".img.gz"):
        if (image := path.with_name(stem + suffix)).exists():
            return image
    raise VolumeFileError(f"{path}: its voxels, {stem}.img, are not beside it; copy both files of the pair")


def _described(
    path: Path, header: Any, raw: bytes, voxel_path: Path, voxel_offset: int, preferred_affine: str
) -> VolumeFile:
    warnings: list[str] = []
    dims, dtype = _dims(path, header), _voxel_type(path, header)
    voxel_bytes = math.prod(dims) * dtype.itemsize
    zipped = is_gzip(voxel_path)
    part = (
        VoxelPart(voxel_path, 0, voxel_bytes, "gzip", skip=voxel_offset)
        if zipped
        else VoxelPart(voxel_path, voxel_offset, voxel_bytes)
    )
    parts = checked_parts([part], warnings)
    if zipped != (voxel_path.suffix == ".gz"):
        warnings.append("its name does not fit its compression")
    if int(header["bitpix"]) != dtype.itemsize * 8:
        warnings.append(f"bitpix is {int(header['bitpix'])} for voxels of {dtype.itemsize * 8} bits")
    affine, affine_source = best_affine(path, header, preferred_affine, warnings)
    slope, inter = _scaling(path, header, warnings)
    units = int(header["xyzt_units"])
    return VolumeFile(
        path=path,
        parts=parts,
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
        raise VolumeFileError(
            f"{path}: it declares impossible dimensions {header['dim'].tolist()}; {_REPAIR}"
        )
    return dims


def _voxel_type(path: Path, header: Any) -> np.dtype[Any]:
    try:
        dtype: np.dtype[Any] = np.dtype(header.get_data_dtype())
    except (nibabel_module().spatialimages.HeaderDataError, KeyError):
        raise VolumeFileError(f"{path}: unknown voxel type {int(header['datatype'])}; {_REPAIR}") from None
    if dtype.names is None and (dtype.kind not in "iufc" or dtype.itemsize > 8 * (1 + (dtype.kind == "c"))):
        raise VolumeFileError(f"{path}: voxels of type {dtype} are not supported; save it as float64")
    return dtype


def _scaling(path: Path, header: Any, warnings: list[str]) -> tuple[float, float]:
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not math.isfinite(slope):
        return 1.0, 0.0  # as the standard says: no scaling
    if not math.isfinite(inter):
        raise VolumeFileError(f"{path}: its scl_inter is {inter}; repair its header")
    return slope, inter
