"""The benchmark of a store: what it counts is exact, what it reads is what a sampler reads, and what it
advises follows from its figures. How fast anything is, no test says."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

import zpatch as zp
from zpatch.bench import benchmark, reading_speed
from zpatch.bench.advice import advice, rate_text
from zpatch.bench.benchmark import (
    CHUNKS,
    GROUP_PATCHES,
    BenchmarkPlan,
    BenchmarkReport,
    PackingFigures,
    plan_benchmark,
    run_benchmark,
)
from zpatch.bench.reading_speed import ReadingTask, Speed
from zpatch.bench.trial_stores import (
    STORED,
    Packing,
    PatchGroup,
    array_of,
    can_be_tried,
    decoded_bytes,
    decoded_per_delivered,
    distinct_sides,
    parts_of_patch,
    stand_ins,
    stored_options,
    times_as_fast,
)
from zpatch.chunks.codec import CODECS
from zpatch.chunks.mapped_shards import close_shards
from zpatch.errors import DamageError, OptionError, PatchSizeError, UnknownNameError, WorkerError
from zpatch.geometry.boxes import PatchLocation
from zpatch.images.cohort import Cohort
from zpatch.images.group_read import read_requests
from zpatch.images.image import Image
from zpatch.images.voxel_source import Request, new_voxels
from zpatch.loading import patch_queue
from zpatch.runtime.byte_sizes import format_bytes
from zpatch.store.store_writer import StoreWriter

QUICK: dict[str, Any] = {"seconds": 0.01, "jobs": 1}

MakeStore = Callable[..., Path]


@pytest.fixture
def make_store(tmp_path: Path) -> MakeStore:
    """A store of given volumes (I, J, K), each a subject with the one image ``t1``."""

    def make(*volumes: np.ndarray[Any, Any], spacing: float = 1, **options: Any) -> Path:
        for number, voxels in enumerate(volumes):
            folder = tmp_path / "scans" / f"sub-{number}"
            folder.mkdir(parents=True)
            nib.Nifti1Image(voxels, np.diag([1, 1, spacing, 1])).to_filename(folder / "t1.nii")
        zp.convert(tmp_path / "scans", tmp_path / "made.zarr", **options)
        return tmp_path / "made.zarr"

    return make


@pytest.fixture
def store_copy(cohort_store: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cohort_store, tmp_path / "copy.zarr"))


def periodic(*shape: int) -> np.ndarray[Any, Any]:
    """A volume of which all chunks of 16 voxels are alike, and each of their voxels differs."""
    place = np.indices(shape) % 16
    voxels: np.ndarray[Any, Any] = (place[0] + 16 * place[1] + 256 * place[2]).astype(np.int16)
    return voxels


def group_of(store: Path, *boxes: tuple[tuple[int, int, int], tuple[int, int, int]]) -> PatchGroup:
    return PatchGroup(Cohort(store)[0], tuple(PatchLocation(index, size) for index, size in boxes))


# What patches cost


def chunks_by_hand(group: PatchGroup, image: Image, chunks: tuple[int, ...]) -> set[tuple[int, ...]]:
    """The chunk of each voxel of each patch, one voxel at a time."""
    touched = set()
    for location in group.locations:
        voxels = np.stack(np.meshgrid(*(np.r_[s] for s in location.to_slices()), indexing="ij"), axis=-1)
        touched |= set(map(tuple, (voxels.reshape(-1, 3)[:, ::-1] // chunks[1:]).tolist()))
    return touched


@pytest.mark.parametrize("packing", [STORED, Packing(8), Packing(16), Packing(32)])
def test_decoded_bytes_are_those_of_each_chunk_that_holds_a_wanted_voxel_once(
    cohort: zp.Cohort, packing: Packing
) -> None:
    for number, subject in enumerate(cohort):
        group = PatchGroup.drawn(subject, (20, 9, 13), 4, np.random.default_rng(number))
        expected = 0
        for image in group.images:
            chunks = packing.chunks_of(image)
            count = len(chunks_by_hand(group, image, chunks)) * image.num_channels
            expected += count * math.prod(chunks) * image.source.dtype.itemsize
        assert decoded_bytes(group, packing) == expected


def test_a_patch_that_is_one_chunk_decodes_what_it_delivers_and_one_across_eight_chunks_eight_times_that(
    make_store: MakeStore,
) -> None:
    store = make_store(periodic(48, 48, 48), chunk=16)
    aligned, across = ((16, 16, 16), (16, 16, 16)), ((8, 8, 8), (16, 16, 16))
    assert decoded_per_delivered([group_of(store, aligned)]) == 1
    assert decoded_per_delivered([group_of(store, across)]) == 8
    assert decoded_per_delivered([group_of(store, aligned, aligned)]) == 0.5
    assert decoded_per_delivered(group_of(store, aligned, aligned).singly()) == 1
    assert decoded_per_delivered([group_of(store, aligned)], Packing(32)) == 8


def test_a_group_knows_the_files_that_reading_it_opens(cohort: zp.Cohort, cohort_store: Path) -> None:
    group = PatchGroup.drawn(cohort[0], (16, 16, 16), 2, np.random.default_rng(0))
    files = group.shard_files()
    assert {file.relative_to(cohort_store).parts[:2] for file in files} == {
        ("sub-01", "t1"),
        ("sub-01", "seg"),
    }
    assert all(file.is_file() for file in files)


def test_random_patches_lie_inside_and_reach_both_ends(cohort: zp.Cohort) -> None:
    subject = cohort[0]
    i, j, k = subject.spatial_shape
    group = PatchGroup.drawn(subject, (i - 1, j, k), 32, np.random.default_rng(0))
    assert {location.index for location in group.locations} == {(0, 0, 0), (1, 0, 0)}


@pytest.mark.parametrize("chunk", [8, 16, 32])
@pytest.mark.parametrize("spacing", [1, 5])
def test_the_chunks_of_a_packing_are_those_that_convert_makes(
    make_store: MakeStore, chunk: int, spacing: float
) -> None:
    cohort = Cohort(make_store(periodic(70, 40, 36), chunk=chunk, spacing=spacing, codec="zstd"))
    images = [cohort[0].images["t1"]]
    assert Packing(chunk).chunks_of(images[0]) == array_of(images[0]).chunks
    assert stored_options(images, (8, 16, 32)) == Packing(chunk, "zstd")
    assert stored_options(images, (24,)) == Packing(None, "zstd")


def test_sides_that_make_no_difference_are_told_once(make_store: MakeStore) -> None:
    images = [Cohort(make_store(periodic(20, 20, 20)))[0].images["t1"]]
    assert distinct_sides(images, (32, 16, 64)) == [32, 16]
    assert stored_options(images, (32, 16, 64)).chunk == 32


# Stand-ins


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("chunk", [16, 32])
def test_stand_ins_are_read_as_a_store_packed_like_that(
    make_store: MakeStore, chunk: int, codec: str
) -> None:
    store = make_store(periodic(96, 64, 64), chunk=16)
    group = group_of(
        store, ((5, 0, 17), (50, 40, 47)), ((0, 0, 0), (16, 16, 16)), ((46, 24, 17), (50, 40, 47))
    )
    image = group.images[0]
    packing = Packing(chunk, codec)
    with stand_ins([group], packing, [STORED, packing, Packing(64)]) as made:
        [(_, [source])] = made.groups
        assert source.array.chunks == packing.chunks_of(image)
        outs = [new_voxels((1, *location.size), image.dtype) for location in group.locations]
        read_requests([Request(source, group.locations, outs)])
        assert made.read_s() > 0
        folder = source.array.path
    for out, location in zip(outs, group.locations, strict=True):
        np.testing.assert_array_equal(out, image.read(location))
    assert not folder.exists()


def test_stand_ins_tell_how_large_the_files_would_be(make_store: MakeStore, rng: np.random.Generator) -> None:
    store = make_store(rng.integers(0, 40, (64, 64, 64), dtype=np.int16))
    group = group_of(store, ((0, 0, 0), (64, 64, 64)))
    sizes = {}
    for codec in CODECS:
        with stand_ins([group], Packing(32, codec), [Packing(32)]) as made:
            sizes[codec] = made.stored_bytes
    voxel_bytes = 2 * 64**3
    assert voxel_bytes < sizes["none"] < voxel_bytes * 1.01
    assert sizes["zstd"] < sizes["lz4"] < sizes["none"]
    files = array_of(group.images[0]).path.rglob("c/*/*/*")
    assert sizes["lz4"] == pytest.approx(sum(file.stat().st_size for file in files), rel=0.01)


def test_what_is_packed_alike_is_about_as_fast_and_each_is_read_in_turns(make_store: MakeStore) -> None:
    group = group_of(make_store(periodic(64, 64, 64)), ((0, 0, 0), (64, 64, 64)))
    with stand_ins([group], STORED, [STORED]) as made, stand_ins([group], STORED, [STORED]) as other:
        assert times_as_fast(made, other, 0.01) > 0


def test_a_volume_smaller_than_any_chunk_has_stand_ins_too(make_store: MakeStore) -> None:
    group = group_of(make_store(periodic(5, 1, 3)), ((0, 0, 0), (5, 1, 3)))
    with stand_ins([group], Packing(64, "zstd"), [STORED, Packing(64)]) as made:
        assert made.read_s() > 0


def test_what_would_take_much_memory_to_plan_is_not_tried(make_store: MakeStore) -> None:
    group = group_of(make_store(periodic(64, 64, 64)), *[((0, 0, 0), (64, 64, 64))] * 3)
    assert can_be_tried([group], Packing(16))
    assert not can_be_tried([group], Packing(1))
    assert parts_of_patch((64, 64, 64), group.images[0]) == 27


# The plan


def test_a_plan_reads_all_images_in_patches_of_96_or_what_fits_into_all_volumes(
    make_store: MakeStore,
) -> None:
    plan = plan_benchmark(Cohort(make_store(periodic(99, 98, 20), periodic(97, 50, 40))), jobs=3)
    assert plan.patch_size == (96, 50, 20)
    assert plan.group == 10
    assert set(plan.jobs) >= {1, 3}
    assert plan.group_bytes == 10 * 96 * 50 * 20 * 2
    assert plan.packings[0] is STORED
    assert len(plan.packings) == len(CHUNKS) * len(CODECS)
    told = str(plan)
    assert told.startswith("2 subjects: patches of 96x50x20, 10 together, of t1 (int16; lz4; 32x32x")
    assert told.endswith(f"peak {format_bytes(plan.peak_bytes)} above start-up")


def test_images_can_be_chosen_and_their_files_are_counted(cohort: zp.Cohort) -> None:
    plan = plan_benchmark(cohort, images=["seg"], **QUICK)
    assert {name for subject in plan.subjects for name in subject.images} == {"seg"}
    records = cohort.store.records
    assert plan.stored_bytes == sum(r.stored_bytes for (_, image), r in records.items() if image == "seg")
    everything = plan_benchmark(cohort, **QUICK)
    assert everything.stored_bytes == sum(r.stored_bytes for r in records.values())
    part = plan_benchmark(cohort.matching(["sub-02"]), **QUICK)
    assert part.stored_bytes == sum(r.stored_bytes for (name, _), r in records.items() if name == "sub-02")


def test_groups_are_as_large_as_those_of_a_queue_at_most(cohort: zp.Cohort) -> None:
    assert plan_benchmark(cohort, patches_per_volume=1000, **QUICK).group == GROUP_PATCHES
    assert GROUP_PATCHES == patch_queue.GROUP_PATCHES


def test_a_plan_is_no_larger_for_more_subjects(cohort: zp.Cohort, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "MOST_SUBJECTS", 2)
    plan = plan_benchmark(cohort, patch_size=16, **QUICK)
    assert len(plan.subjects) == 2
    assert plan.peak_bytes <= plan_benchmark(cohort[:1], patch_size=16, **QUICK).peak_bytes * 2


def test_memory_grows_with_processes_and_patches(cohort: zp.Cohort) -> None:
    def peak(**options: Any) -> int:
        return plan_benchmark(cohort, **{"patch_size": 16, "jobs": 1, **options}).peak_bytes

    assert peak() < peak(jobs=2) < peak(jobs=7)
    assert peak() < peak(patches_per_volume=30)
    assert peak() < peak(patch_size=30)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"patches_per_volume": 0}, "patches_per_volume must be at least 1, not 0"),
        ({"jobs": 0}, "jobs must be at least 1, not 0"),
        ({"seconds": 0}, "seconds must be above 0, not 0"),
        ({"seconds": float("nan")}, "seconds must be above 0, not nan"),
        ({"patch_size": 0}, "patch_size must be at least 1 on every axis, not 0"),
        ({"patch_size": (8, 8)}, "patch_size must be one integer or three, not (8, 8)"),
    ],
)
def test_options_that_mean_nothing_are_refused(cohort: zp.Cohort, options: Any, text: str) -> None:
    with pytest.raises((OptionError, PatchSizeError)) as error:
        plan_benchmark(cohort, **options)
    assert text in str(error.value)


def test_patches_that_do_not_fit_and_unknown_images_are_refused(cohort: zp.Cohort) -> None:
    with pytest.raises(PatchSizeError, match=r"patch of 500 voxels does not fit axis I of 'sub-0\d'"):
        plan_benchmark(cohort, patch_size=500)
    with pytest.raises(UnknownNameError, match=r"no image 't2' in subject 'sub-0\d'; did you mean 't1'"):
        plan_benchmark(cohort, images=["t2"])


def test_a_store_without_images_is_refused(tmp_path: Path) -> None:
    with StoreWriter.create(tmp_path / "empty.zarr", {}):
        pass
    with pytest.raises(OptionError, match=r"empty\.zarr: it holds no images, so there is nothing to read"):
        plan_benchmark(Cohort(tmp_path / "empty.zarr"))


# Measuring


def test_a_benchmark_measures_cold_and_warm_and_tries_what_convert_could_make(cohort: zp.Cohort) -> None:
    plan = plan_benchmark(cohort, patch_size=24, seconds=0.02, jobs=2)
    told: list[int] = []
    report = run_benchmark(plan, told.append)
    assert [speed.processes for speed in report.speeds] == list(plan.jobs)
    for speed in report.speeds:
        assert speed.warm > 0
        assert speed.cold is None or speed.cold > 0
        assert 0 <= speed.kept <= 1
    assert report.warm_with(1) == report.speeds[0].warm
    assert sum(told) == pytest.approx(plan.about_s * 1000, abs=len(told))
    now, *others = report.packings
    assert (now.chunk, now.codec, now.size) == (16, "lz4", 1)
    assert now.patches_per_s == report.speeds[0].warm
    assert {(p.chunk, p.codec) for p in others} == {
        (chunk, codec) for chunk in CHUNKS for codec in CODECS
    } - {(16, "lz4")}
    assert all(p.patches_per_s and p.size for p in others)
    assert now.patch_by_patch == report.decoded_by_group[1] or now.patch_by_patch > now.decoded_per_delivered
    assert list(report.decoded_by_group) == [1, 10, 32]
    assert report.decoded_by_group[10] == now.decoded_per_delivered
    assert report.patch_bytes > 0
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["patches_together"] == 10


def test_nothing_is_written_into_the_store(store_copy: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in store_copy.rglob("*")}
    run_benchmark(plan_benchmark(Cohort(store_copy), patch_size=24, **QUICK))
    assert {file: file.stat().st_mtime_ns for file in store_copy.rglob("*")} == before


def test_predictions_are_measured_and_nothing_else_is_tried_as_convert_does_not_make_them(
    cohort: zp.Cohort, tmp_path: Path
) -> None:
    out = zp.predict(lambda batch: batch, cohort[:1], tmp_path / "out.zarr", image="t1", patch_size=24)
    plan = plan_benchmark(out, **QUICK)
    assert plan.packings == (STORED,)
    report = run_benchmark(plan)
    [now] = report.packings
    assert (now.chunk, now.codec, now.patches_per_s, now.size) == (32, "lz4", None, None)
    assert not [line for line in advice(report) if "convert again" in line]


def test_fewer_subjects_than_processes_are_not_measured_cold(cohort: zp.Cohort) -> None:
    one, *_, two = run_benchmark(plan_benchmark(cohort[:1], patch_size=24, seconds=0.01, jobs=2)).speeds
    assert one.cold is not None or not hasattr(os, "posix_fadvise")
    assert (two.processes, two.cold, two.disk_bytes_per_s, two.kept) == (2, None, None, 0)
    assert two.warm > 0


def test_a_system_that_cannot_drop_files_is_measured_warm(
    cohort: zp.Cohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    [speed] = run_benchmark(plan_benchmark(cohort, patch_size=24, **QUICK)).speeds
    assert speed.cold is None
    assert speed.warm > 0


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="needs posix_fadvise")
def test_files_are_dropped_and_what_the_system_keeps_is_counted(tmp_path: Path) -> None:
    file = tmp_path / "shard"
    page = os.sysconf("SC_PAGE_SIZE")
    file.write_bytes(b"z" * (10 * page + 1))
    pages, kept = reading_speed._drop(file)
    assert pages == 11
    assert 0 <= kept <= 11


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="needs posix_fadvise")
def test_what_is_no_file_is_left_to_the_reader_to_complain_of(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    os.mkfifo(tmp_path / "pipe")
    for name in ("nowhere", "empty", "link", "pipe", "."):
        assert reading_speed._drop(tmp_path / name) == (0, 0)


def task_of(cohort: zp.Cohort, meeting: Path, number: int = 0, processes: int = 1) -> ReadingTask:
    return ReadingTask(
        store=cohort.store.path,
        subjects=tuple(cohort),
        patch_size=(8, 8, 8),
        group=3,
        seconds=0.01,
        cold=False,
        number=number,
        processes=processes,
        meeting=meeting,
    )


def test_a_task_travels_to_a_spawned_process(cohort: zp.Cohort, tmp_path: Path) -> None:
    task = pickle.loads(pickle.dumps(task_of(cohort, tmp_path)))
    assert reading_speed._measured(task, lambda amount: None).warm > 0
    close_shards(cohort.store.path)


def test_processes_read_other_patches_than_each_other_and_each_subject_in_turn(
    cohort: zp.Cohort, tmp_path: Path
) -> None:
    streams = [task_of(cohort, tmp_path, number).groups() for number in range(2)]
    groups = [[next(stream) for _ in range(8)] for stream in streams]
    assert [group.subject.name for group in groups[0]] == cohort.names * 2
    drawn = [group.locations for some in groups for group in some]
    assert len(set(drawn)) == 16
    assert all(len(locations) == 3 for locations in drawn)


def test_processes_start_their_clocks_together_and_none_comes_twice(
    cohort: zp.Cohort, tmp_path: Path
) -> None:
    task = task_of(cohort, tmp_path, number=0, processes=2)
    (tmp_path / "warm-1").touch()
    task.meet("warm")
    with pytest.raises(WorkerError, match="was killed, perhaps for want of memory; try fewer --jobs"):
        task.meet("warm")


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("what", ["flipped", "missing"])
def test_damage_is_named_whichever_process_meets_it(store_copy: Path, jobs: int, what: str) -> None:
    shard = store_copy / "sub-03" / "seg" / "0" / "c" / "0" / "0" / "0"
    if what == "missing":
        shard.unlink()
    else:
        data = np.fromfile(shard, np.uint8)
        data[: len(data) // 2] ^= 1
        data.tofile(shard)
    plan = plan_benchmark(Cohort(store_copy).matching(["sub-03"]), patch_size=24, seconds=0.01, jobs=jobs)
    plan = dataclasses.replace(plan, jobs=(jobs,))
    with pytest.raises(DamageError, match="damaged: image 'seg' of subject 'sub-03'"):
        run_benchmark(plan)


def test_a_process_that_is_killed_is_an_error_that_says_so(
    cohort: zp.Cohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    me, read = os.getpid(), PatchGroup.read

    def killed(group: PatchGroup) -> None:
        read(group)
        if os.getpid() != me:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(PatchGroup, "read", killed)  # forked processes have it too
    plan = dataclasses.replace(plan_benchmark(cohort, patch_size=24, seconds=0.01), jobs=(2,))
    with pytest.raises(WorkerError, match=r"was killed .* try fewer --jobs"):
        run_benchmark(plan)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_a_benchmark_takes_no_more_memory_than_its_plan_states(
    make_store: MakeStore, rng: np.random.Generator
) -> None:
    store = make_store(rng.integers(0, 500, (160, 160, 160), dtype=np.int16))
    program = """
