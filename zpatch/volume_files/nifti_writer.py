"""Writing NIfTI files: raw headers, copied or built, and voxels streamed after them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zpatch.errors import VolumeFileError
from zpatch.geometry.affines import Affine, spacing_mm
from zpatch.geometry.boxes import Triple
from zpatch.runtime.whole_file import whole_file
from zpatch.volume_files.byte_streams import gzip_writer
from zpatch.volume_files.nifti_header import nibabel_module, parsed
from zpatch.volume_files.signature import EXTENSION_FLAG_BYTES, HeaderKind, header_kind

_GEOMETRY_FIELDS = (
    *("qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("sform_code", "srow_x", "srow_y", "srow_z", "xyzt_units"),
)
_UNITS: Mapping[str | None, str] = {"meter": "meter", "millimeter": "mm", "micrometer": "micron"}


def header_of(raw_header: bytes) -> Any:
    """The nibabel header of raw header bytes, in their byte order.

    Extensions are left out, as nibabel refuses a header whose extensions state a wrong size.
    """
    return parsed(_kind_of(raw_header), raw_header)


def single_file_header(raw_header: bytes) -> bytes:
    """The raw header for a single .nii file: that of a .hdr/.img pair is adapted, that of a .nii kept."""
    header = header_of(raw_header)
    if header["magic"].tobytes().rstrip(b"\0") not in (b"ni1", b"ni2"):
        return raw_header
    length = _kind_of(raw_header).length
    extensions = raw_header[length:] or bytes(EXTENSION_FLAG_BYTES)
    header["magic"] = header.single_magic
    header["vox_offset"] = length + len(extensions)
    return bytes(header.binaryblock) + extensions


def _kind_of(raw_header: bytes) -> HeaderKind:
    kind = header_kind(raw_header)
    if kind is None:
        raise VolumeFileError(
            "these are not the bytes of a NIfTI header; take the raw header of a NIfTI file"
        )
    return kind


def make_header(
    spatial_shape: Triple,
    channels: int,
    dtype: np.dtype[Any],
    affine: Affine,
    *,
    spatial_unit: str | None = "millimeter",
    has_time: bool = False,
    like: bytes | None = None,
) -> bytes:
    """A raw header for an image that was not a NIfTI file; NIfTI-2 where a side is over 32,767 voxels.

    ``affine`` maps (I, J, K) to ``spatial_unit``, one of NIfTI's meter, millimeter and micrometer. With
    ``has_time`` channels are time points, of an unknown distance. ``like`` is the raw header of an image on
    the same grid, whose sform, qform and units are copied instead.
    """
    nib = nibabel_module()
    dims = (*spatial_shape, channels) if channels > 1 else spatial_shape
    kind = nib.Nifti2Header if max(dims) > np.iinfo(np.int16).max else nib.Nifti1Header
    header: Any = kind()
    header.set_data_dtype(dtype)
    header.set_data_shape(dims)
    if like is None:
        header.set_sform(affine, code="scanner")
        try:
            header.set_qform(affine, code="scanner", strip_shears=False)
        except nib.spatialimages.HeaderDataError:
            header["qform_code"] = 0  # a sheared affine has no qform; nibabel has set its code by now
        header.set_xyzt_units(_UNITS.get(spatial_unit, "unknown"), "sec" if has_time else None)
        if has_time:
            header["pixdim"][4] = 0
    else:
        source = header_of(like)
        for name in _GEOMETRY_FIELDS:
            header[name] = source[name]
        header["pixdim"][:4] = source["pixdim"][:4]
    header["vox_offset"] = header.single_vox_offset
    header["magic"] = header.single_magic
    header["scl_slope"], header["scl_inter"] = 1, 0
    return bytes(header.binaryblock) + bytes(EXTENSION_FLAG_BYTES)


def resampled_header(raw_header: bytes, spatial_shape: Triple, dtype: np.dtype[Any], affine: Affine) -> bytes:
    """The raw header of an image, after its voxels were resampled to another grid and their slope applied.

    Its description says so; extensions are left out, as they may be about the old grid. Codes and units stay.
    """
    header = header_of(raw_header)
    dims = (*spatial_shape, *(int(n) for n in header["dim"][4 : 1 + int(header["dim"][0])]))
    codes = int(header["qform_code"]), int(header["sform_code"]) or 1
    steps, units = np.array(header["pixdim"][4:]), header.get_xyzt_units()
    if max(dims) > np.iinfo(np.int16).max and header.sizeof_hdr != nibabel_module().Nifti2Header.sizeof_hdr:
        header = nibabel_module().Nifti2Header.from_header(header)
    if header.get_data_dtype().names is None:  # colours stay as they are
        header.set_data_dtype(dtype.newbyteorder(header.endianness))
    header.set_data_shape(dims)
    header.set_sform(affine, code=codes[1])
    try:
        header.set_qform(affine, code=codes[0], strip_shears=False)
    except nibabel_module().spatialimages.HeaderDataError:
        header["qform_code"] = 0  # a sheared affine has no qform
        header["pixdim"][1:4] = spacing_mm(affine)
    header["pixdim"][4:] = steps
    header.set_xyzt_units(*units)
    header["scl_slope"], header["scl_inter"] = 1, 0
    header["descrip"] = b"resampled by zpatch"
    header["vox_offset"], header["magic"] = header.single_vox_offset, header.single_magic
    return bytes(header.binaryblock) + bytes(EXTENSION_FLAG_BYTES)


def write_nifti(
    path: Path, raw_header: bytes, slabs: Iterator[NDArray[Any]], *, dtype: np.dtype[Any]
) -> None:
    """Write raw header bytes, then the slabs in file order as ``dtype``; gzip if the name ends in ``.gz``.

    The file appears whole or not at all.
    """
    with whole_file(path) as partial, partial.open("wb") as raw, contextlib.ExitStack() as stack:
        stream: Any = stack.enter_context(gzip_writer(raw)) if path.name.endswith(".gz") else raw
        stream.write(raw_header)
        for slab in slabs:
            stream.write(np.ascontiguousarray(slab, dtype=dtype).data.cast("B"))
