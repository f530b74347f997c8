"""The advice of a benchmark follows from its figures."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

import zpatch as zp
from zpatch.bench.advice import advice, rate_text
from zpatch.bench.benchmark_plan import BenchmarkPlan, plan_benchmark
from zpatch.bench.benchmark_report import BenchmarkReport, PackingFigures
from zpatch.bench.reading_speed import Speed

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


def lines_of(subject: str, report: BenchmarkReport) -> list[str]:
    return [line.removeprefix(f"{subject}: ") for line in advice(report) if line.startswith(f"{subject}: ")]


def test_a_fast_disk_is_called_fast_enough(plan: BenchmarkPlan) -> None:
    assert lines_of("disk", report_of(plan)) == [
        "fast enough: cold files are read at 90% of the speed of warm files"
    ]


def test_a_slow_disk_matters_in_the_first_epoch_where_memory_holds_the_store(plan: BenchmarkPlan) -> None:
    speeds = (Speed(1, warm=1000, cold=100, disk_bytes_per_s=50 * 2**20),)
    [line] = lines_of("disk", report_of(plan, speeds=speeds))
    assert line.startswith(
        "cold files are read at 10% of the speed of warm files (50.0 MiB/s); all 10.0 GiB fit into"
    )
    smaller = PackingFigures(16, "zstd", 1.0, 2.0, 400.0, 0.6)
    larger, smaller_line = lines_of("disk", report_of(plan, smaller, speeds=speeds, memory_bytes=8 * 2**30))
    assert "10.0 GiB do not fit into 8.0 GiB of memory; copy the store to a faster local disk" in larger
    assert "convert again with --chunk 16 --codec zstd: the files are 0.60 times as large" in smaller_line


def test_a_disk_that_was_not_measured_gets_no_advice(plan: BenchmarkPlan) -> None:
    assert lines_of("disk", report_of(plan, speeds=(Speed(1, warm=1000),))) == []


def test_a_better_chunk_a_better_codec_and_both_together_are_advised_with_their_gain(
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


def test_packings_that_are_hardly_faster_or_much_larger_are_not_advised(plan: BenchmarkPlan) -> None:
    hardly = PackingFigures(32, "lz4hc", 2.0, 3.0, 1100.0, 0.9)
    larger = PackingFigures(16, "lz4", 1.4, 1.9, 1900.0, 2.5)
    report = report_of(plan, hardly, larger)
    assert lines_of("chunk", report) == lines_of("codec", report) == []
    assert lines_of("chunk and codec", report) == [
        "no other chunks or codec are much faster for these patches"
    ]


def test_no_compression_is_advised_with_the_bytes_that_must_stay_in_memory(plan: BenchmarkPlan) -> None:
    [line] = lines_of("codec", report_of(plan, PackingFigures(32, "none", 2.0, 3.0, 2500.0, 2.5)))
    assert line == (
        "convert again with --chunk 32 --codec none: up to 2.5 times as many patches/s, "
        "as long as the 25.0 GiB stay in memory"
    )


def test_larger_groups_are_advised_where_decoding_takes_the_time(plan: BenchmarkPlan) -> None:
    bare = PackingFigures(32, "none", 2.0, 3.0, 5000.0, 2.0)
    sharing = {1: 3.0, 10: 2.0, 32: 0.5}
    line = "10 read together decode 2.0 bytes for each byte delivered, one by one 3.0"
    assert lines_of("patches_per_volume", report_of(plan, bare, decoded_by_group=sharing)) == [
        f"{line}; 32 would decode 0.5: about 2.5 times as many patches/s"
    ]
    assert lines_of("patches_per_volume", report_of(plan, bare)) == [line]
    assert lines_of("patches_per_volume", report_of(plan, decoded_by_group=sharing)) == [line]


def test_workers_are_advised_by_the_rate_of_each(plan: BenchmarkPlan) -> None:
    [line] = lines_of("workers", report_of(plan))
    assert line.startswith("use one for each 750 patches/s that training needs, up to 3,000 with 4; ")
    speeds = (Speed(1, warm=1000), Speed(4, warm=1100))
    [line] = lines_of("workers", report_of(plan, speeds=speeds))
    assert line.startswith("4 read hardly more than the 1,000 patches/s of one")
    [line] = lines_of("workers", report_of(plan, speeds=speeds[:1]))
    assert line == "each reads up to 1,000 patches/s; -j N measures N together"


def test_rates_between_measured_numbers_of_processes_are_interpolated(plan: BenchmarkPlan) -> None:
    report = report_of(plan)
    assert [report.warm_with(n) for n in (1, 2, 4)] == [1000, pytest.approx(1000 + 2000 / 3), 3000]


def test_rates_have_two_digits_or_all_integer_digits() -> None:
    assert [rate_text(rate) for rate in (0.123, 2, 99.7, 12345)] == ["0.12", "2", "100", "12,345"]
