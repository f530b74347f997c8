"""A reader of stores written by docs/reference/store-format.md alone, without the package itself."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs import blosc

TABLE = []
for byte in range(256):
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
    TABLE.append(byte)


def crc32c(data: bytes) -> bytes:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = TABLE[(crc ^ byte) & 255] ^ crc >> 8
    return struct.pack("<I", crc ^ 0xFFFFFFFF)


def blake2b(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def need(is_right: bool, what: str) -> None:
    if not is_right:
        raise ValueError(what)


def read_manifest(store: Path) -> tuple[dict[tuple[str, str], Any], dict[str, Any]]:
    """The records of images by (subject, image), and the seals of documents by path."""
    root = json.loads((store / "zarr.json").read_bytes())["attributes"]["zpatch"]
    need(root["format"] <= 1, "a newer format")
    images, documents = {}, {}
    *lines, _torn = (store / "manifest.jsonl").read_bytes().split(b"\n")
    for line in lines:
        check = re.search(rb'"check":"([0-9a-f]{32})",', line)
        need(check is not None, "a line without a seal")
        assert check is not None
        need(blake2b(line[: check.start()] + line[check.end() :]) == check[1].decode(), "a line was changed")
        value = json.loads(line)
        if "image" in value:
            images[value["subject"], value["image"]] = value
        else:
            documents[value["document"]] = [value["bytes"], value["checksum"]]
    return images, documents


def verify(store: Path) -> int:
    """Compare every file with its seal; the number of files."""
    images, seals = read_manifest(store)
    for (subject, image), record in images.items():
        seals |= {f"{subject}/{image}/{key}": seal for key, seal in record["files"].items()}
    for path, (length, checksum) in seals.items():
        data = (store / path).read_bytes()
        need(len(data) == length and blake2b(data) == checksum, f"{path} was changed")
    return len(seals)


def read_values(store: Path, record: dict[str, Any], level: int = 0) -> Any:
    """The values (C, I, J, K) of an image, or of a coarser level."""
    array = record["levels"][level - 1] if level else record
    shape, chunks, shards = (np.array(array[key]) for key in ("shape", "chunks", "shards"))
    voxels = np.empty(shape, record["dtype"])
    per_shard = shards // chunks
    for shard in np.ndindex(*-(-shape // shards)):
        file = store.joinpath(record["subject"], record["image"], str(level), "c", *map(str, shard))
        data = file.read_bytes()
        split = len(data) - 16 * int(per_shard.prod()) - 4
        index = data[split:-4]
        need(crc32c(index) == data[-4:], "the index of a shard was changed")
        for place, (offset, length) in zip(
            np.ndindex(*per_shard), struct.iter_unpack("<QQ", index), strict=True
        ):
            first = np.array(shard) * shards + np.array(place) * chunks
            if (first >= shape).any():
                need(offset == length == 2**64 - 1, "a chunk outside the array")
                continue
            need(offset + length <= split, "a chunk is missing")
            encoded = data[offset : offset + length - 4]
            need(crc32c(encoded) == data[offset + length - 4 : offset + length], "a chunk was changed")
            decoded = encoded if record["codec"] == "none" else blosc.decompress(encoded)
            chunk = np.frombuffer(decoded, record["dtype"]).reshape(chunks)
            size = np.minimum(chunks, shape - first)
            box = tuple(slice(a, a + n) for a, n in zip(first, size, strict=True))
            voxels[box] = chunk[tuple(slice(n) for n in size)]
    if len(record["axes"]) == 3:
        voxels = voxels[None]
    if (record["slope"], record["inter"]) != (1, 0):
        voxels = voxels * np.float64(record["slope"]) + record["inter"]
    return voxels.transpose(0, 3, 2, 1)
