"""Data for the benchmarks, made once from the MNI152 T1 template in nilearn's wheel, and kept in a folder."""

from __future__ import annotations

import dataclasses
import gzip
import importlib.util
import itertools
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

TEMPLATE = "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
AIR_HU, BRAIN_HU, LEAST_HU = -1000.0, 90.0, -1024
NOISE_HU = 22.0
VOXEL_MM = (0.45, 0.45, 0.6)
GZIP_LEVEL = 6  # as dcm2niix writes
MEMBER_PLANES = 32
HEADER_BYTES = 352
COARSE_LABELS = 128  # side at which label maps are made, before their voxels are repeated
TISSUES_HU = (-450, 30, 60)  # lower bounds of the classes of a cohort's label maps

Shape = tuple[int, int, int]
Spacing = tuple[float, float, float]


def head(folder: Path, shape: Shape, voxel_mm: Spacing = VOXEL_MM) -> Path:
    """A folder with one subject, ``sub-01/ct.nii.gz``: a head in Hounsfield units, with noise."""
    place = folder / _name("head", shape, voxel_mm)
    return _once(place, lambda place: _write_head(place, shape, voxel_mm))


def long_volume(folder: Path, shape: Shape, voxel_mm: Spacing = VOXEL_MM) -> Path:
    """The same, with any number of planes at little cost: the middle planes repeated, as gzip members."""
    place = folder / _name("long", shape, voxel_mm)
    return _once(place, lambda place: _write_long(place, shape, voxel_mm))


def plain_head(folder: Path, shape: Shape, voxel_mm: Spacing = VOXEL_MM) -> Path:
    """The head uncompressed, in ``source/sub-01/ct.nii``, and its voxels (z, y, x) in ``voxels.npy``."""
    place = folder / _name("plain", shape, voxel_mm)
    return _once(place, lambda place: _write_plain_head(place, shape, voxel_mm))


def cohort(folder: Path, shape: Shape, subjects: int) -> Path:
    """Folders ``nii`` and ``nii.gz`` of the same subjects, ``sub-000/ct.nii`` and ``seg.nii``: the head with
    noise, and its tissues as labels, both rolled by different steps for each subject.
    """
    place = folder / f"{_name('cohort', shape)}-{subjects}"
    return _once(place, lambda place: _write_subjects(place, shape, subjects))


def subject_voxels(source: Path, subject: str) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """Image and label map (z, y, x) of a subject of such a cohort, memory-mapped from uncompressed files."""
    from zpatch.volume_files.formats import read_header

    folder = source / "nii" / subject
    stored = read_header(folder / "ct.nii").shape
    image: NDArray[np.int16] = np.memmap(folder / "ct.nii", "<i2", "r", HEADER_BYTES, stored)
    labels: NDArray[np.uint8] = np.memmap(folder / "seg.nii", np.uint8, "r", HEADER_BYTES, stored)
    return image, labels


def label_map(folder: Path, side: int, classes: int) -> Path:
    """A folder with ``sub-01/seg.nii``: the head's voxels labelled 1 to ``classes`` by the nearest point."""
    place = folder / f"labels-{side}-{classes}"
    return _once(place, lambda place: _write_label_map(place, side, classes))


def labels_of(source: Path, side: int) -> NDArray[np.uint8]:
    """The voxels (z, y, x) of such a label map, memory-mapped."""
    return np.memmap(_label_file(source), np.uint8, "r", offset=HEADER_BYTES, shape=(side,) * 3)


def voxels_of(source: Path) -> NDArray[np.int16]:
    """The voxels (z, y, x) of the file in one of these folders."""
    import nibabel as nib

    image: Any = nib.load(file_of(source))
    voxels: NDArray[np.int16] = np.asanyarray(image.dataobj).T
    return voxels


def stored_shape(source: Path) -> tuple[int, ...]:
    """Extent (z, y, x) of these voxels, by the header."""
    from zpatch.volume_files.formats import read_header

    return read_header(file_of(source)).shape


def voxel_bytes(source: Path) -> int:
    """Bytes of these voxels, by the header."""
    from zpatch.volume_files.formats import read_header

    return read_header(file_of(source)).voxel_bytes


def file_of(source: Path) -> Path:
    """The file in one of these folders."""
    return source / "sub-01" / "ct.nii.gz"


def tiny_cohort(folder: Path, subjects: int, with_folders: int) -> Path:
    """A store of many subjects with two images each, all copies of one converted subject.

    Every subject has its sealed lines in the manifest, which is all that opening reads; the first
    ``with_folders`` have their folders too. The source files of all subjects are in the folder
    ``cohort-source`` beside the store, for a conversion that finds nothing to do.
    """
    place = folder / "cohort"
    shutil.rmtree(place, ignore_errors=True)  # made each time: an old one could have an older format
    place.mkdir(parents=True)
    _write_cohort(place, subjects, with_folders)
    return place