import json, sys
from pathlib import Path
import zpatch as zp
from zpatch.bench.benchmark import plan_benchmark, run_benchmark

def high_water():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

plan = plan_benchmark(zp.Cohort(sys.argv[1]), patch_size=128, seconds=0.1, jobs=1)
before = high_water()
run_benchmark(plan)
print(json.dumps({"growth": high_water() - before, "stated": plan.peak_bytes}))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program, str(store)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    figures = json.loads(ran.stdout)
    assert 10 * 2 * 128**3 < figures["growth"] <= figures["stated"]


# The advice


NOW = PackingFigures(32, "lz4", 2.0, 3.0, 1000.0, 1.0)
FAST_DISK = (Speed(1, warm=1000, cold=900), Speed(4, warm=3000, cold=2500))


@pytest.fixture
def plan(cohort: zp.Cohort) -> BenchmarkPlan:
    return dataclasses.replace(plan_benchmark(cohort, patch_size=24, jobs=4), stored_bytes=10 * 2**30)


def report_of(plan: BenchmarkPlan, *others: PackingFigures, **changes: Any) -> BenchmarkReport:
    figures = {
        "plan": plan,
        "patch_bytes": 1000,
        "speeds": FAST_DISK,
        "packings": (NOW, *others),
        "decoded_by_group": {1: 3.0, 10: 2.0, 32: 1.9},
        "memory_bytes": 64 * 2**30,
    }
    return BenchmarkReport(**{**figures, **changes})


