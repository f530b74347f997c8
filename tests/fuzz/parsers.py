"""What reads text and headers of others, as functions of bytes and of an empty folder: the fuzzers of Python.

Each takes any bytes, and may raise errors of zpatch only, within a second and little memory. Several files
are in one input, with SPLIT between them.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import math
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from zpatch.chunks.codec import crc32c
from zpatch.chunks.layout import plan_layout
from zpatch.chunks.mapped_shards import close_shards
from zpatch.conversion.conversion_options import ConvertOptions
from zpatch.conversion.discovery import discover
from zpatch.digests import digest
from zpatch.epochs.stream_position import epoch_and_consumed
from zpatch.errors import ZpatchError
from zpatch.geometry.boxes import PatchLocation
from zpatch.geometry.orientation import orientation_to
from zpatch.images.image import ScalarImage
from zpatch.prediction.shard_ledger import HEADER, LEDGER, ShardLedger, begin, header_of
from zpatch.records.image_record import ImageRecord
from zpatch.records.names import MANIFEST, ROOT_DOCUMENT
from zpatch.slides import openslide_file, tiff_file
from zpatch.store.store import open_store, sharded_array
from zpatch.volume_files.formats import files_of, read_header
from zpatch.volume_files.nifti_writer import make_header, single_file_header
from zpatch.volume_files.volume_file import VolumeFile

SPLIT = b"\0--\0"
MOST_SECONDS = 1.0  # of the processor
MOST_BYTES = 512 * 2**20
SMALL_BYTES = 2**22  # voxels of more are not read
FINGERPRINT = {"cohort": "c", "sampler": "s", "max_length": 5}

Parser = Callable[[bytes, Path], None]


def nifti(data: bytes, folder: Path) -> None:
    """A header with voxels, or both files of a pair; the first byte chooses."""
    kind, data = data[:1], data[1:]
    head, _, voxels = data.partition(SPLIT)
    if kind and kind[0] & 1:
        path = folder / "t1.hdr"
        path.write_bytes(head)
        (folder / "t1.img").write_bytes(voxels)
    else:
        path = folder / "t1.nii"
        path.write_bytes(data)
    _read_voxels(read_header(path, affine="qform" if kind and kind[0] & 2 else "sform"))
    with contextlib.suppress(ZpatchError):
        read_one_voxel(path)


def text_header(data: bytes, folder: Path) -> None:
    """The header of an NRRD or a MetaImage file with its voxels, and the bytes of a file ``a.raw``."""
    kind, data = data[:1], data[1:]
    head, _, voxels = data.partition(SPLIT)
    path = folder / ("a.nrrd" if kind and kind[0] & 1 else "a.mha")
    path.write_bytes(head)
    (folder / "a.raw").write_bytes(voxels)
    files_of(path)
    _read_voxels(read_header(path))
    with contextlib.suppress(ZpatchError):
        read_one_voxel(path)


def gzip_stream(data: bytes, folder: Path) -> None:
    """Compressed bytes, or a header and voxels that are compressed first; the first byte chooses."""
    path = folder / "t1.nii.gz"
    kind, data = data[:1], data[1:]
    if kind and kind[0] & 1:
        head, _, after = data.partition(SPLIT)
        data = gzip.compress(head, 1, mtime=0) + after
    path.write_bytes(data)
    _read_voxels(read_header(path))


def _read_voxels(file: VolumeFile) -> None:
    """Do what a conversion does with a file; voxels are read where they are few."""
    single_file_header(file.raw_header)
    orientation_to(file.affine, "RAS")
    spacing = np.linalg.norm(file.affine[:3, :3], axis=0)[::-1].tolist()
    layout = plan_layout(
        file.shape, file.channel_dtype.itemsize, spacing=spacing, interleaved=file.interleaved
    )
    if file.voxel_bytes <= SMALL_BYTES:
        for slab in file.slabs(layout.slab_extent):
            slab.voxels.sum()


def read_one_voxel(path: Path) -> None:
    """Open whatever an image can be, and read its first voxel if its chunks are small."""
    image = ScalarImage(path)
    source = image.source
    if math.prod(source.chunk_shape) * source.shape[0] * source.dtype.itemsize <= 16 * SMALL_BYTES:
        image.read(PatchLocation((0, 0, 0), (1, 1, 1)))


def manifest(data: bytes, folder: Path) -> None:
    """The lines of a manifest, sealed first if the first byte says so, and the root document of its store."""
    kind, data = data[:1], data[1:]
    lines, _, root = data.partition(SPLIT)
    if kind and kind[0] & 1:
        lines = b"".join(_sealed(line) + b"\n" for line in lines.split(b"\n"))
    (folder / MANIFEST).write_bytes(lines)
    (folder / ROOT_DOCUMENT).write_bytes(root or b'{"attributes": {"zpatch": {"format": 1}}}')
    store = open_store(folder)
    for record in store.records.values():
        array = sharded_array(store.image_path(record), record)
        assert record.voxel_bytes >= 0, array.shard_grid
        record.to_json()


def _sealed(line: bytes) -> bytes:
    """A line with the digest of its bytes, wherever these are a dict."""
    return line[:1] + b'"check":"%s",' % digest(line).encode() + line[1:]


def zarr_metadata(data: bytes, folder: Path) -> None:
    """The metadata of an array or of an OME-Zarr image, of version 2 or 3, with the bytes of one chunk."""
    kind, *parts = (data[:1], *data[1:].split(SPLIT, 3))
    attributes, array, chunk, _ = (*parts, b"", b"", b"", b"")[:4]
    is_v2, is_image, has_checksum = (bool(kind) and kind[0] & bit for bit in (1, 2, 4))
    chunk += crc32c(chunk) if has_checksum else b""
    level = folder / "0" if is_image else folder
    level.mkdir(exist_ok=True)
    (level / (".zarray" if is_v2 else "zarr.json")).write_bytes(array)
    if is_v2:
        (folder / ".zattrs").write_bytes(attributes)
    if is_image:
        (folder / (".zgroup" if is_v2 else "zarr.json")).write_bytes(
            b'{"zarr_format": 2}' if is_v2 else attributes
        )
    for name in ("0.0.0", "c/0/0/0", "0/0/0"):
        file = level / name
        file.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):
            file.write_bytes(chunk)
    read_one_voxel(folder)


def case_list(data: bytes, folder: Path) -> None:
    """A datalist, a table, or the ``dataset.json`` of nnU-Net."""
    kind, data = data[:1], data[1:]
    name = ("list.json", "list.csv", "list.tsv", "dataset.json")[kind[0] & 3 if kind else 0]
    (folder / name).write_bytes(data)
    discover(folder / name, ConvertOptions())


def folder_names(data: bytes, folder: Path) -> None:
    """Files by name, one a line, with ``participants.tsv`` and ``dataset.json`` after them."""
    names, participants, dataset = (*data.split(SPLIT, 2), b"", b"")[:3]
    root = bytes(folder)
    for name in names.split(b"\n")[:24]:
        parts = [part[:60] for part in name.replace(b"\0", b"").split(b"/") if part.strip(b".")][:5]
        file = Path(b"/".join([root, *parts]).decode(errors="surrogateescape"))
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
    for name, text in (("participants.tsv", participants), ("dataset.json", dataset)):
        with contextlib.suppress(OSError):
            if text:
                (folder / name).write_bytes(text)
    found = discover(folder, ConvertOptions())
    assert all(image.path.is_relative_to(folder) for case in found.cases for image in case.images) or dataset


def ledger(data: bytes, folder: Path) -> None:
    """The header of a ledger, its two entries, and the file of the shard that they are of."""
    kind, data = data[:1], data[1:]
    header, entry, state = (*data.split(SPLIT, 2), b"", b"")[:3]
    if kind and kind[0] & 1:
        header, entry = _sealed(header), _sealed(entry)
    image = folder / "digest" / "seg"
    entries = image.parent / LEDGER / image.name
    for place in (entries, image / "0" / "c" / "0" / "0"):
        place.mkdir(parents=True)
    (folder / HEADER).write_bytes(header)
    (entries / "0.0.0.0.json").write_bytes(entry)
    (image / "0" / "c" / "0" / "0" / "0").write_bytes(state[:40])
    for use in (
        lambda: header_of(folder),
        lambda: begin(folder, {"patch_size": 3}, writes=False),
        lambda: ShardLedger(image).has((0, 0, 0, 0)),
        lambda: ShardLedger(image).finish(LEDGER_RECORD, RAW_HEADER),
    ):
        with contextlib.suppress(ZpatchError):
            use()


def queue_position(data: bytes, _: Path) -> None:
    """The state of a queue, as JSON."""
    try:
        state = json.loads(data)
    except (ValueError, RecursionError):
        return
    if isinstance(state, dict):
        epoch_and_consumed(state, FINGERPRINT, 7)


def tiff(data: bytes, folder: Path) -> None:
    """A TIFF file; the first byte chooses its ending."""
    kind, data = data[:1], data[1:]
    path = folder / f"a.{('tif', 'svs', 'ndpi', 'ome.tif')[kind[0] & 3 if kind else 0]}"
    path.write_bytes(data)
    try:
        read_one_voxel(path)
    finally:
        for door in (tiff_file, openslide_file):
            door._open.forget(lambda key: key[1].path.is_relative_to(folder))


EYE = tuple(map(tuple, np.eye(4).tolist()))
RAW_HEADER = make_header((4, 4, 4), 1, np.dtype("<f4"), np.eye(4))
LEDGER_RECORD = ImageRecord(
    subject="a",
    image="seg",
    kind="scalar",
    shape=(4, 4, 4),
    dtype="<f4",
    axes="zyx",
    chunks=(4, 4, 4),
    shards=(4, 4, 4),
    codec="lz4",
    affine=EYE,
)

PARSERS: Mapping[str, Parser] = {
    "nifti": nifti,
    "text": text_header,
    "gzip": gzip_stream,
    "manifest": manifest,
    "zarr": zarr_metadata,
    "lists": case_list,
    "folders": folder_names,
    "ledger": ledger,
    "state": queue_position,
    "tiff": tiff,
}


def parse(name: str, data: bytes, folder: Path) -> None:
    """Give bytes to a parser; an error that is not zpatch's, or too much time, is a failure."""
    start = time.process_time()
    with contextlib.suppress(ZpatchError):
        PARSERS[name](data, folder)
    close_shards(folder)
    seconds = time.process_time() - start
    assert seconds < MOST_SECONDS, f"{name} took {seconds:.1f} s"


@contextlib.contextmanager
def fresh_folders(place: Path | None = None) -> Iterator[Callable[[], Path]]:
    """A function that gives an empty folder, the same each time, below a folder or in memory."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=place or (memory if memory.is_dir() else None)) as parent:
        folder = Path(parent) / "f"

        def fresh() -> Path:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            return folder

        yield fresh


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    """Let this process take little more memory than it has, so that MemoryError is raised for more."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    status = Path("/proc/self/status").read_text()
    held = int(status.partition("VmData:")[2].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (held + MOST_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def packed(values: Mapping[str, np.ndarray]) -> bytes:
    """Arrays as in the state of a ledger's entry."""
    stream = io.BytesIO()
    np.savez_compressed(stream, **values)
    return stream.getvalue()
