"""What tests of reports share: small stores, and a page as a browser would take it."""

from __future__ import annotations

import base64
import json
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

import zpatch as zp
from zpatch.digests import digest
from zpatch.report.report import write_report
from zpatch.store.names import MANIFEST

PIXEL_TYPES = {0: 1, 2: 3, 3: 1}


class Page(HTMLParser):
    """What a browser would find in a page: elements with their attributes, and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, name: str) -> list[dict[str, str]]:
        return [attributes for element, attributes in self.elements if element == name]

    def pictures(self) -> list[NDArray[np.uint8]]:
        return [pixels_of(uri.partition(",")[2]) for uri in (img["src"] for img in self.all("img"))]


def pixels_of(encoded: str) -> NDArray[np.uint8]:
    """The pixels of a PNG as this package writes it, RGBA where it has a palette."""
    data = base64.b64decode(encoded)
    parts: dict[bytes, bytes] = {}
    at = 8
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        name, content = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert zlib.crc32(name + content) == int.from_bytes(data[at + 8 + length : at + 12 + length], "big")
        parts[name] = content
        at += 12 + length
    width, height = (int.from_bytes(parts[b"IHDR"][n : n + 4], "big") for n in (0, 4))
    samples = PIXEL_TYPES[parts[b"IHDR"][9]]
    lines = np.frombuffer(zlib.decompress(parts[b"IDAT"]), np.uint8).reshape(height, -1)
    pixels = lines[:, 1:]
    if lines[0, 0] == 2:
        pixels = np.cumsum(pixels, axis=0, dtype=np.uint8)
    if b"PLTE" in parts:
        colours = np.frombuffer(parts[b"PLTE"], np.uint8).reshape(-1, 3)
        opacity = np.frombuffer(parts[b"tRNS"], np.uint8)[:, None]
        return np.concatenate([colours, opacity], axis=1)[pixels]
    return (
        pixels.reshape(height, width, samples).squeeze(2)
        if samples == 1
        else pixels.reshape(height, width, 3)
    )


def save(
    path: Path, voxels: NDArray[Any], affine: NDArray[np.float64] | None = None, unit: str = "mm"
) -> None:
    """A NIfTI file, with an affine if one is given and with voxel sizes of 1 only if not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(voxels, np.eye(4) if affine is None else affine)
    image.header.set_xyzt_units(unit, "sec" if voxels.ndim == 4 else "unknown")
    if affine is None:
        image.set_sform(None, 0)
        image.set_qform(None, 0)
    image.to_filename(path)


def store_of(folder: Path, **options: Any) -> Path:
    """The store of the files below ``folder / "source"``."""
    zp.convert(folder / "source", folder / "store.zarr", **options)
    return folder / "store.zarr"


def page_of(store: Path, folder: Path, **options: Any) -> Page:
    report = write_report(store, folder / "report.html", **options)
    assert report.bytes == (folder / "report.html").stat().st_size
    return Page((folder / "report.html").read_text())


def change(store: Path, subject: str, image: str, **values: Any) -> None:
    """Say something else of an image, in a line of the manifest that is as well sealed as any."""
    value = {**zp.Cohort(store).store.records[subject, image].to_json(), **values}
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))  # NaN too, which no line of ours has
    sealed = json.dumps({**value, "check": digest(text.encode())}, sort_keys=True, separators=(",", ":"))
    with (store / MANIFEST).open("a") as manifest:
        manifest.write(f"{sealed}\n")
