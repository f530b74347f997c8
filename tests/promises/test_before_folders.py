"""Stores and predictions of a version whose modules had no folders are read, resumed and verified as before.

`tests/data/before_folders/stores.tar.xz` holds stores and predictions of that version, finished and killed
half way; `expected.json` holds its results of reading them, and states of queues. `write.py` is the program
that wrote all of it.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import platform
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

import zpatch as zp
import zpatch.cli
from zpatch.errors import OptionError
from zpatch.records.names import MANIFEST_TABLE

DATA = Path(__file__).parent.parent / "data" / "before_folders"

CONVERT: dict[str, Any] = {"chunk": 16, "sampling_patterns": ["focus*"]}
SCANS = ["sub-04", "sub-05"]  # the input of predictions: long volumes, of several shards
PREDICT: dict[str, Any] = {
    "image": "scan",
    "patch_size": 16,
    "patch_overlap": 8,
    "overlap_mode": "hann",
    "reduce": "argmax",
    "device": "cpu",
}
PREDICT_COMMAND = ["predict", "cohort.zarr", "--image", "scan", "--patch-size", "16", "--overlap", "8"]
PREDICT_COMMAND += ["--blend", "hann", "--reduce", "argmax", "--device", "cpu", "-q"]
PREDICT_COMMAND += ["--include", "sub-04", "--include", "sub-05"]

JIT_IS_DEPRECATED = "ignore:`torch.jit:DeprecationWarning"


class Net(torch.nn.Module):
    """A convolution by small integers: of integers its sums are exact, in whichever order they are made.

    Its name and code are part of what stands in the predictions: leave them as they are.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv3d(1, 3, 3, padding=1)
        weights = (torch.arange(81) * 7 % 11 - 5).float()
        self.conv.weight.data = weights.reshape(3, 1, 3, 3, 3)
        self.conv.bias.data = torch.tensor([0, 0.25, 0.5])  # so that no two channels are the same

    def forward(self, batch: torch.Tensor) -> Any:
        return self.conv(batch)


def queue_over(cohort: zp.Cohort, name: str, **options: Any) -> zp.Queue:
    """The queue whose state is stored under a name."""
    samplers: dict[str, Callable[[], Any]] = {
        "labels": lambda: zp.LabelSampler(8, "seg", {0: 1, 1: 2, 2: 3}),
        "weights": lambda: zp.WeightedSampler((8, 6, 7), "focus"),
        "uniform": lambda: zp.UniformSampler(9),
        "grid": lambda: zp.GridSampler(patch_size=12, patch_overlap=4),
    }
    return zp.Queue(
        cohort.select(["sub-01", "sub-02", "sub-03"]),
        samplers[name](),
        max_length=12,
        patches_per_volume=10,
        seed=31,
        **options,
    )


def predict(way: str, output: str) -> list[int]:
    """Predict the scans by a Net (``net``) or a model in a file; return the patches of each call of a Net."""
    run: list[int] = []
    if way != "net":
        assert zpatch.cli.run([*PREDICT_COMMAND, output, "--model", way]) == 0
        return run
    net = Net()
    net.register_forward_pre_hook(lambda module, inputs: run.append(len(inputs[0])))
    zp.predict(net, zp.Cohort("cohort.zarr").select(SCANS), output, **PREDICT)
    return run


def versions() -> dict[str, str]:
    """The versions that the identity of a model depends on."""
    python = ".".join(platform.python_version_tuple()[:2])
    return {"python": python, "torch": torch.__version__.partition("+")[0]}


def voxel_digest(voxels: np.ndarray[Any, Any]) -> str:
    """A digest of an array."""
    return bytes_digest(f"{voxels.dtype.str} {voxels.shape} ".encode() + voxels.tobytes())


