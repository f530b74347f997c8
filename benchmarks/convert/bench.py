"""Conversion: its speed and peak memory, and how fast a converted cohort is opened."""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import data
from benchmarks.convert import peers
from benchmarks.measure import FreshRun, Run, alternate, in_fresh_process, one_core, times_as_long
from benchmarks.stage import MIB, Goal, Options, bytes_below, goals, mib, seconds, table

CODECS = ("lz4", "lz4hc", "zstd", "none")
ZPATCH, PYRAMID = "zpatch, lz4", "zpatch, lz4, with coarser levels"
DECODE, ENCODE = "floor: igzip decode, one core", "floor: blosc lz4 encode, one core"
WRITE = "write and fsync of as many bytes as zpatch's lz4"
CHUNK = 32
READ_BYTES = MIB
SLACK_BYTES = 64 * MIB
SLOPE_MIB = 1.0  # of peak memory for each GiB of voxels: what counts as none
OPENED_WITH_ZARR = 200

NOT_SHOWN = (
    "Conversion reads from a warm page cache and writes to the disk of this machine: a network file system "
    "or a cold disk is slower for all. zpatch syncs every file, hashes source and store, and computes "
    "statistics; the peers do none of this, and the figures make no allowance for it.",
    "The volume is a head upsampled, with white noise. Smoother images, and label maps, compress further and "
    "convert faster, in zpatch and in the peers.",
    "The peers run as a user would call them from Python, with their own threads on all cores; the floors "
    "are one core each, and overlapping them perfectly would take two.",
    "The cohort's images are copies of one tiny pair with short statistics; manifests of cohorts with many "
    "label classes are longer. Only the first 200 subjects have folders, as opening needs none. "
    "zarr-python's time is that of those, times the number of subjects.",
)


def run(options: Options) -> str:
    """All tables of the stage, as Markdown."""
    parts = _speed(options), _memory(options), _opening(options), _starting(options)
    return "\n\n".join(parts)


def _head_shape(options: Options) -> data.Shape:
    return (256, 256, 96) if options.quick else (512, 512, 300)


# Speed: zpatch, its peers and the floor, on one file.


def _speed(options: Options) -> str:
    shape = _head_shape(options)
    source = data.head(options.data, shape)
    voxels = data.voxels_of(source)
    converters = _converters(source, options.stores)
    stored = {name: _checked_bytes(name, run, options.stores, voxels) for name, run in converters.items()}
    contenders = converters | _floors(data.file_of(source), voxels, stored[ZPATCH], options.stores)
    times = alternate(contenders, 2 if options.quick else 5, before_each=functools.partial(_tidy, options))
    _tidy(options)
    source_bytes = data.file_of(source).stat().st_size
    heading = (
        f"### {' x '.join(map(str, shape))} int16: {mib(voxels.nbytes)} MiB of voxels in a `.nii.gz` of "
        f"{mib(source_bytes)} MiB ({source_bytes / voxels.nbytes:.0%})"
    )
    missing = [(peer.name, "not installed", "", "", "") for peer in peers.CONVERTERS if not peer.installed]
    rows = [_speed_row(name, times, voxels.nbytes, stored.get(name)) for name in contenders]
    head = ("", "seconds: median (least to most)", "MB/s of voxels", "stored MiB", "time / zpatch's")
    return "\n\n".join([heading, table(head, [*rows, *missing]), goals(*_speed_goals(times))])


def _converters(source: Path, stores: Path) -> dict[str, Run]:
    file = data.file_of(source)
    runs: dict[str, Run] = {
        f"zpatch, {codec}": functools.partial(convert_once, source, stores / f"zpatch, {codec}", codec)
        for codec in CODECS
    }
    runs[PYRAMID] = functools.partial(convert_once, source, stores / PYRAMID, pyramid=True)
    for peer in peers.CONVERTERS:
        if peer.installed:
            runs[str(peer)] = functools.partial(peer.convert, file, stores / str(peer))
    return runs


def convert_once(source: str | Path, store: str | Path, codec: str = "lz4", *, pyramid: bool = False) -> None:
    """Convert into a new store."""
    import zpatch as zp

    zp.convert(source, store, codec=codec, pyramid=pyramid)


