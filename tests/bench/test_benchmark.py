"""A benchmark of a store. No test asserts how fast anything is."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path

import forked
import numpy as np
import pytest
from bench_stores import QUICK, MakeStore

import zpatch as zp
from zpatch.bench.advice import advice
from zpatch.bench.benchmark import run_benchmark
from zpatch.bench.benchmark_plan import CHUNKS, plan_benchmark
from zpatch.bench.packing import (
    STORED,
)
from zpatch.bench.patch_group import PatchGroup
from zpatch.chunks.codec import CODECS
from zpatch.errors import DamageError, WorkerError
from zpatch.images.cohort import Cohort


def test_a_benchmark_measures_cold_and_warm_and_tries_all_packings_of_convert(cohort: zp.Cohort) -> None:
    plan = plan_benchmark(cohort, patch_size=24, seconds=0.02, jobs=2)
    steps: list[int] = []
    report = run_benchmark(plan, steps.append)
    assert [speed.processes for speed in report.speeds] == list(plan.jobs)
    for speed in report.speeds:
        assert speed.warm > 0
        assert speed.cold is None or speed.cold > 0
        assert 0 <= speed.kept <= 1
    assert report.warm_with(1) == report.speeds[0].warm
    assert sum(steps) == pytest.approx(plan.about_s * 1000, abs=len(steps))
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


def test_predictions_are_measured_without_other_packings_as_convert_cannot_make_them(
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


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_damage_is_named_whichever_process_meets_it(store_copy: Path, jobs: int, damage: str) -> None:
    shard = store_copy / "sub-03" / "seg" / "0" / "c" / "0" / "0" / "0"
    if damage == "missing":
        shard.unlink()
    else:
        data = np.fromfile(shard, np.uint8)
        data[: len(data) // 2] ^= 1
        data.tofile(shard)
    plan = plan_benchmark(Cohort(store_copy).matching(["sub-03"]), patch_size=24, seconds=0.01, jobs=jobs)
    plan = dataclasses.replace(plan, jobs=(jobs,))
    with pytest.raises(DamageError, match="damaged: image 'seg' of subject 'sub-03'"):
        run_benchmark(plan)


def test_a_killed_process_is_an_error_that_names_the_cause(
    cohort: zp.Cohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    me, read = os.getpid(), PatchGroup.read

    def killed(group: PatchGroup) -> None:
        read(group)
        if os.getpid() != me:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(PatchGroup, "read", killed)  # also in forked processes
    plan = dataclasses.replace(plan_benchmark(cohort, patch_size=24, seconds=0.01), jobs=(2,))
    with pytest.raises(WorkerError, match=r"was killed .* try fewer jobs="):
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
from zpatch.bench.benchmark import run_benchmark
from zpatch.bench.benchmark_plan import plan_benchmark

def high_water():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

plan = plan_benchmark(zp.Cohort(sys.argv[1]), patch_size=128, seconds=0.1, jobs=1)
before = high_water()
run_benchmark(plan)
print(json.dumps({"growth": high_water() - before, "stated": plan.peak_bytes}))
"""
    ran = forked.run(program, store)
    assert ran.returncode == 0, ran.stderr
    figures = json.loads(ran.stdout)
    assert 10 * 2 * 128**3 < figures["growth"] <= figures["stated"]