def lines_of(what: str, report: BenchmarkReport) -> list[str]:
    return [line.removeprefix(f"{what}: ") for line in advice(report) if line.startswith(f"{what}: ")]


def test_a_disk_that_keeps_up_is_said_to(plan: BenchmarkPlan) -> None:
    assert lines_of("disk", report_of(plan)) == ["it keeps up: cold files are read 90% as fast as warm ones"]


def test_a_slow_disk_matters_in_the_first_epoch_where_memory_holds_the_store(plan: BenchmarkPlan) -> None:
    speeds = (Speed(1, warm=1000, cold=100, disk_bytes_per_s=50 * 2**20),)
    [line] = lines_of("disk", report_of(plan, speeds=speeds))
    assert line.startswith("cold files are read 10% as fast as warm ones (50.0 MiB/s); all 10.0 GiB fit into")
    smaller = PackingFigures(16, "zstd", 1.0, 2.0, 400.0, 0.6)
    larger, smaller_line = lines_of("disk", report_of(plan, smaller, speeds=speeds, memory_bytes=8 * 2**30))
    assert "10.0 GiB do not stay in 8.0 GiB of memory; copy the store to a faster local disk" in larger
    assert "convert again with --chunk 16 --codec zstd: files 0.60 times as large" in smaller_line


