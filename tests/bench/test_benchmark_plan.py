"""The plan of a benchmark: which patches are read, and the memory that this takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from bench_stores import QUICK, MakeStore, periodic

import zpatch as zp
from zpatch.bench import benchmark_plan
from zpatch.bench.benchmark_plan import CHUNKS, GROUP_PATCHES, plan_benchmark
from zpatch.bench.packing import (
    STORED,
)
from zpatch.chunks.codec import CODECS
from zpatch.errors import OptionError, PatchSizeError, UnknownNameError
from zpatch.images.cohort import Cohort
from zpatch.loading import patch_queue
from zpatch.runtime.byte_sizes import format_bytes
from zpatch.store.store_writer import StoreWriter


def test_a_plan_reads_all_images_in_patches_of_96_voxels_or_as_many_as_fit(
    make_store: MakeStore,
) -> None:
    plan = plan_benchmark(Cohort(make_store(periodic(99, 98, 20), periodic(97, 50, 40))), jobs=3)
    assert plan.patch_size == (96, 50, 20)
    assert plan.group == 10
    assert set(plan.jobs) >= {1, 3}
    assert plan.group_bytes == 10 * 96 * 50 * 20 * 2
    assert plan.packings[0] is STORED
    assert len(plan.packings) == len(CHUNKS) * len(CODECS)
    text = str(plan)
    assert text.startswith("2 subjects: patches of 96x50x20, 10 together, of t1 (int16; lz4; 32x32x")
    assert text.endswith(f"peak {format_bytes(plan.peak_bytes)} above start-up")


def test_only_files_of_the_chosen_images_and_subjects_count(cohort: zp.Cohort) -> None:
    plan = plan_benchmark(cohort, images=["seg"], **QUICK)
    assert {name for subject in plan.subjects for name in subject.images} == {"seg"}
    records = cohort.store.records
    assert plan.stored_bytes == sum(r.stored_bytes for (_, image), r in records.items() if image == "seg")
    everything = plan_benchmark(cohort, **QUICK)
    assert everything.stored_bytes == sum(r.stored_bytes for r in records.values())
    part = plan_benchmark(cohort.matching(["sub-02"]), **QUICK)
    assert part.stored_bytes == sum(r.stored_bytes for (name, _), r in records.items() if name == "sub-02")


def test_groups_are_no_larger_than_the_groups_of_a_queue(cohort: zp.Cohort) -> None:
    assert plan_benchmark(cohort, patches_per_volume=1000, **QUICK).group == GROUP_PATCHES
    assert GROUP_PATCHES == patch_queue.GROUP_PATCHES


def test_a_plan_is_no_larger_for_more_subjects(cohort: zp.Cohort, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_plan, "MOST_SUBJECTS", 2)
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
        ({"patch_size": (8, 8, 8, 8)}, "patch_size must be one integer or three, not (8, 8, 8, 8)"),
    ],
)
def test_options_out_of_range_are_refused(cohort: zp.Cohort, options: Any, text: str) -> None:
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