def _checked_bytes(name: str, run: Run, stores: Path, voxels: NDArray[Any]) -> int:
    """Run a converter once, to warm up, check its voxels, and return the number of bytes it stored."""
    shutil.rmtree(stores, ignore_errors=True)
    stores.mkdir(parents=True)
    run()
    documents = (stores / name).rglob("zarr.json")
    arrays = [found.parent for found in documents if _is_image(found, voxels.shape)]
    assert len(arrays) == 1, f"{name} wrote {len(arrays)} images"
    import zarr

    array: Any = zarr.open_array(arrays[0], mode="r")
    assert array.dtype == voxels.dtype, f"{name} wrote voxels of {array.dtype}"
    assert np.array_equal(array[:], voxels), f"{name} wrote other voxels than it read"
    return bytes_below(stores / name)


def _is_image(document: Path, shape: tuple[int, ...]) -> bool:
    import zarr

    node = zarr.open(document.parent, mode="r")
    return isinstance(node, zarr.Array) and node.shape == shape


def _floors(file: Path, voxels: NDArray[Any], stored_bytes: int, stores: Path) -> dict[str, Run]:
    chunks = _chunks(voxels)
    written = np.random.default_rng(0).bytes(stored_bytes)
    return {
        DECODE: functools.partial(_decode, file),
        ENCODE: functools.partial(_encode, chunks),
        WRITE: functools.partial(_write, stores / "written", written),
    }


def _chunks(voxels: NDArray[Any]) -> list[NDArray[Any]]:
    """All chunks of 32 x 32 x 32, each contiguous; chunks at the ends are padded with zeros."""
    padded = np.pad(voxels, [(0, -n % CHUNK) for n in voxels.shape])
    starts = itertools.product(*(range(0, n, CHUNK) for n in padded.shape))
    return [padded[z : z + CHUNK, y : y + CHUNK, x : x + CHUNK].copy() for z, y, x in starts]


def _decode(file: Path) -> None:
    """Decode into one small buffer, over and over."""
    from isal import igzip

    buffer = bytearray(READ_BYTES)
    opener: Any = igzip.open
    with one_core(), opener(file, "rb") as stream:
        while stream.readinto(buffer):
            pass


def _encode(chunks: list[NDArray[Any]]) -> None:
    from numcodecs import blosc

    blosc.use_threads = False
    with one_core():
        for chunk in chunks:
            blosc.compress(chunk, b"lz4", 5, blosc.SHUFFLE)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _tidy(options: Options) -> None:
    """Remove the stores and sync the disk, so that no contender waits for another's writes."""
    shutil.rmtree(options.stores, ignore_errors=True)
    options.stores.mkdir(parents=True)
    os.sync()


def _speed_row(
    name: str, times: dict[str, list[float]], voxel_bytes: int, stored_bytes: int | None
) -> tuple[str, ...]:
    rate = voxel_bytes / 1e6 / statistics.median(times[name])
    size = "" if stored_bytes is None else mib(stored_bytes)
    return name, seconds(times[name]), f"{rate:.0f}", size, f"{times_as_long(times[name], times[ZPATCH]):.2f}"


def _speed_goals(times: dict[str, list[float]]) -> list[Goal]:
    floor = [max(pair) for pair in zip(times[DECODE], times[ENCODE], strict=True)]
    beside_floor = times_as_long(times[ZPATCH], floor)
    rivals = [str(peer) for peer in peers.CONVERTERS if peer.package == "nifti-zarr" and peer.installed]
    return [
        *(
            Goal(f"as fast as {name}", times_as_long(times[name], times[ZPATCH]), 6, "times", at_least=True)
            for name in rivals
        ),
        Goal("time beside the slower of the two floors", beside_floor, 1.5, "times"),
        Goal(
            "coarser levels: time beside that without",
            times_as_long(times[PYRAMID], times[ZPATCH]),
            1.35,
            "times",
        ),
    ]


# Memory of one conversion, and its growth with the size of the volume.