def test_nothing_is_said_of_a_disk_that_was_not_measured(plan: BenchmarkPlan) -> None:
    assert lines_of("disk", report_of(plan, speeds=(Speed(1, warm=1000),))) == []


def test_a_better_chunk_a_better_codec_and_both_together_are_told_with_their_gain(
    plan: BenchmarkPlan,
) -> None:
    chunk = PackingFigures(16, "lz4", 1.4, 1.9, 1300.0, 1.1)
    codec = PackingFigures(32, "lz4hc", 2.0, 3.0, 1500.0, 0.9)
    both = PackingFigures(16, "lz4hc", 1.4, 1.9, 2000.0, 0.95)
    report = report_of(plan, chunk, codec, both)
    assert lines_of("chunk", report) == [
        "convert again with --chunk 16 --codec lz4: about 1.3 times as many patches/s, "
        "files 1.10 times as large (1.4 bytes decoded for each byte delivered instead of 2.0)"
    ]
    assert lines_of("codec", report) == [
        "convert again with --chunk 32 --codec lz4hc: about 1.5 times as many patches/s, "
        "files 0.90 times as large"
    ]
    assert lines_of("chunk and codec", report) == [
        "convert again with --chunk 16 --codec lz4hc: about 2.0 times as many patches/s, "
        "files 0.95 times as large"
    ]


