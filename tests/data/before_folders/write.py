"""Write the stores, predictions and states of queues that `tests/promises/test_before_folders.py` reads.

Run at commit 42a339e, the last one with all modules in one folder, with this file and the test in its tree:

    python tests/data/before_folders/write.py

`stores.tar.xz` and `expected.json` are written beside this file. Unfinished outputs were killed, by SIGKILL,
at the steps in `main`.
"""

from __future__ import annotations

import gzip
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

import zpatch as zp

sys.path.insert(0, str(Path(__file__).parents[3] / "scripts"))
sys.path.insert(0, str(Path(__file__).parents[2] / "promises"))

import test_before_folders as then
from make_cohort import make_cohort

MTIME_NS = 1_767_323_045_500_000_000  # a fraction that a float holds, as which tarfile keeps it
SCAN_SHAPE = (24, 24, 200)  # of four shards
SERIES_SHAPE = (80, 12, 10, 2)  # long enough for a level of a pyramid
WAYS = ("net", "net.pt2", "net.pt")
LOCK_HOLDER = "process 1 on a-machine"


def main() -> None:
    """Write everything."""
    if (Path(zp.__file__).parent / "store").is_dir():
        raise SystemExit("this is to be run by the version that had all modules in one folder: see above")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_source()
        zp.convert("source", "cohort.zarr", **then.CONVERT)
        expected = expected_of_stores()
        killed = Path("killed")
        killed.mkdir()
        shutil.copytree("source", killed / "source", copy_function=shutil.copy2)
        # The images of sub-03 are staged, two are in place, and their lines are not written.
        kill_at(("sub-03", "t1"), convert_cohort, str(killed))

        write_variants()
        expected |= expected_of_variants()

        write_networks()
        then.predict("net", "finished.zarr")
        for way in WAYS:
            # sub-04 is committed; of sub-05 two shards have a record, and one more is in place.
            third = "sub-05", ".ledger", "prediction", "0.2.0.0.json"
            kill_at(third, then.predict, way, f"killed-{way}.zarr")
        expected |= expected_of_predictions()
        expected |= expected_of_queues()

        killed_ways = [f"killed-{way}.zarr" for way in WAYS]
        parts = {
            "source": ["source"],
            "finished": ["cohort.zarr"],
            "variants": ["packed.zarr", "turned.zarr"],
            "killed": ["killed/cohort.zarr"],
            "predictions": ["finished.zarr", *killed_ways, "net.pt2", "net.pt"],
        }
        (then.DATA / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
        pack(then.DATA / "stores.tar.xz", parts)


# Sources


def write_source() -> None:
    """Three small brains with labels and weights, two long scans, and a series."""
    source = Path("source")
    for folder in make_cohort(source, subjects=3, seed=4, zoom=0.1):
        labels = nib.load(folder / "seg.nii.gz")
        weights = (3 * np.asarray(labels.dataobj) + 1).astype(np.uint8)
        save(folder / "focus.nii.gz", weights, labels.affine)
    for number, subject in enumerate(then.SCANS):
        (source / subject).mkdir()
        save(source / subject / "scan.nii.gz", blocks(number), np.diag([2.0, 2.0, 1.5, 1.0]))
    (source / "sub-06").mkdir()
    i, j, k, t = np.indices(SERIES_SHAPE)
    save(source / "sub-06" / "bold.nii.gz", (7 * i + 3 * j + 5 * k + 100 * t).astype(np.int16), np.eye(4))
    for file in source.rglob("*.nii.gz"):
        os.utime(file, ns=(MTIME_NS, MTIME_NS))


def blocks(seed: int) -> np.ndarray[Any, Any]:
    """A scan of overlapping boxes of one value each, which takes little room."""
    rng = np.random.default_rng(seed)
    scan = np.zeros(SCAN_SHAPE, np.int16)
    for _ in range(120):
        first = rng.integers(0, SCAN_SHAPE)
        i, j, k = (slice(n, n + rng.integers(3, 14)) for n in first)
        scan[i, j, k] = rng.integers(0, 900)
    return scan


def save(path: Path, voxels: np.ndarray[Any, Any], affine: Any) -> None:
    """Write a NIfTI file with no time in it."""
    content = nib.Nifti1Image(voxels, affine).to_bytes()
    path.write_bytes(gzip.compress(content, 9, mtime=0))


# Stores


def convert_cohort(folder: str) -> None:
    """Convert the cohort in another folder."""
    os.chdir(folder)
    zp.convert("source", "cohort.zarr", **then.CONVERT)


def write_variants() -> None:
    """A store of small shards of two levels, packed by zstd; and one whose volumes are turned."""
    some = {**then.CONVERT, "include": ["sub-03", "sub-04", "sub-06"]}
    options = {"codec": "zstd", "chunk": 8, "pyramid": True, "max_memory": 64 * 2**20 + 300 * 2**10}
    zp.convert("source", "packed.zarr", **{**some, **options})
    options = {"codec": "none", "orient": "PIL", "include": ["sub-02"]}
    zp.convert("source", "turned.zarr", **{**then.CONVERT, **options})


def expected_of_stores() -> dict[str, Any]:
    """The facts about the finished store that the test compares."""
    cohort = zp.Cohort("cohort.zarr")
    return {
        "source_mtime_ns": MTIME_NS,
        "subjects": cohort.names,
        "kinds": {f"{s.name}/{name}": image.kind for s in cohort for name, image in s.images.items()},
        "statistics": cohort.statistics,
        "statistics_of_t1": {subject.name: subject.t1.statistics for subject in cohort[:3]},
    }


def expected_of_variants() -> dict[str, Any]:
    """The facts about the other stores that the test compares."""
    stores = {name: zp.Cohort(name) for name in ("packed.zarr", "turned.zarr")}
    return {
        "subjects_of": {name: cohort.names for name, cohort in stores.items()},
        "voxels_of": {
            name: {f"{s.name}/{n}": then.voxel_digest(i.data) for s in cohort for n, i in s.images.items()}
            for name, cohort in stores.items()
        },
    }


# Predictions


def write_networks() -> None:
    """The network as a file of torch.export and as one of TorchScript, without names of files in them."""
    net, patch = then.Net().eval(), torch.zeros(1, 1, 16, 16, 16)
    program = torch.export.export(net, (patch,))
    program.example_inputs = None
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    torch.export.save(program, "net.pt2")
    traced = io.BytesIO()
    torch.jit.save(torch.jit.trace(net, patch), traced)
    with zipfile.ZipFile(traced) as whole, zipfile.ZipFile("net.pt", "w") as kept:
        for name in whole.namelist():
            if not name.endswith(".debug_pkl"):
                kept.writestr(zipfile.ZipInfo(name), whole.read(name))


def expected_of_predictions() -> dict[str, Any]:
    """The facts about the finished prediction, and the work that is left to a killed one."""
    finished = zp.Cohort("finished.zarr")
    shutil.copytree("killed-net.zarr", "resumed.zarr")
    run = then.predict("net", "resumed.zarr")
    exported = zp.export("finished.zarr", "exported")
    return {
        "versions": then.versions(),
        "predictions": {subject.name: then.voxel_digest(subject.prediction.data) for subject in finished},
        "exported_predictions": {
            file.parent.name: then.bytes_digest(then.contents(file)) for file in exported
        },
        "recorded_units": len(list(Path("killed-net.zarr").glob(".unfinished/sub-05/*/.ledger/*/*.json"))),
        "units": len(list(Path("finished.zarr").glob("sub-05/prediction/0/c/*/0/0"))),
        "patches_run_again": sum(run),
    }


# Queues


def expected_of_queues() -> dict[str, Any]:
    """The state of queues within their second epoch, and digests of the patches that follow."""
    kept = {}
    for name in ("labels", "weights", "uniform", "grid"):
        with then.queue_over(zp.Cohort("cohort.zarr"), name) as queue:
            queue.set_epoch(1)
            patches = iter(queue)
            for _ in range(len(queue) // 3 + 1):
                next(patches)
            state = queue.state_dict()
            rest = then.stream_digest(patches)
            kept[name] = {
                "state": state,
                "rest_of_the_epoch": rest,
                "next_epoch": then.stream_digest(queue),
            }
    return {"queues": kept}


# Being killed, and being packed


def kill_at(parts: tuple[str, ...], function: Callable[..., Any], *arguments: str) -> None:
    """Run a function in a process that is killed before anything is renamed to a path of these parts."""
    spawn = multiprocessing.get_context("spawn")
    process = spawn.Process(target=be_killed_at, args=(parts, function, arguments))
    process.start()
    process.join()
    if process.exitcode != -signal.SIGKILL:
        raise RuntimeError(f"it ended with {process.exitcode} and was not killed")


def be_killed_at(parts: tuple[str, ...], function: Callable[..., Any], arguments: tuple[str, ...]) -> None:
    """The function of the process that kill_at starts."""

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event == "os.rename" and is_at(Path(os.fsdecode(args[1])), parts):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    function(*arguments)


def is_at(path: Path, parts: tuple[str, ...]) -> bool:
    """Whether a path has all of some parts, and ends in the last one."""
    return path.name == parts[-1] and all(part in path.parts for part in parts)


def pack(path: Path, parts: dict[str, list[str]]) -> None:
    """Pack the files and folders of each part; the archive does not depend on owners, paths and times."""
    with tarfile.open(path, "w:xz", format=tarfile.PAX_FORMAT, preset=9) as archive:
        for part, entries in parts.items():
            for entry in map(Path, entries):
                for lock in entry.glob(".lock"):
                    lock.write_text(LOCK_HOLDER)
                archive.add(entry, f"{part}/{entry.name}", filter=normalised)


def normalised(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """A member of an archive without its owner, and with the time that all members have."""
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mode = 0o755 if member.isdir() else 0o644
    member.mtime = MTIME_NS / 1e9
    return member


if __name__ == "__main__":
    main()