def _memory(options: Options) -> str:
    planes = (256, 1024) if options.quick else (512, 2048, 8192) if options.full else (512, 2048)
    shapes = [(512, 512, n) for n in planes]
    sources = {shape: data.long_volume(options.data, shape) for shape in shapes}
    head = data.head(options.data, _head_shape(options))
    base = _base_bytes(head, options)
    main = _conversion_in_fresh_process(head, options)
    peaks = {shape: _conversion_in_fresh_process(source, options) for shape, source in sources.items()}
    slab = _slab_bytes(head)
    rows = [
        _memory_row("base: interpreter and imports", None, base, base),
        _memory_row(f"zpatch, slab of {mib(slab)} MiB", head, main, base),
        *(_memory_row(_longer(sources[s]), sources[s], peaks[s], base) for s in shapes),
        *(_memory_row(str(peer), head, _peer_peak(peer, head, options), None) for peer in peers.CONVERTERS),
    ]
    _tidy(options)
    gib = [np.prod(shape) * 2 / 2**30 for shape in shapes]
    slope = float(np.polyfit(gib, [peaks[shape] / MIB for shape in shapes], 1)[0])
    return "\n\n".join(
        [
            "### Peak memory of a conversion in a fresh process",
            table(("", "voxels MiB", "peak MiB", "above zpatch's base MiB"), rows),
            goals(
                Goal("peak above base", (main - base) / MIB, (2 * slab + SLACK_BYTES) / MIB, "MiB"),
                Goal("slope against the volume (0, but for noise)", slope, SLOPE_MIB, "MiB for each GiB"),
            ),
        ]
    )


def _base_bytes(source: Path, options: Options) -> int:
    """Peak memory of a process that imports all modules that a conversion imports."""
    _tidy(options)
    names = in_fresh_process("convert.bench:modules_after", source, options.stores / "memory").value
    return in_fresh_process("convert.bench:import_only", *names).peak_bytes


def modules_after(source: str, store: str) -> list[str]:
    """Names of the modules that are loaded after a conversion."""
    convert_once(source, store)
    return sorted(sys.modules)


def import_only(*names: str) -> None:
    """Import these modules, and do nothing else."""
    for name in names:
        with contextlib.suppress(ImportError):  # some names in sys.modules cannot be imported
            importlib.import_module(name)


def _longer(source: Path) -> str:
    return f"zpatch, a longer file, slab of {mib(_slab_bytes(source))} MiB"


def _slab_bytes(source: Path) -> int:
    """Bytes of the largest slab, from the plan."""
    from zpatch.conversion.conversion_options import ConvertOptions
    from zpatch.conversion.conversion_plan import plan_conversion

    return max(image.slab_bytes for image in plan_conversion(source, ConvertOptions()).images)


def _conversion_in_fresh_process(source: Path, options: Options) -> int:
    _tidy(options)
    return in_fresh_process("convert.bench:convert_once", source, options.stores / "memory").peak_bytes


def _peer_peak(peer: peers.Peer, source: Path, options: Options) -> int | None:
    if not peer.installed:
        return None
    _tidy(options)
    place = options.stores / "memory"
    return in_fresh_process("convert.bench:peer_once", peer.name, data.file_of(source), place).peak_bytes


def peer_once(name: str, file: str, store: str) -> None:
    """Convert with the peer of that name."""
    peer = next(peer for peer in peers.CONVERTERS if peer.name == name)
    peer.convert(Path(file), Path(store))


def _memory_row(name: str, source: Path | None, peak: int | None, base: int | None) -> tuple[str, ...]:
    voxels = "" if source is None else mib(data.voxel_bytes(source))
    if peak is None:
        return name, voxels, "not installed", ""
    return name, voxels, mib(peak), "" if base is None else mib(peak - base)


# Opening a large cohort.