def bytes_digest(data: bytes) -> str:
    """A digest of some bytes."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def as_json(value: Any) -> Any:
    """A value after a round trip through JSON."""
    return json.loads(json.dumps(value))


@pytest.fixture
def expected() -> dict[str, Any]:
    """The results of the version that wrote the data."""
    found: dict[str, Any] = json.loads((DATA / "expected.json").read_text())
    return found


@pytest.fixture
def unpack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Unpacks parts of the archive into the working folder, with the times that files had."""
    monkeypatch.chdir(tmp_path)

    def unpacked(*parts: str) -> None:
        with tarfile.open(DATA / "stores.tar.xz") as archive:
            for member in archive:
                part, _, member.name = member.name.partition("/")
                if part in parts:
                    archive.extract(member, filter="data")

    return unpacked


def contents(path: Path) -> bytes:
    """The bytes of a file, uncompressed."""
    return gzip.decompress(path.read_bytes())


def files_below(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """The inode, time and contents of every file except the lock."""
    return {
        str(file.relative_to(folder)): (file.stat().st_ino, file.stat().st_mtime_ns, file.read_bytes())
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != ".lock"
    }


def assert_sound(store: Path) -> None:
    """The store is whole: no damage, no missing subject and no leftover."""
    report = zp.verify(store)
    assert report.ok
    assert (report.damages, report.missing_subjects, report.leftovers) == ((), (), ())
    assert not list(store.glob(".staging/*"))
    assert not (store / ".unfinished").exists()
    assert zpatch.cli.run(["verify", str(store)]) == 0


def assert_is_the_source(store: Path, *subjects: str, turned: bool = False) -> None:
    """The images of a store equal those of the source, both their values and their exported files."""
    cohort = zp.Cohort(store)
    assert cohort.names == list(subjects)
    originals = sorted(file for name in subjects for file in Path("source", name).iterdir())
    assert [f"{s.name}/{name}" for s in cohort for name in sorted(s)] == [
        file.relative_to("source").as_posix().removesuffix(".nii.gz") for file in originals
    ]
    for subject in [] if turned else cohort:
        for name, image in subject.images.items():
            nifti: Any = nib.load(Path("source", subject.name, f"{name}.nii.gz"))
            values = np.asanyarray(nifti.dataobj)
            values = np.moveaxis(values, -1, 0) if values.ndim == 4 else values[None]
            np.testing.assert_array_equal(image.data, values)
            np.testing.assert_array_equal(image.affine, nifti.affine)
    exported = zp.export(store, "exported")
    assert sorted(file.relative_to("exported") for file in exported) == [
        file.relative_to("source") for file in originals
    ]
    for original in originals:
        assert contents(Path("exported") / original.relative_to("source")) == contents(original), original
    shutil.rmtree("exported")


# Stores


def test_a_finished_store_is_verified_read_and_exported_byte_for_byte(
    unpack: Callable[..., None], expected: dict[str, Any]
) -> None:
    unpack("source", "finished")
    store = Path("cohort.zarr")
    assert_sound(store)
    assert_is_the_source(store, *expected["subjects"])
    cohort = zp.Cohort(store)
    assert {f"{s.name}/{n}": i.kind for s in cohort for n, i in s.images.items()} == expected["kinds"]
    assert as_json(cohort.statistics) == expected["statistics"]
    assert as_json({s.name: s.t1.statistics for s in cohort[:3]}) == expected["statistics_of_t1"]
    assert zpatch.cli.run(["info", str(store)]) == 0


@pytest.mark.parametrize("name", ["packed.zarr", "turned.zarr"])
def test_a_store_of_another_codec_or_orientation_is_verified_read_and_exported_byte_for_byte(
    unpack: Callable[..., None], expected: dict[str, Any], name: str
) -> None:
    unpack("source", "variants")
    store = Path(name)
    assert_sound(store)
    assert_is_the_source(store, *expected["subjects_of"][name], turned=name == "turned.zarr")
    found = {f"{s.name}/{n}": voxel_digest(i.data) for s in zp.Cohort(store) for n, i in s.images.items()}
    assert found == expected["voxels_of"][name]


def test_the_same_conversion_of_the_same_files_leaves_a_store_unchanged(unpack: Callable[..., None]) -> None:
    unpack("source", "finished")
    before = files_below(Path("cohort.zarr"))
    report = zp.convert("source", "cohort.zarr", **CONVERT)
    assert (report.outcomes, list(report.done)) == ((), zp.Cohort("cohort.zarr").names)
    assert files_below(Path("cohort.zarr")) == before


def test_a_killed_conversion_is_resumed_and_committed_images_are_not_written_again(
    unpack: Callable[..., None], expected: dict[str, Any]
) -> None:
    unpack("source", "killed")
    store = Path("cohort.zarr")
    assert zp.Cohort(store).names == ["sub-01", "sub-02"]
    assert list(store.glob(".staging/*/0/c/0/0/0"))
    assert not list(store.glob("sub-03/t1"))
    report = zp.verify(store)
    assert (report.damages, report.leftovers) == ((), (".staging", "sub-03/focus", "sub-03/seg"))
    committed = {
        name: file for name, file in files_below(store).items() if name.startswith(("sub-01", "sub-02"))
    }
    assert committed
    [times] = {file.stat().st_mtime_ns for file in Path("source").rglob("*.nii.gz")}
    assert times == expected["source_mtime_ns"]  # otherwise all files would be read to compare them

    resumed = zp.convert("source", "cohort.zarr", **CONVERT)

    assert resumed.done == ("sub-01", "sub-02")
    assert [outcome.subject for outcome in resumed.outcomes] == ["sub-03", "sub-04", "sub-05", "sub-06"]
    assert resumed.failures == []
    after = files_below(store)
    assert {name: after[name] for name in committed} == committed
    assert_sound(store)
    assert_is_the_source(store, *expected["subjects"])
    store.rename("resumed.zarr")
    unpack("finished")
    assert after.keys() == files_below(store).keys() | {MANIFEST_TABLE}
    for found, finished in zip(zp.Cohort("resumed.zarr"), zp.Cohort(store), strict=True):
        assert list(found) == list(finished)
        for name in found:
            np.testing.assert_array_equal(found[name].data, finished[name].data)


def test_a_killed_conversion_is_resumed_by_the_same_command(
    unpack: Callable[..., None], expected: dict[str, Any]
) -> None:
    unpack("source", "killed")
    command = ["convert", "source", "cohort.zarr", "--chunk", "16", "--sampling-pattern", "focus*", "-q"]
    assert zpatch.cli.run([*command, "--report", "report.jsonl"]) == 0
    lines = [json.loads(line) for line in Path("report.jsonl").read_text().splitlines()]
    assert [line["subject"] for line in lines if line["status"] == "converted"] == expected["subjects"][2:]
    assert_sound(Path("cohort.zarr"))
    assert_is_the_source(Path("cohort.zarr"), *expected["subjects"])


# Predictions


@pytest.fixture
def same_versions(expected: dict[str, Any]) -> None:
    """Skip with other versions of Python and torch, as a model's identity includes its compiled code."""
    if versions() != expected["versions"]:
        pytest.skip(f"identities of models are those of the versions {expected['versions']}")


def assert_is_the_finished_one(store: Path, expected: dict[str, Any]) -> None:
    """A prediction is whole, and equals the one that was not killed."""
    assert_sound(store)
    cohort = zp.Cohort(store)
    assert [(subject.name, list(subject)) for subject in cohort] == [(name, ["prediction"]) for name in SCANS]
    assert {subject.prediction.kind for subject in cohort} == {"label"}
    found = {subject.name: voxel_digest(subject.prediction.data) for subject in cohort}
    assert found == expected["predictions"]
    exported = zp.export(store, "exported", overwrite=True)
    digests = {file.parent.name: bytes_digest(contents(file)) for file in exported}
    assert digests == expected["exported_predictions"]


def test_a_finished_prediction_is_verified_read_and_exported(
    unpack: Callable[..., None], expected: dict[str, Any]
) -> None:
    unpack("predictions")
    assert_is_the_finished_one(Path("finished.zarr"), expected)


@pytest.mark.usefixtures("same_versions")
def test_the_same_call_leaves_a_finished_prediction_unchanged(unpack: Callable[..., None]) -> None:
    unpack("finished", "predictions")
    before = files_below(Path("finished.zarr"))
    assert predict("net", "finished.zarr") == [1]  # one patch, to probe the output of the network
    assert files_below(Path("finished.zarr")) == before


@pytest.mark.usefixtures("same_versions")
@pytest.mark.filterwarnings(JIT_IS_DEPRECATED)
@pytest.mark.parametrize("way", ["net", "net.pt2", "net.pt"], ids=["module", "torch.export", "TorchScript"])
def test_a_killed_prediction_is_resumed_and_finished_shards_are_not_written_again(
    unpack: Callable[..., None], expected: dict[str, Any], way: str
) -> None:
    unpack("finished", "predictions")
    store = Path(f"killed-{way}.zarr")
    report = zp.verify(store)
    assert (report.damages, report.missing_subjects) == ((), ("sub-05",))
    assert report.leftovers == (".unfinished",)
    before = files_below(store)
    committed = {name: file for name, file in before.items() if name.startswith("sub-04/")}
    [ledger] = store.glob(".unfinished/sub-05/*/.ledger/prediction")
    records = [json.loads(record.read_text()) for record in ledger.glob("*.json")]
    image = ledger.parent.parent / "prediction"
    written = {record["file"]: before[str((image / record["file"]).relative_to(store))] for record in records}
    assert (
        len(written) == expected["recorded_units"] < len(list(image.glob("0/c/*/0/0")))
    )  # one has no record

    run = predict(way, str(store))

    after = files_below(store)
    assert {name: after[name] for name in committed} == committed
    assert {name: after[f"sub-05/prediction/{name}"] for name in written} == written
    assert len(list(store.glob("sub-05/prediction/0/c/*/0/0"))) == expected["units"]
    assert sum(run) == (expected["patches_run_again"] if way == "net" else 0)
    assert_is_the_finished_one(store, expected)


@pytest.mark.usefixtures("same_versions")
@pytest.mark.parametrize(("option", "value"), [("patch_overlap", 4), ("reduce", "softmax"), ("tta", True)])
def test_a_killed_prediction_is_not_resumed_by_a_call_with_other_options(
    unpack: Callable[..., None], option: str, value: Any
) -> None:
    unpack("finished", "predictions")
    before = files_below(Path("killed-net.zarr"))
    with pytest.raises(zp.ZpatchError, match=f"the prediction started there differs in {option}: "):
        zp.predict(
            Net(), zp.Cohort("cohort.zarr").select(SCANS), "killed-net.zarr", **{**PREDICT, option: value}
        )
    assert files_below(Path("killed-net.zarr")) == before


# Queues


@pytest.mark.parametrize("name", ["labels", "weights", "uniform", "grid"])
def test_a_state_of_a_queue_that_shuffled_by_another_rule_is_refused(
    unpack: Callable[..., None], expected: dict[str, Any], name: str
) -> None:
    unpack("finished")
    state = expected["queues"][name]["state"]
    with queue_over(zp.Cohort("cohort.zarr"), name) as queue:
        before = queue.state_dict()
        with pytest.raises(OptionError, match=rf"older version of zpatch, .* set_epoch\({state['epoch']}\)"):
            queue.load_state_dict(state)
        assert queue.state_dict() == before
        # All else that the state says of its stream is as it was.
        fingerprint = dict(queue.state_dict()["fingerprint"], shuffle_patches=True)
        assert as_json(fingerprint) == state["fingerprint"]
        queue.set_epoch(state["epoch"])
        assert 0 < state["consumed"] < len(list(queue)) == len(queue)