def _name(what: str, shape: Shape, voxel_mm: Spacing = VOXEL_MM) -> str:
    spacing = [] if voxel_mm == VOXEL_MM else [f"{size:g}mm" for size in voxel_mm]
    return "-".join([what, *map(str, shape), *spacing])


def _once(place: Path, make: Callable[[Path], None]) -> Path:
    if not place.exists():
        partial = place.with_name(f"{place.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        make(partial)
        partial.rename(place)
    return place


@cache
def _template() -> NDArray[np.float32]:
    """The brain in Hounsfield units, cut to its bounding box, (x, y, z)."""
    import nibabel as nib

    spec = importlib.util.find_spec("nilearn")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the MNI152 template comes with nilearn; run: pip install --no-deps nilearn")
    path = Path(spec.origin).parent / "datasets" / "data" / TEMPLATE
    voxels = np.asanyarray(nib.load(path).dataobj)  # type: ignore[attr-defined]
    inside = np.argwhere(voxels)
    box = tuple(map(slice, inside.min(axis=0), inside.max(axis=0) + 1))
    values = voxels[box].astype(np.float32)
    hounsfield: NDArray[np.float32] = np.where(values > 0, values / 255 * BRAIN_HU, np.float32(AIR_HU))
    return hounsfield


def _planes(shape: Shape) -> Iterator[NDArray[np.int16]]:
    """The head's planes (y, x): linear upsampling, then noise, whose seed is the number of the plane."""
    for number, plane in enumerate(_smooth_planes(shape)):
        noise = np.random.default_rng([0, number]).standard_normal(plane.shape, dtype=np.float32)
        noisy = np.rint(plane + NOISE_HU * noise).clip(LEAST_HU, None)
        yield np.ascontiguousarray(noisy.T, dtype="<i2")


def _smooth_planes(shape: Shape) -> Iterator[NDArray[np.float32]]:
    """The same planes (x, y) without noise, in Hounsfield units."""
    volume = _template()
    for axis in (0, 1):
        volume = np.moveaxis(_resampled(np.moveaxis(volume, axis, 0), shape[axis]), 0, axis)
    positions = np.linspace(0, volume.shape[2] - 1, shape[2])
    for position in positions:
        below = min(int(position), volume.shape[2] - 2)
        share = np.float32(position - below)
        yield volume[:, :, below] * (1 - share) + volume[:, :, below + 1] * share


def _resampled(volume: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    positions = np.linspace(0, len(volume) - 1, count, dtype=np.float32)
    below = np.minimum(positions.astype(np.intp), len(volume) - 2)
    share = (positions - below)[:, None, None]
    resampled: NDArray[np.float32] = volume[below] * (1 - share) + volume[below + 1] * share
    return resampled


def _write_head(place: Path, shape: Shape, voxel_mm: Spacing) -> None:
    file = _new_file(place)
    with gzip.GzipFile(file, "wb", compresslevel=GZIP_LEVEL, mtime=0) as stream:
        stream.write(_header(shape, voxel_mm=voxel_mm))
        for plane in _planes(shape):
            stream.write(plane.data)


def _write_plain_head(place: Path, shape: Shape, voxel_mm: Spacing) -> None:
    voxels = np.lib.format.open_memmap(place / "voxels.npy", mode="w+", dtype="<i2", shape=shape[::-1])
    for number, plane in enumerate(_planes(shape)):
        voxels[number] = plane
    voxels.flush()
    file = place / "source" / "sub-01" / "ct.nii"
    file.parent.mkdir(parents=True)
    with file.open("wb") as stream:
        stream.write(_header(shape, voxel_mm=voxel_mm))
        stream.write(voxels.data)


def _write_subjects(place: Path, shape: Shape, subjects: int) -> None:
    image = np.stack(list(_planes(shape)))
    labels = np.stack([np.digitize(plane.T, TISSUES_HU).astype(np.uint8) for plane in _smooth_planes(shape)])
    headers = _header(shape), _header(shape, "u1")

    def write(number: int) -> None:
        name, steps = f"sub-{number:03d}", (number, 2 * number, 3 * number)
        for volume, header, file in zip((image, labels), headers, ("ct.nii", "seg.nii"), strict=True):
            voxels = np.roll(volume, steps, axis=(0, 1, 2)).tobytes()
            for kind, content in (("nii", header + voxels), ("nii.gz", _gzip_member(header + voxels))):
                path = place / kind / name / file.replace(".nii", f".{kind}")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(write, range(subjects)))


def _write_label_map(place: Path, side: int, classes: int) -> None:
    times, rest = divmod(side, COARSE_LABELS)
    if rest:
        raise ValueError(f"{side} voxels are not whole times {COARSE_LABELS}")
    head = _template()
    for axis in range(3):
        head = np.moveaxis(_resampled(np.moveaxis(head, axis, 0), COARSE_LABELS), 0, axis)
    inside = head.T > (AIR_HU + BRAIN_HU) / 2
    points = np.random.default_rng(0).choice(np.argwhere(inside), classes, replace=False)
    z, y, x = (points[:, axis].astype(np.float32) for axis in range(3))
    along = np.arange(COARSE_LABELS, dtype=np.float32)[:, None]
    in_plane = ((along - y) ** 2)[:, None] + ((along - x) ** 2)[None]
    file = _label_file(place)
    file.parent.mkdir()
    with file.open("wb") as stream:
        stream.write(_header((side, side, side), "u1"))
        for number, plane in enumerate(inside):
            nearest = (in_plane + (number - z) ** 2).argmin(axis=2) + 1
            labels = np.where(plane, nearest, 0).astype(np.uint8)
            stream.write(labels.repeat(times, axis=0).repeat(times, axis=1).tobytes() * times)


def _label_file(place: Path) -> Path:
    return place / "sub-01" / "seg.nii"


def _write_long(place: Path, shape: Shape, voxel_mm: Spacing) -> None:
    planes = _planes((*shape[:2], 4 * MEMBER_PLANES))
    middle = [plane.tobytes() for plane in itertools.islice(planes, MEMBER_PLANES, 2 * MEMBER_PLANES)]
    member, rest = _gzip_member(b"".join(middle)), shape[2] % MEMBER_PLANES
    with _new_file(place).open("wb") as stream:
        stream.write(_gzip_member(_header(shape, voxel_mm=voxel_mm)))
        for _ in range(shape[2] // MEMBER_PLANES):
            stream.write(member)
        if rest:
            stream.write(_gzip_member(b"".join(middle[:rest])))


def _gzip_member(data: bytes) -> bytes:
    return zlib.compress(data, GZIP_LEVEL, wbits=31)


def _new_file(place: Path) -> Path:
    file = file_of(place)
    file.parent.mkdir()
    return file


def _header(shape: Shape, dtype: str = "<i2", voxel_mm: Spacing = VOXEL_MM) -> bytes:
    import nibabel as nib

    header: Any = nib.Nifti1Header()
    header.set_data_dtype(np.dtype(dtype))
    header.set_data_shape(shape)
    header.set_sform(np.diag([*voxel_mm, 1]), code="scanner")
    header.set_qform(np.diag([*voxel_mm, 1]), code="scanner")
    header.set_xyzt_units("mm")
    header["vox_offset"] = HEADER_BYTES
    header["magic"] = b"n+1"
    return bytes(header.binaryblock) + bytes(4)


def _write_cohort(place: Path, subjects: int, with_folders: int) -> None:
    from zpatch.conversion.conversion import convert
    from zpatch.digests import sealed_line
    from zpatch.records.names import MANIFEST, ROOT_DOCUMENT
    from zpatch.store.store import open_store

    source, one = place / "source", place / "one"
    write_tiny_subject(source / "sub")
    convert(source, one)
    store = open_store(one)
    shutil.copy(one / ROOT_DOCUMENT, place)
    names = [f"sub-{number:05d}" for number in range(subjects)]
    for name in names[:with_folders]:
        shutil.copytree(one / "sub", place / name)
    with (place / MANIFEST).open("w") as stream:
        _write_seal(stream, ROOT_DOCUMENT, store.documents[ROOT_DOCUMENT])
        for name in names:
            _write_seal(stream, f"{name}/{ROOT_DOCUMENT}", store.documents[f"sub/{ROOT_DOCUMENT}"])
            for record in store.records.values():
                path = f"{name}/{Path(record.source.path).name}"
                came_from = dataclasses.replace(record.source, path=path)
                renamed = dataclasses.replace(record, subject=name, source=came_from)
                stream.write(sealed_line(renamed.to_json()) + "\n")
    _link_sources(source / "sub", place.with_name("cohort-source"), names)
    shutil.rmtree(source)
    shutil.rmtree(one)


def _link_sources(subject: Path, folder: Path, names: list[str]) -> None:
    """Make the source files of all subjects: links to the same files, as sizes and times must match."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in names:
        (folder / name).mkdir(parents=True)
        for file in subject.iterdir():
            (folder / name / file.name).hardlink_to(file)


def _write_seal(stream: IO[str], document: str, seal: Any) -> None:
    from zpatch.digests import sealed_line

    line = sealed_line({"document": document, "bytes": seal.bytes, "checksum": seal.checksum})
    stream.write(line + "\n")


def write_tiny_subject(folder: Path) -> None:
    """An image of 16 x 16 x 16 voxels and a label map with three classes."""
    import nibabel as nib

    folder.mkdir(parents=True)
    labels = (np.indices((16, 16, 16)).sum(axis=0) // 16).astype(np.uint8)
    image = (np.arange(16) + 300 * labels.astype(np.int16)).astype(np.int16)
    for name, voxels in (("t1", image), ("seg", labels)):
        nifti = nib.Nifti1Image(voxels, np.eye(4))
        nib.save(nifti, folder / f"{name}.nii.gz")
