"""Memory: each stage holds the memory that its plan states, a small part of a volume of any size.

Each measurement runs in a process of its own, after the same work on a small volume, so that libraries are
loaded. The peak is VmHWM, which is reset before, and not ru_maxrss, which a child has from its parent.
"""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import nibabel as nib
import numpy as np
import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")

MIB = 2**20
SHAPE = (512, 512, 1280)  # int16: 640 MiB
VOLUME_BYTES = 640 * MIB
PLANES_TOGETHER = 64

MEASURE = """
import gc, json, sys
from pathlib import Path

def status(key):
    for line in open("/proc/self/status"):
        if line.startswith(key):
            return int(line.split()[1]) * 1024

def start():
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak to the present memory
    return status("VmHWM")
"""

CONVERT = """
from zpatch.conversion.conversion_plan import ConvertOptions, plan_conversion
from zpatch.conversion.conversion import run_conversion

small, source, store = map(Path, sys.argv[1:4])
options = ConvertOptions.of(**json.loads(sys.argv[4] if sys.argv[4:] else "{}"))
run_conversion(plan_conversion(small, options), store.with_name("small.zarr"))
before = start()
plan = plan_conversion(source, options)
run_conversion(plan, store)
print(json.dumps({"growth": status("VmHWM") - before, "stated": plan.peak_bytes}))
"""

READ = """
import zpatch as zp

subject = zp.Cohort(sys.argv[1])[0]
subject = subject.resampled(float(sys.argv[2])) if sys.argv[2:] else subject
list(zp.UniformSampler(64)(subject, 2, rng=0))
before = status("RssAnon")
most = 0
for patch in zp.UniformSampler(64)(subject, 400, rng=1):
    most = max(most, status("RssAnon"))
print(json.dumps({"growth": most - before, "patch": patch.t1.data.nbytes}))
"""

PREDICT = """
import torch
import zpatch as zp

def four_classes(batch):
    return torch.cat([batch, -batch, batch + 1, batch - 1], dim=1)

def first_wins(voxels):
    return (voxels[:1] > voxels[1:2]).to(torch.uint8)

options = {"image": "t1", "patch_size": 64, "patch_overlap": 16, "reduce": first_wins}
small, large, out = sys.argv[1:]
zp.predict(four_classes, zp.Cohort(small), out + ".small", **options)
before = start()
zp.predict(four_classes, zp.Cohort(large), out, **options)
print(json.dumps({"growth": status("VmHWM") - before}))
"""


def measured(program: str, *arguments: Path | str) -> dict[str, int]:
    """The output of a program in a process of its own."""
    ran = forked.run(MEASURE + program, *arguments, malloc={forked.M_ARENA_MAX: 2})
    assert ran.returncode == 0, ran.stderr
    figures: dict[str, int] = json.loads(ran.stdout)
    return figures


def header_of(shape: tuple[int, ...]) -> bytes:
    header: Any = nib.Nifti1Header()
    header.set_data_shape(shape)
    header.set_data_dtype(np.int16)
    header.set_sform(np.eye(4), code="scanner")
    header.set_data_offset(352)
    return bytes(header.binaryblock).ljust(352, b"\0")


def noise(*shape: int) -> bytes:
    return np.random.default_rng(0).integers(0, 1000, shape, dtype=np.int16).tobytes()


def write_nii(path: Path, shape: tuple[int, int, int]) -> None:
    """A volume in a sparse file, with some planes of noise."""
    plane = shape[0] * shape[1] * 2
    with path.open("wb") as stream:
        stream.write(header_of(shape))
        for first in range(0, shape[2], shape[2] // 8):
            stream.seek(352 + first * plane)
            stream.write(noise(8, shape[0], shape[1]))
        stream.truncate(352 + shape[2] * plane)


def write_nii_gz(path: Path, shape: tuple[int, int, int]) -> None:
    """A volume of noise: one compressed block repeated, which is a valid gzip file."""
    with path.open("wb") as stream:
        stream.write(gzip.compress(header_of(shape), 1))
        block = gzip.compress(noise(PLANES_TOGETHER, shape[0], shape[1]), 1)
        for _ in range(shape[2] // PLANES_TOGETHER):
            stream.write(block)


def case(folder: Path, shape: tuple[int, int, int], suffix: str = ".nii") -> Path:
    """A source folder of one subject."""
    (folder / "ann").mkdir(parents=True)
    (write_nii if suffix == ".nii" else write_nii_gz)(folder / "ann" / f"t1{suffix}", shape)
    return folder


@pytest.fixture(scope="module", params=[".nii", ".nii.gz"])
def converted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, dict[str, int]]]:
    """The store of a large volume, and the figures of its conversion."""
    folder = tmp_path_factory.mktemp("large")
    small = case(folder / "small", (64, 64, 64), request.param)
    source = case(folder / "source", SHAPE, request.param)
    figures = measured(CONVERT, small, source, folder / "large.zarr")
    shutil.rmtree(source)
    yield folder / "large.zarr", figures
    shutil.rmtree(folder)


def test_a_conversion_takes_the_memory_of_its_plan_and_a_small_part_of_the_volume(
    converted: tuple[Path, dict[str, int]],
) -> None:
    _, figures = converted
    assert 0 < figures["growth"] <= figures["stated"] < VOLUME_BYTES / 4


def test_reading_patches_takes_memory_only_for_the_patches_in_use(
    converted: tuple[Path, dict[str, int]],
) -> None:
    # Pages of mapped shards count in RSS while they are in the page cache, and the kernel takes them back
    # when it likes; what the process itself holds is anonymous memory.
    store, _ = converted
    figures = measured(READ, store)
    assert figures["growth"] < 2 * 16 * figures["patch"] < VOLUME_BYTES / 32  # 16 are read together


@pytest.mark.parametrize(
    "options", ['{"spacing": 1.3}', '{"spacing": [0.8, 1, 0.7], "interpolation": "cubic", "orient": "LPI"}']
)
def test_resampling_takes_the_memory_of_its_plan_whatever_the_volume(options: str, tmp_path: Path) -> None:
    stated = []
    for planes in (192, 768):
        small = case(tmp_path / f"small{planes}", (64, 64, 64), ".nii.gz")
        source = case(tmp_path / f"source{planes}", (256, 256, planes), ".nii.gz")
        figures = measured(CONVERT, small, source, tmp_path / f"{planes}.zarr", options)
        assert 0 < figures["growth"] <= figures["stated"]
        stated.append(figures["stated"])
    assert stated[1] < stated[0] * 1.05  # a plane more may lie under one of more slabs


def test_reading_resampled_patches_takes_memory_only_for_the_boxes_under_them(
    converted: tuple[Path, dict[str, int]],
) -> None:
    store, _ = converted
    figures = measured(READ, store, "1.3")
    assert (
        figures["growth"] < 6 * 16 * figures["patch"] < VOLUME_BYTES / 5
    )  # each box under one is 2.2 times it


def test_a_prediction_takes_memory_for_its_front_and_not_for_the_volume(tmp_path: Path) -> None:
    import zpatch as zp

    classes, shape = 4, (256, 256, 512)
    stores = []
    for name, size in (("small", (80, 80, 80)), ("large", shape)):
        stores.append(tmp_path / f"{name}.zarr")
        zp.convert(case(tmp_path / name, size), stores[-1])
    figures = measured(PREDICT, *stores, tmp_path / "out.zarr")
    volume_bytes = 4 * classes * int(np.prod(shape))
    assert figures["growth"] < volume_bytes / 4
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
