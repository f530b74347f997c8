"""Advice from the figures of a benchmark, one line for each change that would be worth its effort."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from zpatch.bench.benchmark_plan import GROUP_PATCHES
from zpatch.bench.benchmark_report import BenchmarkReport, PackingFigures
from zpatch.runtime.byte_sizes import format_bytes

WORTH_IT = 1.2  # times as fast; smaller gains are hardly above the noise
MOST_LARGER = 2.0  # times the size of the files
COLD_SHARE = 0.5  # of the warm speed, for a disk that is fast enough
CACHED_SHARE = 0.7  # of the memory


def advice(report: BenchmarkReport) -> list[str]:
    """The lines, each ``subject: finding; action``."""
    return [*_disk(report), *_packing(report), *_groups(report), *_workers(report)]


def rate_text(patches_per_s: float) -> str:
    """Patches per second as text.

    >>> rate_text(1234.5), rate_text(3.14159)
    ('1,234', '3.1')
    """
    return f"{patches_per_s:,.0f}" if patches_per_s >= 10 else f"{patches_per_s:.2g}"


def _disk(report: BenchmarkReport) -> Iterator[str]:
    speed = report.speeds[0]
    if speed.cold is None:
        return
    share = speed.cold / speed.warm
    if share >= COLD_SHARE:
        yield f"disk: fast enough: cold files are read at {min(share, 1):.0%} of the speed of warm files"
        return
    rate = f" ({format_bytes(speed.disk_bytes_per_s)}/s)" if speed.disk_bytes_per_s else ""
    stored, memory = report.plan.stored_bytes, report.memory_bytes
    slow = f"disk: cold files are read at {share:.0%} of the speed of warm files{rate}"
    if stored < CACHED_SHARE * memory:
        yield (
            f"{slow}; all {format_bytes(stored)} fit into {format_bytes(memory)} of memory, so this slows "
            f"down the first epoch only, unless other programs need the memory"
        )
        return
    yield (
        f"{slow}, and {format_bytes(stored)} do not fit into {format_bytes(memory)} of memory; "
        f"copy the store to a faster local disk, or use a machine with more memory"
    )
    smaller = [p for p in report.packings[1:] if p.size is not None and p.size <= 1 / WORTH_IT]
    if smaller:
        least = min(smaller, key=_size)
        yield f"disk: convert again with {_options(least)}: the files are {_size(least):.2f} times as large"


def _packing(report: BenchmarkReport) -> Iterator[str]:
    now, *others = report.packings
    tried = [p for p in others if p.patches_per_s is not None]
    if now.patches_per_s is None or not tried:
        return
    fair = [p for p in tried if p.codec != "none" and _size(p) <= MOST_LARGER]
    chunk = _fastest(p for p in fair if p.codec == now.codec)
    codec = _fastest(p for p in fair if p.chunk == now.chunk)
    both = _fastest(fair)
    gains = [_gain(now, packing) for packing in (chunk, codec, both)]
    if chunk and gains[0] >= WORTH_IT:
        decoded = f"{chunk.decoded_per_delivered:.1f} bytes decoded for each byte delivered"
        yield f"chunk: {_worth(now, chunk)} ({decoded} instead of {now.decoded_per_delivered:.1f})"
    if codec and gains[1] >= WORTH_IT:
        yield f"codec: {_worth(now, codec)}"
    if both and gains[2] >= WORTH_IT * max(gains[0], gains[1], 1):
        yield f"chunk and codec: {_worth(now, both)}"
    if max(gains) < WORTH_IT:
        yield "chunk and codec: no other chunks or codec are much faster for these patches"
    bare = _fastest(p for p in tried if p.codec == "none" and p.chunk == now.chunk)
    if bare and _gain(now, bare) >= WORTH_IT * max(1, *gains):
        yield (
            f"codec: convert again with {_options(bare)}: up to {_gain(now, bare):.1f} times as many "
            f"patches/s, as long as the {format_bytes(report.plan.stored_bytes * _size(bare))} stay in memory"
        )


def _fastest(packings: Iterator[PackingFigures] | Sequence[PackingFigures]) -> PackingFigures | None:
    return max(packings, key=lambda p: p.patches_per_s or 0, default=None)


def _size(packing: PackingFigures) -> float:
    return packing.size or 1.0


def _gain(now: PackingFigures, other: PackingFigures | None) -> float:
    if other is None or not now.patches_per_s or not other.patches_per_s:
        return 0.0
    return other.patches_per_s / now.patches_per_s


def _worth(now: PackingFigures, other: PackingFigures) -> str:
    return (
        f"convert again with {_options(other)}: about {_gain(now, other):.1f} times as many patches/s, files "
        f"{_size(other):.2f} times as large"
    )


def _options(packing: PackingFigures) -> str:
    options = {"--chunk": packing.chunk, "--codec": packing.codec}
    return " ".join(f"{name} {value}" for name, value in options.items() if value is not None)


def _groups(report: BenchmarkReport) -> Iterator[str]:
    ratios, group = report.decoded_by_group, report.plan.group
    now, most = ratios[group], ratios[GROUP_PATCHES]
    line = f"patches_per_volume: {group} read together decode {now:.1f} bytes for each byte delivered"
    if group > 1:
        line += f", one by one {ratios[1]:.1f}"
    share = _decoding_share(report)
    gain = 1 / (1 - share * (1 - most / now))
    if gain >= WORTH_IT:
        line += f"; {GROUP_PATCHES} would decode {most:.1f}: about {gain:.1f} times as many patches/s"
    yield line


def _decoding_share(report: BenchmarkReport) -> float:
    """The share of the time that decoding takes, from the speed without a codec."""
    now = report.packings[0]
    bare = _fastest(p for p in report.packings if p.codec == "none" and p.chunk == now.chunk)
    gain = _gain(now, bare)
    return 1 - 1 / gain if gain > 1 else 0.0


def _workers(report: BenchmarkReport) -> Iterator[str]:
    one, most = report.speeds[0], report.speeds[-1]
    if most is one:
        yield f"workers: each reads up to {rate_text(one.warm)} patches/s; -j N measures N together"
        return
    if most.warm < WORTH_IT * one.warm:
        yield (
            f"workers: {most.processes} read hardly more than the {rate_text(one.warm)} patches/s of one: "
            f"cores or memory are the limit"
        )
        return
    each = rate_text(most.warm / most.processes)
    yield (
        f"workers: use one for each {each} patches/s that training needs, up to {rate_text(most.warm)} with "
        f"{most.processes}; transforms and the transfer to the training process take time as well"
    )
