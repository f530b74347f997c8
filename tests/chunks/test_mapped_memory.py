"""Files that are cut short while they are mapped are errors that name them, and never end a process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import nibabel as nib
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

import zpatch as zp
from zpatch.chunks import mapped_memory
from zpatch.chunks.mapped_memory import copy_mapped
from zpatch.chunks.mapped_shards import close_shards
from zpatch.errors import DamageError, ZpatchError

needs_compiled_loop = pytest.mark.skipif(mapped_memory._compiled is None, reason="built without a compiler")
WHOLE = zp.PatchLocation((0, 0, 0), (40, 40, 40))
CUT = r"{}.*was cut short"


@given(st.data())
def test_arrays_of_any_shape_and_strides_are_copied(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
    dtype = data.draw(st.sampled_from(["|u1", "<i2", ">i2", "<f4", ">f8", "<c16", "|b1", "|S3"]))
    rng = np.random.default_rng(0)
    memory = rng.integers(0, 2, [2 * n for n in shape]).astype(dtype)

    def view(array: Any) -> Any:
        steps = tuple(slice(None, None, data.draw(st.sampled_from([2, -2]))) for _ in shape)
        return array[steps].transpose(data.draw(st.permutations(range(len(shape)))))

    source = view(memory)
    out = view(np.zeros([2 * n for n in shape], dtype))
    if out.shape == source.shape:
        assert copy_mapped(source, out)
        np.testing.assert_array_equal(out, source)
    fresh = np.zeros(source.shape, dtype)
    assert copy_mapped(source, fresh)
    np.testing.assert_array_equal(fresh, source)


@needs_compiled_loop
@pytest.mark.parametrize(
    ("source", "out"), [((2, 3), (3, 2)), ((2,), (2, 1)), ((1,) * 5, (1,) * 5)], ids=["shape", "axes", "many"]
)
def test_arrays_that_do_not_fit_are_refused(source: Any, out: Any) -> None:
    with pytest.raises(ValueError, match="same shape"):
        mapped_memory._compiled(np.zeros(source), np.zeros(out))
    with pytest.raises(ValueError, match="one type"):
        mapped_memory._compiled(np.zeros(3), np.zeros(3, np.int16))


def store_of(folder: Path, codec: str) -> tuple[zp.Image, Path]:
    (folder / "scans" / "ann").mkdir(parents=True)
    voxels = np.random.default_rng(0).integers(0, 5000, (40, 40, 40)).astype(np.int16)
    nib.Nifti1Image(voxels, np.eye(4)).to_filename(folder / "scans" / "ann" / "t1.nii")
    zp.convert(folder / "scans", folder / "store.zarr", chunk=20, codec=codec)
    return zp.Cohort(folder / "store.zarr")[0].t1, folder / "store.zarr/ann/t1/0/c/0/0/0"


def zarr_of(folder: Path, compressor: Any) -> tuple[zp.Image, Path]:
    voxels = np.random.default_rng(0).integers(0, 5000, (40, 40, 40)).astype(np.int16)
    zarr.create_array(folder / "array", data=voxels, chunks=(40, 40, 40), compressors=compressor)
    return zp.ScalarImage(folder / "array", axes="zyx"), folder / "array" / "c" / "0" / "0" / "0"


def nifti_of(folder: Path) -> tuple[zp.Image, Path]:
    voxels = np.random.default_rng(0).integers(0, 5000, (40, 40, 40)).astype(np.int16)
    nib.Nifti1Image(voxels, np.eye(4)).to_filename(folder / "t1.nii")
    return zp.ScalarImage(folder / "t1.nii"), folder / "t1.nii"


KINDS: dict[str, Callable[[Path], tuple[zp.Image, Path]]] = {
    "lz4": lambda folder: store_of(folder, "lz4"),
    "none": lambda folder: store_of(folder, "none"),
    "zstd": lambda folder: store_of(folder, "zstd"),
    "zarr": lambda folder: zarr_of(folder, None),
    "zarr gzip": lambda folder: zarr_of(folder, zarr.codecs.GzipCodec()),
    "nifti": nifti_of,
}


@needs_compiled_loop
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("seen", [True, False], ids=["read before", "opened"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_cut_short_under_its_map_is_an_error_that_names_it(
    tmp_path: Path, kind: str, seen: bool, scaled: bool, full: bool
) -> None:
    if not full and scaled != seen:
        pytest.skip("all four ways need --full")
    image, file = KINDS[kind](tmp_path)
    image.read(WHOLE if seen else zp.PatchLocation((0, 0, 0), (1, 1, 1)), scaled=scaled)
    whole = file.read_bytes()
    os.truncate(file, 4096 if kind == "nifti" else 10)
    with pytest.raises(DamageError, match=CUT.format(file.name) if kind == "nifti" else str(file)):
        image.read(WHOLE, scaled=scaled)
    file.write_bytes(whole)
    if kind != "nifti":
        close_shards(tmp_path)
        image.read(WHOLE)


BEYOND = """
import mmap, os, sys
import numpy as np, zpatch as zp
from zpatch.chunks.mapped_memory import copy_mapped
with open("file", "wb") as file:
    file.write(bytes(8 * 4096))
mapped = np.memmap("file", np.uint8, "r")
os.truncate("file", 100)
assert not copy_mapped(mapped, np.empty_like(mapped))
print("noticed", flush=True)
mapped.sum()
"""


@needs_compiled_loop
def test_a_read_outside_the_guard_ends_the_process_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "asan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("the sanitizer reports the signal itself")
    monkeypatch.chdir(tmp_path)
    ran = forked.run(BEYOND)
    assert (ran.returncode, ran.stdout) == (-signal.SIGBUS, "noticed\n")


@needs_compiled_loop
@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_a_worker_of_a_queue_names_the_file_that_was_cut_short(
    tmp_path: Path, start_method: str, full: bool
) -> None:
    if start_method == "spawn" and not full:
        pytest.skip("a spawned worker reads as a forked one does; both need --full")
    image, file = store_of(tmp_path, "none")
    queue = zp.Queue(
        [zp.Subject(name="ann", t1=image)], zp.UniformSampler(20), patches_per_volume=400, max_length=8,
        num_workers=1, start_method=start_method, timeout=60,
    )  # fmt: skip
    with queue:
        patches = iter(queue)
        next(patches)
        os.truncate(file, 10)
        with pytest.raises(ZpatchError, match=f"(?s){file}.*was cut short"):
            list(patches)


@pytest.mark.parametrize("channels", [2, 3, 4])
@pytest.mark.parametrize("dtype", ["u1", "<u2", "<f4"])
@pytest.mark.parametrize("shift", [0, 1])
def test_interleaved_channels_are_copied_to_planes(channels: int, dtype: str, shift: int) -> None:
    shape = (2, 5, 37, channels)
    count = np.prod(shape) * np.dtype(dtype).itemsize
    memory = np.random.default_rng(0).integers(0, 256, shift + count, np.uint8)
    source = memory[shift:].view(dtype).reshape(shape)  # of an odd address where shift is 1
    for order in ((3, 0, 1, 2), (3, 1, 0, 2), (0, 3, 1, 2)):
        wanted = source.transpose(order)
        out = np.empty(wanted.shape, dtype)
        assert copy_mapped(wanted, out)
        assert out.tobytes() == np.ascontiguousarray(wanted).tobytes()
