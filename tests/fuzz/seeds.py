"""First inputs for the fuzzers: valid ones of each kind, in the layouts that each file in c/ describes."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import io
import itertools
import json
import math
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tifffile
from numcodecs import blosc, lz4, zstd
from parsers import EYE, FINGERPRINT, LEDGER_RECORD, SPLIT, packed

from zpatch.chunks.codec import crc32c
from zpatch.chunks.levels import Level
from zpatch.digests import FileSeal, compact_json, sealed_line
from zpatch.epochs.stream_position import queue_state
from zpatch.records.image_record import ImageRecord, Provenance, SourceFingerprint
from zpatch.store.image_writer import ImageTally
from zpatch.volume_files.nifti_writer import make_header

SCALING = (2.0, -1.0, -50.0, 300.0)
SHUFFLES = (blosc.NOSHUFFLE, blosc.SHUFFLE)


# Compiled loops


def voxels(count: int, dtype: str, kind: str) -> bytes:
    """Voxels that are compressed well, in part, or not at all."""
    rng = np.random.default_rng(count)
    made = {
        "flat": lambda: np.full(count, 7),
        "steps": lambda: np.arange(count) // 5 % 90,
        "noise": lambda: rng.integers(0, 2**31, count),
    }[kind]()
    return made.astype(dtype).tobytes()


def frames(item: int, count: int) -> Iterator[bytes]:
    """A chunk of ``count`` voxels in frames of several block sizes, shuffled or not, and stored."""
    for kind, shuffle, block in itertools.product(("flat", "steps", "noise"), SHUFFLES, (0, 256)):
        data = np.frombuffer(voxels(count, f"u{item}", kind), f"u{item}")
        for level in (5,) if kind != "flat" else (0, 5):
            yield bytes(blosc.compress(data, b"lz4", level, shuffle, block))


def of_lz4() -> Iterator[bytes]:
    """Streams that are decoded whole, or to their middle."""
    for kind, count in itertools.product(("flat", "steps", "noise"), (20, 90, 700)):
        data = voxels(count, "u1", kind)
        for wanted in (count, count // 2):
            yield struct.pack("<HH", count - 1, wanted - 1) + lz4.compress(data)[4:]


def of_blosc() -> Iterator[bytes]:
    """Frames, of which all voxels and some are read."""
    for number, item in enumerate((1, 2, 4, 8)):
        for count in (40, 700):
            for frame in frames(item, count):
                yield struct.pack("<BHHH", number, count - 1, count // 3, count // 4) + frame
    small = bytearray(blosc.compress(np.arange(300, dtype="u4"), b"lz4", 5, blosc.SHUFFLE, 256))
    small[2] &= ~16  # as before blosc 1.14, which had no flag for blocks that are not split
    yield struct.pack("<BHHH", 2, 299, 0, 299) + small
    for name in (b"zstd", b"blosclz", b"lz4hc"):
        data = np.arange(300, dtype="u2")
        yield struct.pack("<BHHH", 1, 299, 0, 299) + bytes(blosc.compress(data, name, 5))


def of_gather() -> Iterator[bytes]:
    """A chunk that is copied to boxes of several layouts, as it is or scaled; rows of numbers as they are."""
    chunk = (2, 3, 5, 40)
    rows = [(0, 0xFFFF), (1, 0)]
    for writer, layout in itertools.product(range(8), ((0, 0, 0, 0), (23, 0b0101, 0, 0), (7, 0xF2, 9, 0))):
        item = (1, 2, 4, 8, 1, 1, 2, 2)[writer]
        data = np.frombuffer(voxels(math.prod(chunk), f"u{item}", "steps"), f"u{item}")
        for is_blosc in (False, True):
            encoded = (
                bytes(blosc.compress(data, b"lz4", 5, blosc.SHUFFLE, 512)) if is_blosc else data.tobytes()
            )
            head = struct.pack("<B4f4B", writer << 1 | is_blosc, *SCALING, *(side - 1 for side in chunk))
            boxes = b"\1\0" + 2 * (bytes(side - 1 for side in chunk) + bytes(layout))
            table = b"".join(
                struct.pack("<BHHB", 0, 0, 0xFFFF, box) + bytes(parts)
                for box, parts in enumerate(
                    ((1, 0, 0, 2, 0, 0, 4, 0, 0, 39, 0, 0), (0, 1, 1, 1, 1, 0, 2, 1, 1, 9, 3, 5))
                )
            )
            yield head + boxes + struct.pack("<H", 0) + bytes([len(rows), 0]) + table + encoded
    for is_blosc, files, mode in itertools.product((0, 1), (0, 2), (0, 2, 4, 6)):  # files, checksums
        data = np.frombuffer(voxels(math.prod(chunk), "u2", "steps"), "u2")
        encoded = bytes(blosc.compress(data, b"lz4", 5)) if is_blosc else data.tobytes()
        head = struct.pack("<B4f4B", 2 | is_blosc, *SCALING, *(side - 1 for side in chunk))
        boxes = bytes((0, files)) + bytes(side - 1 for side in chunk) + bytes(4)
        table = struct.pack("<BHHB", mode, 0, len(encoded), 0) + bytes((1, 0, 0, 2, 0, 0, 4, 0, 0, 39, 0, 0))
        yield head + boxes + struct.pack("<H", 0) + b"\1\0" + table + encoded + b"1234"
    for order, writer, is_blosc in itertools.product(
        (23, 6, 3), (0, 1, 2, 3, 7), (0, 1)
    ):  # strips of two chunks
        item, box = (1, 2, 4, 8, 1, 1, 2, 2)[writer], (2, 6, 5, 79)
        data = np.frombuffer(voxels(math.prod(chunk), f"u{item}", "steps"), f"u{item}")
        encoded = bytes(blosc.compress(data, b"lz4", 5)) if is_blosc else data.tobytes()
        head = struct.pack("<B4f4B", writer << 1 | is_blosc, *SCALING, *(side - 1 for side in chunk))
        boxes = bytes((0, 4)) + bytes(side - 1 for side in box) + bytes((order, 0, 0, 0))
        table = b"".join(
            struct.pack("<BHHB", 0, place * len(encoded), len(encoded), 0)
            + bytes((1, 0, 0, 2, 0, 3 * place if order == 6 else 0, 4, 0, 0))
            + bytes((38, 0, 39 * place if order != 6 else 0))
            for place in (0, 1)
        )
        yield head + boxes + struct.pack("<H", 0) + b"\2\0" + table + 2 * encoded
    deep = (1, 19, 2, 21)  # boxes in any order of axes
    for writer, order in itertools.product(range(8), range(24)):
        item = (1, 2, 4, 8, 1, 1, 2, 2)[writer]
        data = voxels(math.prod(deep), f"u{item}", "steps")
        head = struct.pack("<B4f4B", writer << 1, *SCALING, *(side - 1 for side in deep))
        boxes = b"\0\0" + bytes(side - 1 for side in deep) + bytes((order, 0, 0, 0))
        table = struct.pack("<BHHB", 0, 0, 0xFFFF, 0) + bytes((0, 0, 0, 18, 0, 0, 1, 0, 0, 20, 0, 0))
        yield head + boxes + struct.pack("<H", 0) + b"\1\0" + table + data
        sides = bytes((1, 18, 3, 20))
        layouts = bytes((order, 0, 0, 0)) + bytes((23 - order, 0, 0, 0))
        yield struct.pack("<B4f", 64 | writer << 1, *SCALING) + sides + layouts
    flat, far = (1, 1, 2, 40), struct.pack("<Q", 1 << 63 | 8)  # strides of axes of one voxel are of anyone
    data = np.arange(math.prod(flat), dtype="u2").tobytes()
    head = struct.pack("<B4f4B", 2, *SCALING, *(side - 1 for side in flat))
    boxes = b"\0\0" + bytes(side - 1 for side in flat) + bytes((0, 0, 64, 0)) + 2 * far
    table = struct.pack("<BHHB", 0, 0, 0xFFFF, 0) + bytes((0, 0, 0, 0, 0, 0, 1, 0, 0, 39, 0, 0))
    yield head + boxes + struct.pack("<H", 0) + b"\1\0" + table + data
    numbers = [0, 0, 8, 0, *(0, 1, 0) * 4]
    head = struct.pack("<B4f4Q", 16, *SCALING, 1, 1, 1, 8) + b"\0\0" + bytes(8) + struct.pack("<H", 0)
    yield head + b"\1\0" + np.array(numbers, "<i8").tobytes() + bytes(range(8))
    yield struct.pack("<B4f", 32 | 7 << 1, *SCALING) + bytes(range(60))
    for mode, layout in itertools.product(
        (0, 2, 7, 128), ((0, 0, 0, 0), (11, 0b0101, 9, 0), (3, 0x30, 0, 2))
    ):
        sides = bytes((2, 3, 4, 30))
        yield struct.pack("<B4f", 64 | mode, *SCALING) + sides + bytes(layout) + bytes(4)


def of_blend() -> Iterator[bytes]:
    """Each function, with dense voxels, with axes in another order, and with constant and odd strides."""
    layouts = ((0, 0, 0, 0), (23, 0, 0, 0), (9, 0b1010, 8, 0), (0, 0x20, 0, 0b0010), (5, 3, 64, 0))
    for function, layout, style in itertools.product((0, 1, 2), layouts, (0, 1, 2, 6)):
        for sides in ((2, 3, 4, 5), (1, 2, 1, 600)):
            one = bytes([function, style]) + struct.pack("<3BH", *sides) + bytes(layout) + bytes(layout)
            yield one + bytes(8 if style & 2 else 0) + bytes(range(3, 40))


def of_count() -> Iterator[bytes]:
    """Voxels of one, two and four bytes, and floats that are not finite or zero."""
    for item, shift, count in itertools.product((1, 2, 3, 4), (0, 1), (0, 9, 64)):
        yield bytes([item - 1, shift, 0]) + voxels(count, "u1", "noise")
    odd = np.array([0.0, -0.0, np.nan, np.inf, -np.inf, 1e-45, -3.5, 3e38], np.float32)
    for count in (1, 11, 100):
        yield bytes([3, 0, 0]) + np.tile(odd, count)[: 8 * count - 3].tobytes()


# Parsers: each input as its function in parsers.py reads it


def of_nifti() -> Iterator[bytes]:
    """Files of both versions and byte orders, a pair, RGB, and an extension."""
    affine = np.diag([1, 2, 3, 1.0])
    for mode, dtype in itertools.product((0, 2), ("<i2", "<f4", "u1")):
        yield bytes([mode]) + make_header((3, 2, 2), 1, np.dtype(dtype), affine) + bytes(range(48))
    yield b"\0" + make_header((3, 2, 2), 2, np.dtype("<i2"), affine) + bytes(48)
    long = make_header((40_000, 1, 1), 1, np.dtype("u1"), affine)
    yield b"\0" + long[:16] + struct.pack("<8q", 3, 3, 2, 1, 1, 1, 1, 1) + long[80:] + bytes(6)
    one = bytearray(make_header((3, 2, 2), 1, np.dtype("u1"), affine))
    yield b"\1" + bytes(one[:108]) + bytes(4) + bytes(one[112:344]) + b"ni1\0" + bytes(4) + SPLIT + bytes(12)
    one[70:74] = struct.pack("<2h", 128, 24)
    yield b"\0" + bytes(one) + bytes(36)
    one[108:112] = struct.pack("<f", 368)
    yield b"\0" + bytes(one[:348]) + b"\1\0\0\0" + struct.pack("<2i", 16, 6) + bytes(8 + 36)


def of_text() -> Iterator[bytes]:
    """Headers of MetaImage and of NRRD files: voxels in them, in a file, in several; compressed; channels."""
    data = bytes(range(24))
    mha = b"NDims = 3\nDimSize = 2 3 2\nElementType = MET_%s\nTransformMatrix = 0 1 0 1 0 0 0 0 -1\n"
    mha += b"%sElementDataFile = %s\n"
    zipped, last = b"CompressedData = True\n", (b"LOCAL", b"a.raw", b"LIST 2\na.raw\na.raw", b"a%sraw 1 1 1")
    for kind, more, where in zip(
        (b"SHORT", b"USHORT", b"CHAR", b"UCHAR"), (b"", zipped) * 2, last, strict=True
    ):
        local = where == b"LOCAL"
        held = zlib.compress(data) if more else data
        yield b"\0" + mha % (kind, more, where) + (held if local else SPLIT + held)
    yield b"\0" + mha % (b"CHAR", b"ElementNumberOfChannels = 2\nHeaderSize = -1\n", b"LOCAL") + data
    nrrd = (
        b"NRRD0005\n# x\ntype: %s\ndimension: 4\nsizes: 2 2 3 2\nendian: big\nencoding: %s\nkey:=value\n%s\n"
    )
    along = b"kinds: list domain domain domain\nspace: RAS\nspace directions: none (0,2,0) (3,0,0) (0,0,4)\n"
    placed = along + b"space origin: (1,2,3)\nbyte skip: 1\nline skip: 0\n"
    yield b"\1" + nrrd % (b"uint8", b"raw", placed) + b"x" + data
    yield b"\1" + nrrd % (b"uint8", b"gzip", placed) + gzip.compress(b"x" + data, 1, mtime=0)
    axes = b'spacings: 1 2 3 nan\naxis mins: 1 2 3 nan\nunits: "mm" "mm" "mm" ""\n'
    yield b"\1" + nrrd % (b"short", b"raw", axes + b"data file: a.raw\nbyte skip: -1\n") + SPLIT + data * 2
    yield b"\1" + nrrd % (b"uchar", b"raw", b"data file: a%d.raw 1 2 1 3\n") + SPLIT + data
    yield b"\1" + nrrd % (b"uchar", b"raw", b"data file: LIST 3\na.raw\na.raw") + SPLIT + data


def of_gzip() -> Iterator[bytes]:
    """Streams that are packed already, or to be packed; several members, and bytes after them."""
    data = next(of_nifti())[1:]
    yield b"\0" + gzip.compress(data, 1, mtime=0)
    yield b"\0" + gzip.compress(data[:200], 1, mtime=0) + gzip.compress(data[200:], 1, mtime=0)
    yield b"\1" + data
    yield b"\1" + data + SPLIT + bytes(30)


def of_manifest() -> Iterator[bytes]:
    """Lines of images and of a document, sealed by the parser, and one that holds its seal."""
    one = ImageRecord(
        subject="ann",
        image="t1",
        kind="label",
        shape=(8, 8, 8),
        dtype="<u2",
        axes="zyx",
        chunks=(4, 4, 4),
        shards=(8, 8, 8),
        codec="lz4",
        affine=EYE,
        split="train",
        levels=(Level((4, 4, 4), (4, 4, 4), (4, 4, 4)),),
        stats={"labels": {"0": 3, "2": 1}},
        source=SourceFingerprint("a.nii", 7, 9, "0" * 32),
        files={"zarr.json": FileSeal(5, "1" * 32)},
        provenance=Provenance("net", None, {"t1": None}, "0.1"),
        warnings=("odd",),
        inputs="2" * 32,
    )
    two = dataclasses.replace(
        one, image="t2", axes="czyx", shape=(2, 8, 8, 8), chunks=(1, 8, 8, 8), levels=()
    )
    two = dataclasses.replace(two, shards=(2, 8, 8, 8), provenance=None, source=None, kind="scalar")
    document = compact_json({"document": "zarr.json", "bytes": 7, "checksum": "0" * 32}).encode()
    lines = [compact_json(record.to_json()).encode() for record in (one, two)]
    yield b"\1" + b"\n".join([document, *lines])
    yield b"\1" + lines[0] + SPLIT + b'{"attributes":{"zpatch":{"format":1,"version":"0.1"}}}'
    yield b"\0" + sealed_line(one.to_json()).encode() + b"\n"


def of_zarr() -> Iterator[bytes]:
    """Arrays of both versions, sharded or not, with fill values, alone or as a level of OME-Zarr."""
    data = np.arange(64, dtype="<u2")
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}]
    blosc_codec = {"cname": "lz4", "clevel": 5, "shuffle": "shuffle", "typesize": 2, "blocksize": 0}
    index = [*codecs, {"name": "crc32c"}]
    index_of_one = struct.pack("<QQ", 0, 128)
    inner = {"chunk_shape": [4, 4, 4], "codecs": codecs, "index_codecs": index, "index_location": "end"}
    chains = (
        codecs,
        [*codecs, {"name": "blosc", "configuration": blosc_codec}],
        [*codecs, {"name": "zstd", "configuration": {"level": 0, "checksum": False}}],
        [*codecs, {"name": "gzip", "configuration": {"level": 5}}, {"name": "crc32c"}],
        [{"name": "sharding_indexed", "configuration": inner}],
    )
    bodies = (
        data.tobytes(),
        bytes(blosc.compress(data, b"lz4", 5, blosc.SHUFFLE)),
        bytes(zstd.compress(data.tobytes())),
        gzip.compress(data.tobytes(), 1, mtime=0),
        data.tobytes() + index_of_one + crc32c(index_of_one),
    )
    axes = [{"name": name, "type": "space", "unit": "micrometer"} for name in "zyx"]
    scale = {"type": "scale", "scale": [3, 2, 1]}
    multiscales = [{"axes": axes, "datasets": [{"path": "0", "coordinateTransformations": [scale]}]}]
    group = {"zarr_format": 3, "node_type": "group", "attributes": {"ome": {"multiscales": multiscales}}}
    for chain, body in zip(chains, bodies, strict=True):
        array = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [4, 4, 4],
            "data_type": "uint16",
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [4, 4, 4]}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": 0,
            "codecs": chain,
            "attributes": {},
            "dimension_names": ["z", "y", "x"],
        }
        for mode, attributes in ((0, b""), (2, json.dumps(group).encode())):
            mode |= 4 if chain[-1]["name"] == "crc32c" else 0
            yield bytes([mode]) + SPLIT.join([attributes, json.dumps(array).encode(), body])
    lz4_blosc = {"id": "blosc", "cname": "lz4", "clevel": 5}
    for compressor, body, order in (
        (None, bodies[0], "C"),
        (lz4_blosc, bodies[1], "C"),
        (None, bodies[0], "F"),
    ):
        array = {
            "zarr_format": 2,
            "shape": [4, 4, 4],
            "chunks": [4, 4, 4],
            "dtype": "<u2",
            "fill_value": 0,
            "order": order,
            "filters": None,
            "compressor": compressor,
            "dimension_separator": ".",
        }
        named = json.dumps({"_ARRAY_DIMENSIONS": ["z", "y", "x"]}).encode()
        yield b"\1" + SPLIT.join([named, json.dumps(array).encode(), body])
        image = json.dumps({"multiscales": [{**multiscales[0], "version": "0.4"}]}).encode()
        yield b"\3" + SPLIT.join([image, json.dumps(array).encode(), body])


def of_lists() -> Iterator[bytes]:
    """Datalists of the Decathlon, of MONAI and of nnU-Net; tables with commas, semicolons and tabs."""
    entry = {"image": ["a_t1.nii.gz", "a_t2.nii.gz"], "label": "a_seg.nii.gz", "age": 7.5}
    decathlon = {"modality": {"0": "T1"}, "training": [entry], "test": ["./b.nii.gz"]}
    folds = {"training": [{"image": "a.nii", "fold": 0, "id": 3}], "validation": []}
    listed = {"channel_names": {"0": "CT"}, "dataset": {"a": {"images": ["a.nii"], "label": "b.nii"}}}
    for value in (decathlon, folds, [entry], ["c.nii", "d.nii"]):
        yield b"\0" + json.dumps(value).encode()
    yield b"\3" + json.dumps(listed).encode()
    rows = "subject,t1,label:seg,age,split\nann,a.nii,b.nii,7,train\nbob,c.nii,n/a,1e3,test\n"
    yield b"\1" + rows.encode()
    yield b"\1" + rows.replace(",", ";").encode()
    yield b"\2" + rows.replace(",", "\t").encode()


def of_folders() -> Iterator[bytes]:
    """BIDS raw and derived, nnU-Net, the Decathlon, and plain folders."""
    bids = b"sub-1/ses-a/anat/sub-1_ses-a_run-1_T1w.nii.gz\nsub-1/ses-a/anat/sub-1_ses-a_run-2_T1w.nii.gz"
    derived = b"derivatives/fs/sub-1/anat/sub-1_space-orig_dseg.nii.gz\ndataset_description.json"
    yield bids + b"\n" + derived + SPLIT + b"participant_id\tage\nsub-1\t7\n"
    nnunet = b"imagesTr/a_0000.nii.gz\nimagesTr/a_0001.nii.gz\nlabelsTr/a.nii.gz"
    yield nnunet + SPLIT + SPLIT + b'{"channel_names": {"0": "T1", "1": "T2"}, "labels": {}}'
    yield (
        b"imagesTr/a.nii"
        + SPLIT
        + SPLIT
        + b'{"modality": {"0": "T1"}, "training": [{"image": "imagesTr/a.nii"}]}'
    )
    yield b"ann/t1.nii\nann/seg.nii.gz\nbob_t1.nii\nbob_t2.nii\nimages/c.nii\nlabels/c.hdr\nlabels/c.img"


def of_ledger() -> Iterator[bytes]:
    """A header, and the entry of a shard with its state."""
    tally = ImageTally(LEDGER_RECORD, "a")
    tally.update((0, 0, 0, 0), np.arange(64, dtype="<f4").reshape(1, 4, 4, 4))
    state = base64.b64encode(packed(tally.state())).decode()
    seal = {"bytes": 40, "checksum": "0" * 32}
    entry = {"unit": [0, 0, 0, 0], "file": "0/c/0/0/0", "seal": seal, "skipped": 0, "state": state}
    header = {"header": {"patch_size": 3, "reduce": "argmax"}}
    parts = [compact_json(value).encode() for value in (header, entry | {"not_finite": 1})]
    yield b"\1" + SPLIT.join([*parts, bytes(40)])
    yield b"\0" + SPLIT.join([*(sealed_line(value).encode() for value in (header, entry)), bytes(40)])


def of_state() -> Iterator[bytes]:
    """The state of this queue, of another one, and of a version to come."""
    for fingerprint, version in ((FINGERPRINT, 1), ({"cohort": "d"}, 1), (FINGERPRINT, 2)):
        yield json.dumps({**queue_state(fingerprint, 7, 2, 30), "version": version}).encode()


def of_tiff() -> Iterator[bytes]:
    """Small files in tiles, strips and planes, of several codecs; one with a coarser level, one of Aperio."""
    grey = np.arange(40 * 36, dtype=np.uint8).reshape(40, 36)
    colours = np.stack([grey, grey // 2, grey // 3], axis=2)
    tiles: dict[str, Any] = {"tile": (16, 16), "compression": "zlib"}
    for number, (pixels, options) in enumerate(
        [
            (grey, tiles),
            (grey, {}),
            (grey, {"compression": "lzw", "rowsperstrip": 9}),
            (colours, {"tile": (16, 32), "compression": "jpeg", "photometric": "rgb"}),
            (colours, {**tiles, "photometric": "rgb", "description": "Aperio |MPP = 0.5", "metadata": None}),
            (np.stack([grey, grey]), {**tiles, "photometric": "minisblack", "metadata": {"axes": "CYX"}}),
            (np.stack([grey, grey]), {"imagej": True, "metadata": {"axes": "ZYX", "unit": "um"}}),
            (np.stack([grey, grey]), {**tiles, "ome": True, "photometric": "minisblack"}),
            (grey > 9, {"tile": (16, 16), "bigtiff": True}),
            (grey.astype(">f4"), {"byteorder": ">", **tiles}),
        ]
    ):
        stream = io.BytesIO()
        tifffile.imwrite(stream, pixels, **options)
        for kind in {0, number % 4, int("Aperio" in str(options))}:
            yield bytes([kind]) + stream.getvalue()
    stream = io.BytesIO()
    with tifffile.TiffWriter(stream) as file:
        file.write(grey, subifds=1, **tiles)
        file.write(grey[::2, ::2], subfiletype=1, **tiles)
    yield b"\0" + stream.getvalue()


SEEDS: dict[str, Callable[[], Iterator[bytes]]] = {
    "lz4": of_lz4,
    "blosc": of_blosc,
    "gather": of_gather,
    "blend": of_blend,
    "count": of_count,
    "nifti": of_nifti,
    "text": of_text,
    "gzip": of_gzip,
    "manifest": of_manifest,
    "zarr": of_zarr,
    "lists": of_lists,
    "folders": of_folders,
    "ledger": of_ledger,
    "state": of_state,
    "tiff": of_tiff,
}