def _opening(options: Options) -> str:
    subjects = 1_000 if options.quick else 10_000
    cohort = data.tiny_cohort(options.data, subjects, OPENED_WITH_ZARR)
    manifest_bytes = (cohort / "manifest.jsonl").stat().st_size
    base = in_fresh_process("convert.bench:import_cohort").peak_bytes
    opened: list[FreshRun] = []
    reached: list[FreshRun] = []
    resumed: list[FreshRun] = []
    by_zarr: list[float] = []
    for _ in range(2 if options.quick else 5):
        opened.append(in_fresh_process("convert.bench:open_cohort", cohort))
        reached.append(in_fresh_process("convert.bench:reach_every_image", cohort))
        resumed.append(in_fresh_process("convert.bench:resume", cohort.with_name("cohort-source"), cohort))
        found = in_fresh_process("convert.bench:open_with_zarr", cohort).value
        by_zarr.append(found["seconds"] * 2 * subjects / found["images"])
    times = [found.value["seconds"] for found in opened]
    peak = statistics.median(found.peak_bytes for found in opened)
    assert all(found.value["subjects"] == subjects for found in opened)
    assert all(found.value["images"] == 2 * subjects for found in reached)
    rows = [
        _opening_row("zpatch.Cohort(path)", times, times, opened, base),
        _opening_row(
            "and then each image of each subject", [f.value["seconds"] for f in reached], times, reached, base
        ),
        _opening_row("Cohort(path) in a new interpreter", [f.seconds for f in opened], times, opened, base),
        _opening_row(
            "zpatch.convert that finds nothing to do",
            [f.value["seconds"] for f in resumed],
            times,
            resumed,
            base,
        ),
        _opening_row(f"zarr-python, {OPENED_WITH_ZARR} subjects scaled up", by_zarr, times, [], base),
    ]
    heading = (
        f"### Opening a cohort of {subjects:,} subjects, {2 * subjects:,} images (manifest of "
        f"{mib(manifest_bytes)} MiB)"
    )
    head = ("", "seconds: median (least to most)", "time / zpatch's", "peak MiB", "above imports MiB")
    return "\n\n".join(
        [
            heading,
            table(head, rows),
            goals(
                Goal("Cohort(path)", statistics.median(times), 0.5, "s"),
                Goal("peak memory of the process", peak / MIB, 100, "MiB"),
            ),
        ]
    )


def _opening_row(
    name: str, taken: list[float], by_cohort: list[float], runs: list[FreshRun], base: int
) -> tuple[str, ...]:
    ratio = f"{times_as_long(taken, by_cohort):.2f}"
    peaks = [run.peak_bytes for run in runs]
    memory = (mib(statistics.median(peaks)), mib(statistics.median(peaks) - base)) if peaks else ("", "")
    return name, seconds(taken), ratio, *memory


def import_cohort() -> None:
    """Import the modules that opening a cohort needs."""
    import_only("zpatch.images.cohort")


def open_cohort(path: str) -> dict[str, float]:
    """Open a cohort; imports are not timed."""
    from zpatch import Cohort

    begin = time.perf_counter()
    cohort = Cohort(path)
    return {"seconds": time.perf_counter() - begin, "subjects": len(cohort)}


def reach_every_image(path: str) -> dict[str, float]:
    """Open a cohort and access each image of each subject; imports are not timed."""
    from zpatch import Cohort

    begin = time.perf_counter()
    images = sum(len(subject.images) for subject in Cohort(path))
    return {"seconds": time.perf_counter() - begin, "images": images}


def resume(source: str, path: str) -> dict[str, float]:
    """Convert a cohort that is already converted; imports are not timed."""
    from zpatch import convert

    begin = time.perf_counter()
    report = convert(source, path)
    assert not report.outcomes
    return {"seconds": time.perf_counter() - begin, "subjects": len(report.done)}


def open_with_zarr(path: str) -> dict[str, float]:
    """Open the groups and arrays of the subjects that have folders; imports are not timed."""
    names = [f"sub-{number:05d}" for number in range(OPENED_WITH_ZARR)]
    peers.open_each_with_zarr(Path(path), names[:1])
    begin = time.perf_counter()
    images = peers.open_each_with_zarr(Path(path), names)
    return {"seconds": time.perf_counter() - begin, "images": images}


# Starting.


def _starting(options: Options) -> str:
    commands = {
        "`zpatch --help`": [str(Path(sys.executable).with_name("zpatch")), "--help"],
        '`python -c "import click"`': [sys.executable, "-c", "import click"],
        "`python -c pass`": [sys.executable, "-c", "pass"],
    }
    runs: dict[str, Run] = {
        name: functools.partial(subprocess.run, command, check=True, stdout=subprocess.DEVNULL)
        for name, command in commands.items()
    }
    alternate(runs, 1)
    times = alternate(runs, 5 if options.quick else 21)
    rows = [(name, seconds(taken)) for name, taken in times.items()]
    return "\n\n".join(
        [
            "### Start",
            table(("", "seconds: median (least to most)"), rows),
            goals(Goal("`zpatch --help`", statistics.median(times["`zpatch --help`"]), 0.2, "s")),
        ]
    )