def test_what_is_hardly_faster_or_much_larger_is_not_advised(plan: BenchmarkPlan) -> None:
    hardly = PackingFigures(32, "lz4hc", 2.0, 3.0, 1100.0, 0.9)
    larger = PackingFigures(16, "lz4", 1.4, 1.9, 1900.0, 2.5)
    report = report_of(plan, hardly, larger)
    assert lines_of("chunk", report) == lines_of("codec", report) == []
    assert lines_of("chunk and codec", report) == [
        "no other compression that was tried is much faster for these patches"
    ]


def test_no_compression_is_told_with_what_must_stay_in_memory(plan: BenchmarkPlan) -> None:
    [line] = lines_of("codec", report_of(plan, PackingFigures(32, "none", 2.0, 3.0, 2500.0, 2.5)))
    assert line == (
        "convert again with --chunk 32 --codec none: up to 2.5 times as many patches/s, "
        "as long as its 25.0 GiB stay in memory"
    )


def test_larger_groups_are_advised_where_decoding_takes_the_time(plan: BenchmarkPlan) -> None:
    bare = PackingFigures(32, "none", 2.0, 3.0, 5000.0, 2.0)
    sharing = {1: 3.0, 10: 2.0, 32: 0.5}
    told = "10 read together decode 2.0 bytes for each byte delivered, one by one 3.0"
    assert lines_of("patches_per_volume", report_of(plan, bare, decoded_by_group=sharing)) == [
        f"{told}; 32 would decode 0.5: about 2.5 times as many patches/s"
    ]
    assert lines_of("patches_per_volume", report_of(plan, bare)) == [told]
    assert lines_of("patches_per_volume", report_of(plan, decoded_by_group=sharing)) == [told]


def test_workers_are_counted_by_what_each_reads_of_all(plan: BenchmarkPlan) -> None:
    [line] = lines_of("workers", report_of(plan))
    assert line.startswith("one for each 750 patches/s that training takes, up to 3,000 with 4; ")
    speeds = (Speed(1, warm=1000), Speed(4, warm=1100))
    [line] = lines_of("workers", report_of(plan, speeds=speeds))
    assert line.startswith("4 read hardly more than the 1,000 patches/s of one")
    [line] = lines_of("workers", report_of(plan, speeds=speeds[:1]))
    assert line == "each reads up to 1,000 patches/s; -j N measures N together"


def test_between_the_measured_numbers_of_processes_the_rate_is_read_off(plan: BenchmarkPlan) -> None:
    report = report_of(plan)
    assert [report.warm_with(n) for n in (1, 2, 4)] == [1000, pytest.approx(1000 + 2000 / 3), 3000]


def test_rates_are_told_with_the_figures_that_matter() -> None:
    assert [rate_text(rate) for rate in (0.123, 2, 99.7, 12345)] == ["0.12", "2", "100", "12,345"]
