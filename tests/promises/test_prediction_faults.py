"""Whatever interrupts a prediction, the same command again gives what an undisturbed one would have given."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forked
import nibabel as nib
import numpy as np
import psutil
import pytest
import torch
from processes import DEADLINE_S, children, eventually, is_running
from record import Some
from test_faults import STEPS_OF_TABLE, assert_whole, contents, harmed

import zpatch as zp
import zpatch.cli
from zpatch.chunks.mapped_shards import close_shards
from zpatch.errors import ModelError, StoreError, StoreExistsError
from zpatch.networks.network import Network, torch_device
from zpatch.planning.planning import plan_prediction
from zpatch.planning.prediction_options import PredictOptions
from zpatch.planning.prediction_plan import PredictionPlan
from zpatch.prediction import shard_ledger
from zpatch.prediction.region_run import run_region
from zpatch.prediction.work_folder import WorkFolder
from zpatch.records.names import LOCK, MANIFEST, UNFINISHED

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (40, 36, 160)  # five shards along K
PATCH, OVERLAP, BATCH = 20, 8, 2
OPTIONS = {"image": "t1", "patch_size": PATCH, "patch_overlap": OVERLAP, "batch_size": BATCH}
ARGUMENTS = ("--image", "t1", "--patch-size", PATCH, "--overlap", OVERLAP, "--batch-size", BATCH, "-q")
OTHER_GRID = {"spacing": 0.8, "orientation": "PIL"}
FLAGS = {"spacing": "--spacing", "orientation": "--orient"}
COUNT, FAIL_AT = Path("patches"), Path("fail-at")  # in the working folder of a command


# A network that counts


@dataclass
class Watch:
    """What a network does beside its work, which is no part of what it is: it is hooked to it.

    It gives up after ``fail_at`` patches. ``shares`` has all processes count together, by a file that they
    add to; another one says when to fail.
    """

    fail_at: int | None = None
    pause_s: float = 0
    shares: bool = False
    patches: int = 0

    def __call__(self, network: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        patches = len(inputs[0])
        self.patches += patches
        if self.shares:
            with COUNT.open("ab", buffering=0) as count:
                count.write(b"." * patches)
            self.patches = COUNT.stat().st_size
            self.fail_at = int(FAIL_AT.read_text()) if FAIL_AT.exists() else None
        if self.fail_at is not None and self.patches > self.fail_at:
            raise ArithmeticError("too hard")
        time.sleep(self.pause_s)


class Net(torch.nn.Module):
    """A convolution that is watched."""

    def __init__(self, seed: int = 0, **watched: Any) -> None:
        super().__init__()
        self.conv = torch.nn.Conv3d(1, 2, 3, padding=1)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.conv.parameters():
            parameter.data = torch.rand(parameter.shape, generator=generator)
        self.register_forward_pre_hook(Watch(**watched))

    @property
    def patches(self) -> int:
        """Patches run so far."""
        [watch] = self._forward_pre_hooks.values()
        patches: int = watch.patches  # type: ignore[attr-defined]
        return patches

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.conv(batch)
        return found


def counting() -> Net:
    return Net(pause_s=0.002, shares=True)


# Stores


def make_store(folder: Path, seed: int = 0, subjects: tuple[str, ...] = ("ann", "bob")) -> Path:
    """A store of subjects with an image and a mask: the first half of the volume along K."""
    for number, subject in enumerate(subjects):
        (folder / "source" / subject).mkdir(parents=True, exist_ok=True)
        voxels = np.random.default_rng(10 * seed + number).integers(0, 900, SHAPE).astype(np.int16)
        mask = np.zeros(SHAPE, np.uint8)
        mask[:, :, : 80 + 24 * seed] = 1
        for name, values in (("t1", voxels), ("mask", mask)):
            nib.Nifti1Image(values, np.eye(4)).to_filename(folder / "source" / subject / f"{name}.nii")
    zp.convert(folder / "source", folder / "cohort.zarr", chunk=16)
    shutil.rmtree(folder / "source")
    return folder / "cohort.zarr"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("prediction")
    yield make_store(folder)
    close_shards(folder)


@pytest.fixture(scope="module")
def other_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The same subjects with other voxels and another mask."""
    folder = tmp_path_factory.mktemp("other")
    yield make_store(folder, seed=1)
    close_shards(folder)


@pytest.fixture
def cohort(store: Path) -> zp.Cohort:  # type: ignore[override]  # not the one that other files share
    return zp.Cohort(store)


def predict(cohort: Any, out: Path, model: Any, **options: Any) -> zp.Cohort:
    return zp.predict(model, cohort, out, **{**OPTIONS, **options})


def plans_of(cohort: Any, **options: Any) -> list[PredictionPlan]:
    network = Network(Net(), torch_device("cpu"))
    return plan_prediction(network, cohort, PredictOptions.of(**{**OPTIONS, **options}))


def undisturbed(cohort: Any, out: Path, **options: Any) -> dict[str, Any]:
    """What a prediction gives that nothing disturbs, in another place."""
    other = out.with_name("undisturbed.zarr")
    predict(cohort, other, Net(), overwrite=True, **options)
    return contents(other)


def bytes_below(folder: Path) -> dict[str, bytes]:
    return {str(f): f.read_bytes() for f in folder.rglob("*") if f.is_file() and f.name != LOCK}


# A process that predicts in its children


@dataclass
class Ran:
    """How a command ended: its exit code or minus the signal, and what it said."""

    code: int
    out: str
    err: str
    steps: int

    def refusal(self) -> str:
        """The one line of an error."""
        assert self.code == 1, self
        assert len(self.err.splitlines()) == 1, self.err
        assert self.err.startswith("zpatch: error: ")
        return self.err.strip()


class Commands:
    """Runs commands, one at a time, each in a child in its own process group."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: forked.Forked | None = None

    def start(self, *arguments: Any, no_space_at: int = 0) -> int:
        """Start a command, and give the number of its process."""
        (self.folder / "steps").write_text("0")
        command = [str(argument) for argument in arguments]
        self.process = forked.start(run_command, command, no_space_at, folder=self.folder)
        return self.process.pid

    def wait(self) -> Ran:
        """Until the command has ended."""
        assert self.process is not None
        out, err = self.process.communicate(600)
        return Ran(self.process.wait(), out, err, int((self.folder / "steps").read_text() or 0))

    def predict(self, store: Path, out: Path, *options: Any, no_space_at: int = 0) -> Ran:
        """Run a prediction to its end."""
        self.start_prediction(store, out, *options, no_space_at=no_space_at)
        return self.wait()

    def start_prediction(self, store: Path, out: Path, *options: Any, no_space_at: int = 0) -> int:
        model = ("--model", "test_prediction_faults:counting")
        return self.start("predict", store, out, *model, *ARGUMENTS, *options, no_space_at=no_space_at)

    @property
    def patches(self) -> int:
        """Patches that networks were run on so far."""
        count = self.folder / COUNT
        return count.stat().st_size if count.exists() else 0

    def forget(self) -> None:
        """Count from 0 on."""
        (self.folder / COUNT).unlink(missing_ok=True)

    def fail_at(self, patches: int | None) -> None:
        """Have the networks fail after so many patches."""
        (self.folder / FAIL_AT).unlink(missing_ok=True)
        if patches is not None:
            (self.folder / FAIL_AT).write_text(str(patches))


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    (tmp_path / "commands").mkdir()
    commands = Commands(tmp_path / "commands")
    yield commands
    if commands.process is not None:
        with commands.process:
            pass


def run_command(arguments: list[str], no_space_at: int) -> None:
    """The command line of a child."""
    torch.set_num_threads(1)
    count = harmed(Path(arguments[2]), no_space_at=no_space_at) if no_space_at else itertools.count(1)
    code = zpatch.cli.run(arguments)
    Path("steps").write_text(str(next(count) - 1))  # empty if it is killed just now
    sys.exit(code)


def processes_below(pid: int) -> list[int]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    return []


# kill -9


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("jobs", "grid"), [(1, {}), (2, {}), (1, OTHER_GRID), (2, OTHER_GRID)])
def test_a_prediction_killed_at_any_moment_is_finished_by_the_same_command_byte_for_byte(
    commands: Commands,
    store: Path,
    cohort: zp.Cohort,
    out: Path,
    some: Some,
    full: bool,
    jobs: int,
    grid: dict[str, Any],
) -> None:
    if grid and jobs == 1 and not full:
        pytest.skip("on another grid with two jobs in the quick run")
    expected = undisturbed(cohort, out, **grid)
    flags = ("--jobs", jobs, *(word for name, value in grid.items() for word in (FLAGS[name], value)))
    plans = plans_of(cohort, jobs=jobs, **grid)
    patches = sum(plan.patches_run for plan in plans)
    redone = sum(plan.redone_patches for plan in plans) if jobs > 1 else plans[0].redone_patches
    assert redone < patches
    began = time.monotonic()
    assert commands.predict(store, out, *flags).code == 0
    took_s = time.monotonic() - began
    assert commands.patches == patches + 1  # one more, to see what the network gives
    assert_whole(out, expected)
    moments = random.Random(jobs)
    for _ in some(range(30), 2):
        shutil.rmtree(out)
        commands.forget()
        pid = commands.start_prediction(store, out, *flags)
        time.sleep(moments.uniform(0, took_s))
        workers = processes_below(pid)
        with contextlib.suppress(ProcessLookupError):
            (os.kill if moments.random() < 0.5 else os.killpg)(pid, signal.SIGKILL)
        assert commands.wait().code in (0, -signal.SIGKILL)
        again = commands.start_prediction(store, out, *flags)
        eventually(lambda: not any(map(is_running, workers)), "the end of all workers", DEADLINE_S)  # noqa: B023
        ran = commands.wait()
        assert (ran.code, ran.err, is_running(again)) == (0, "", False)
        assert commands.patches <= patches + 2 + redone
        assert_whole(out, expected)


@pytest.mark.slow
def test_a_prediction_killed_again_and_again_loses_nothing(
    commands: Commands, store: Path, cohort: zp.Cohort, out: Path
) -> None:
    expected = undisturbed(cohort, out)
    for patches in itertools.count(90, 90):
        pid = commands.start_prediction(store, out)
        with contextlib.suppress(AssertionError):
            eventually(lambda: commands.patches > patches or not is_running(pid), "a part", 60)  # noqa: B023
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        if commands.wait().code == 0:
            break
        assert patches < 3000
    assert_whole(out, expected)


def test_a_killed_worker_costs_a_rerun_of_its_unfinished_shards(
    commands: Commands, store: Path, cohort: zp.Cohort, out: Path
) -> None:
    expected = undisturbed(cohort, out)
    pid = commands.start_prediction(store, out, "--jobs", 2)
    eventually(lambda: commands.patches > 60, "some patches")
    os.kill(processes_below(pid)[0], signal.SIGKILL)
    ran = commands.wait()
    assert (ran.code, ran.err) == (0, "")
    assert_whole(out, expected)


# Work done again


@pytest.mark.parametrize("fail_at", [1, 50, 118, 170, 200, 233])
@pytest.mark.parametrize(
    ("slow_disk", "grid"), [(False, {}), (True, {}), (True, OTHER_GRID)], ids=["", "slow disk", "other grid"]
)
def test_the_number_of_patches_run_again_is_bounded_by_the_plan(
    cohort: zp.Cohort,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    fail_at: int,
    slow_disk: bool,
    grid: dict[str, Any],
) -> None:
    """On the slow disk, what is being written when the network fails is lost, as by a kill."""
    real = shard_ledger.write_shard
    plans = plans_of(cohort, **grid)
    first = Net(fail_at=fail_at, pause_s=0.001)

    def lose(*args: Any) -> Any:
        time.sleep(0.1)
        if first.patches > fail_at:
            raise OSError("lost")
        return real(*args)

    if slow_disk:
        monkeypatch.setattr(shard_ledger, "write_shard", lose)
    with pytest.raises((ModelError, StoreError)):
        predict(cohort, out, first, **grid)
    monkeypatch.setattr(shard_ledger, "write_shard", real)
    second = Net()
    predict(cohort, out, second, **grid)
    done = min(first.patches, fail_at) - 1
    left = sum(plan.patches for plan in plans) - done
    assert second.patches <= left + plans[0].redone_patches + 1


def test_a_prediction_that_is_done_runs_the_first_patch_only_and_changes_no_file(
    cohort: zp.Cohort, out: Path
) -> None:
    predict(cohort, out, Net())
    before = bytes_below(out)
    again = Net()
    assert predict(cohort, out, again).names == cohort.names
    assert again.patches == 1
    assert bytes_below(out) == before


# Another prediction


@pytest.fixture
def begun(cohort: zp.Cohort, out: Path) -> Path:
    """An output with one subject committed and the other begun."""
    with pytest.raises(ModelError):
        predict(cohort, out, Net(fail_at=1 + plans_of(cohort)[0].patches + 80))
    assert zp.Cohort(out).names == ["ann"]
    assert list((out / UNFINISHED / "bob").glob(f"*/{shard_ledger.LEDGER}/*/*.json"))
    return out


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ({"model": Net(seed=1)}, "model"),
        ({"model": lambda batch: batch.sin()}, "model"),
        ({"patch_size": 18}, "patch_size"),
        ({"patch_size": (20, 20, 22)}, r"patch_size: \[20,20,20\] then, \[20,20,22\] now"),
        ({"patch_overlap": 6}, r"patch_overlap: \[8,8,8\] then, \[6,6,6\] now"),
        ({"overlap_mode": "crop"}, 'overlap_mode: "hann" then, "crop" now'),
        ({"reduce": "argmax"}, "reduce"),
        ({"reduce": lambda voxels: voxels[:1]}, "reduce"),
        ({"batch_size": 3}, "batch_size: 2 then, 3 now"),
        ({"padding_mode": "reflect"}, 'padding_mode: null then, "reflect" now'),
        ({"normalize": "zscore"}, 'normalize: null then, "zscore" now'),
        ({"mask": "mask"}, 'mask: null then, "mask" now'),
        ({"mask": lambda subject, location: location.index[2] < 80}, "mask: null then, "),
        ({"fill": 1.5}, 'fill: "0.0" then, "1.5" now'),
        ({"image": "mask"}, r'image: \["t1"\] then, \["mask"\] now'),
        ({"amp": True}, "amp: false then, true now"),
        ({"tta": True}, "tta: false then, true now"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_an_output_of_other_options_is_refused_with_the_change_and_is_not_modified(
    cohort: zp.Cohort, begun: Path, options: dict[str, Any], changed: str
) -> None:
    before = bytes_below(begun)
    with pytest.raises(
        StoreExistsError, match=rf"out.zarr: the prediction started there differs in .*{changed}"
    ):
        predict(cohort, begun, **{"model": Net(), **options})
    assert bytes_below(begun) == before


def test_an_output_of_other_subjects_is_refused_with_the_change(cohort: zp.Cohort, begun: Path) -> None:
    before = bytes_below(begun)
    for others in (cohort[:1], cohort[1:], list(reversed(cohort))):
        with pytest.raises(StoreExistsError, match=r'differs in subjects: \["ann","bob"\] then, \['):
            predict(others, begun, Net())
    assert bytes_below(begun) == before


def test_an_output_of_other_voxels_is_refused_whether_they_are_of_a_subject_done_or_begun(
    cohort: zp.Cohort, other_store: Path, begun: Path
) -> None:
    before, other = bytes_below(begun), zp.Cohort(other_store)
    with pytest.raises(StoreExistsError, match=r"the prediction of 'ann' was made from other inputs"):
        predict(other, begun, Net())
    with pytest.raises(StoreExistsError, match=r"bob: the prediction started there differs in inputs: "):
        predict([cohort["ann"], other["bob"]], begun, Net())
    assert bytes_below(begun) == before


def test_an_output_of_another_mask_under_the_same_name_is_refused(
    cohort: zp.Cohort, other_store: Path, out: Path
) -> None:
    other = [
        subject.with_images(mask=zp.Cohort(other_store)[subject.name]["mask"])
        for subject in cohort
    ]  # fmt: skip
    first = plans_of(cohort, mask="mask")[0]
    assert 0 < first.patches < plans_of(cohort)[0].patches
    for fail_at, subject in ((1 + 50, "ann"), (1 + first.patches + 50, "bob")):
        with pytest.raises(ModelError):
            predict(cohort, out, Net(fail_at=fail_at), mask="mask", overwrite=True)
        before = bytes_below(out)
        subjects = other if subject == "ann" else [cohort["ann"], other[1]]
        with pytest.raises(StoreExistsError, match=rf"{subject}: .* differs in patches_outside_mask: "):
            predict(subjects, out, Net(), mask="mask")
        assert bytes_below(out) == before


@pytest.mark.parametrize(
    ("jobs", "max_memory"),
    [(2, None), (1, "100 GiB"), (3, "100 GiB")],
    ids=["jobs", "memory", "jobs and memory"],
)
def test_jobs_and_memory_limit_may_change_between_runs(
    cohort: zp.Cohort, begun: Path, jobs: int, max_memory: str | None
) -> None:
    predict(cohort, begun, Net(), jobs=jobs, max_memory=max_memory)
    assert_whole(begun, undisturbed(cohort, begun))


@pytest.mark.parametrize("jobs", [1, 2])
def test_progress_of_a_resumed_output_includes_earlier_patches(
    cohort: zp.Cohort, begun: Path, jobs: int
) -> None:
    reported: list[int] = []
    again = Net()
    predict(cohort, begun, again, progress=reported.append, jobs=jobs)
    ann, bob = plans_of(cohort, jobs=jobs)
    assert reported[0] == ann.patches_run
    assert sum(reported) == ann.patches_run + bob.patches_run
    assert jobs > 1 or 1 + bob.patches - reported[1] == again.patches


def test_shards_still_in_flight_from_an_earlier_run_are_never_mixed_with_those_of_this_run(
    cohort: zp.Cohort, out: Path
) -> None:
    """A task of a cluster keeps running when its client has ended, even if the output is replaced."""
    expected = undisturbed(cohort, out)
    plan = plans_of(cohort)[0]
    with pytest.raises(ModelError):
        predict(cohort, out, Net(seed=1, fail_at=60))
    [left] = (folder for folder in (out / UNFINISHED / "ann").iterdir() if folder.is_dir())
    late = Network(Net(seed=1), torch_device("cpu"))
    reported: list[int] = []

    def run_late() -> None:
        options = PredictOptions.of(**OPTIONS)
        run_region(plan, plan.regions[0], late, WorkFolder(out, left), options, lambda patches: None)

    def run_both(patches: int) -> None:
        if not reported:
            run_late()
            assert list(left.glob("prediction/0/c/**/0"))
        reported.append(patches)

    shutil.rmtree(out)
    predict(cohort, out, Net(), progress=run_both)
    assert_whole(out, expected)
    predict(cohort, out, Net(), overwrite=True)
    run_late()
    report = zp.verify(out)
    assert (report.damages, report.leftovers) == ((), (UNFINISHED,))


@pytest.mark.parametrize("way", ["as it is", "mapped", "as a mask"])
def test_the_store_that_is_read_is_never_written_to(store: Path, tmp_path: Path, way: str) -> None:
    shutil.copytree(store, tmp_path / "own.zarr")
    own = zp.Cohort(tmp_path / "own.zarr")
    before = bytes_below(tmp_path / "own.zarr")
    if way == "mapped":
        own = own.map(lambda subject: subject.with_images(t1=subject.t1.map(lambda values: values + 1)))
    options: dict[str, Any] = {}
    subjects: Any = own
    if way == "as a mask":
        options["mask"] = "mask"
        subjects = [s.with_images(t1=zp.ScalarImage(s.t1.data)) for s in own]
    with pytest.raises(StoreExistsError, match="it is the store that is read"):
        predict(subjects, tmp_path / "own.zarr", Net(), overwrite=True, **options)
    assert bytes_below(tmp_path / "own.zarr") == before


def test_a_failing_input_is_not_reported_as_a_failing_output(cohort: zp.Cohort, out: Path) -> None:
    def failing(values: Any) -> Any:
        return values.map_blocks(lambda block: np.loadtxt("/nowhere/table.csv"), dtype=values.dtype)

    mapped = cohort.map(lambda subject: subject.with_images(t1=subject.t1.map(failing)))
    with pytest.raises(FileNotFoundError, match=r"table\.csv") as error:
        predict(mapped, out, Net())
    assert not isinstance(error.value, StoreError)


def test_a_prediction_with_a_fill_of_nan_is_resumed(cohort: zp.Cohort, out: Path) -> None:
    with pytest.raises(ModelError):
        predict(cohort, out, Net(fail_at=30), mask="mask", fill=float("nan"))
    found = predict(cohort, out, Net(), mask="mask", fill=float("nan"))
    assert np.isnan(found[0].prediction.data).any()


def test_a_network_that_cannot_be_sent_is_refused_before_anything_is_touched(
    cohort: zp.Cohort, out: Path
) -> None:
    predict(cohort, out, Net())
    before = bytes_below(out)
    network = Net()
    network._lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(ModelError, match="the model cannot be sent to other processes"):
        predict(cohort, out, network, jobs=2, overwrite=True)
    assert bytes_below(out) == before


def test_after_a_refusal_the_right_command_resumes_the_output(cohort: zp.Cohort, begun: Path) -> None:
    with pytest.raises(StoreExistsError):
        predict(cohort, begun, Net(seed=1))
    again = Net()
    predict(cohort, begun, again)
    plan = plans_of(cohort)[1]
    assert again.patches <= 1 + plan.patches - 80 + plan.redone_patches
    assert_whole(begun, undisturbed(cohort, begun))


def test_without_resume_an_unfinished_output_is_refused_and_is_not_modified(
    cohort: zp.Cohort, begun: Path
) -> None:
    before = bytes_below(begun)
    with pytest.raises(StoreExistsError, match=r"out.zarr: it exists already; say overwrite=True"):
        predict(cohort, begun, Net(), resume=False)
    assert bytes_below(begun) == before


def test_overwriting_starts_over(cohort: zp.Cohort, begun: Path) -> None:
    again = Net()
    predict(cohort, begun, again, overwrite=True)
    assert again.patches == 1 + sum(plan.patches for plan in plans_of(cohort))
    assert_whole(begun, undisturbed(cohort, begun))


def test_an_unfinished_output_is_incomplete_for_verify(
    begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = zp.verify(begun)
    assert (report.damages, report.leftovers) == ((), (UNFINISHED,))
    assert report.missing_subjects == ("bob",)
    assert zpatch.cli.run(["verify", str(begun)]) == 4


# Failures of the network and of the disk


FAILED = r"the model failed on subject '(ann|bob)', patches at \(\d+, \d+, \d+\), \(\d+, \d+, \d+\), given"


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_network_that_fails_on_a_subject_is_one_line_with_subject_and_location_and_a_rerun_resumes(
    commands: Commands, store: Path, cohort: zp.Cohort, out: Path, jobs: int
) -> None:
    expected = undisturbed(cohort, out)
    commands.fail_at(150)
    ran = commands.predict(store, out, "--jobs", jobs)
    *lines, line = ran.err.splitlines()
    assert re.search(FAILED, line)
    assert line.endswith("given (2, 1, 20, 20, 20): ArithmeticError: too hard")
    if jobs == 1:  # the first subject was done by then
        assert (ran.code, lines, zp.Cohort(out).names) == (3, [], ["ann"])
        assert line.startswith("failed: bob: the model failed on subject 'bob'")
    commands.forget()
    commands.fail_at(3)
    ran = commands.predict(store, out, "--jobs", jobs, "--stop-at-first")
    assert re.search(FAILED, ran.refusal())
    assert zp.verify(out).damages == ()
    commands.fail_at(None)
    commands.forget()
    again = commands.predict(store, out, "--jobs", jobs)
    assert (again.code, again.err) == (0, "")
    assert commands.patches < sum(plan.patches_run for plan in plans_of(cohort, jobs=jobs))
    assert_whole(out, expected)


def test_a_network_that_fails_in_a_worker_is_the_same_error_in_the_caller_and_leaves_no_process(
    cohort: zp.Cohort, out: Path
) -> None:
    with pytest.raises(ModelError, match=FAILED):
        predict(cohort, out, Net(fail_at=100), jobs=2)
    assert children() == []
    predict(cohort, out, Net(), jobs=2)
    assert_whole(out, undisturbed(cohort, out))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_disk_that_is_full_at_any_new_file_is_one_clear_line_and_a_rerun_finishes(
    commands: Commands, store: Path, cohort: zp.Cohort, out: Path, some: Some, jobs: int
) -> None:
    expected = undisturbed(cohort, out)
    files = commands.predict(store, out, "--jobs", jobs, no_space_at=10**9).steps  # of the first process
    assert files > 50
    for number in some(range(1, files + 1 - STEPS_OF_TABLE), 3 if jobs == 1 else 1):
        shutil.rmtree(out, ignore_errors=True)
        line = commands.predict(store, out, "--jobs", jobs, no_space_at=number).refusal()
        assert "No space left on device" in line, number
        assert line.startswith(f"zpatch: error: {out}: it cannot be "), number
        if (out / MANIFEST).exists():
            assert zp.verify(out).damages == ()
        again = commands.predict(store, out, "--jobs", jobs)
        assert (again.code, again.err) == (0, ""), number
        assert_whole(out, expected)


def test_a_disk_that_fails_under_a_shard_is_a_store_error_that_names_the_store(
    cohort: zp.Cohort, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = shard_ledger.write_shard, itertools.count()

    def fail(*args: Any) -> Any:
        if next(calls) == 3:
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(shard_ledger, "write_shard", fail)
    with pytest.raises(StoreError, match=r"out.zarr: .*No space left"):
        predict(cohort, out, Net())
    monkeypatch.setattr(shard_ledger, "write_shard", real)
    predict(cohort, out, Net())
    assert_whole(out, undisturbed(cohort, out))


# Ctrl-C


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("patches", [1, 50, 100, 160])
def test_ctrl_c_stops_all_workers_and_the_same_command_finishes(
    commands: Commands, store: Path, cohort: zp.Cohort, out: Path, full: bool, jobs: int, patches: int
) -> None:
    if patches != 100 and not full:
        pytest.skip("one moment in the quick run")
    pid = commands.start_prediction(store, out, "--jobs", jobs)
    eventually(lambda: commands.patches >= patches, "some patches")
    workers = processes_below(pid)
    began = time.monotonic()
    os.killpg(pid, signal.SIGINT)  # as a terminal does it: to every process of the group
    ran = commands.wait()
    assert time.monotonic() - began < DEADLINE_S
    assert (ran.code, ran.out, ran.err.strip()) == (130, "", "zpatch: interrupted")
    assert not any(map(is_running, workers))
    if (out / MANIFEST).exists():
        assert zp.verify(out).damages == ()
    assert commands.predict(store, out, "--jobs", jobs).code == 0
    assert_whole(out, undisturbed(cohort, out))


# What is read and written


OPENED: list[tuple[str, bool]] = []  # files that were opened, and whether to be read


def _note_opened(event: str, args: tuple[Any, ...]) -> None:
    if event == "open" and not isinstance(args[0], int) and not os.path.isdir(args[0]):
        OPENED.append((os.fsdecode(args[0]), not args[2] & (os.O_WRONLY | os.O_RDWR)))


@pytest.fixture
def opened() -> Iterator[list[tuple[str, bool]]]:
    """Every file opened from now on; a hook stays for good, so there is one of it at most."""
    if not getattr(sys, "_notes_opened_files", False):
        sys.addaudithook(_note_opened)
        sys._notes_opened_files = True  # type: ignore[attr-defined]
    OPENED.clear()
    return OPENED


@pytest.mark.parametrize("mask", [None, "mask"])
def test_each_write_shard_is_written_once_and_no_shard_is_ever_read(
    cohort: zp.Cohort, out: Path, monkeypatch: pytest.MonkeyPatch, opened: list[Any], mask: str | None
) -> None:
    real, written = shard_ledger.write_shard, []

    def counted(array: Any, shard: Any, *args: Any) -> Any:
        written.append((array.name, shard))
        return real(array, shard, *args)

    def two_heads(batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"once": batch, "twice": torch.cat([batch, batch * 2], dim=1)}

    monkeypatch.setattr(shard_ledger, "write_shard", counted)
    network = Network(two_heads, torch_device("cpu"))
    plans = plan_prediction(network, cohort, PredictOptions.of(**OPTIONS, mask=mask))
    close_shards(cohort.store.path)  # mapped files stay open
    opened.clear()
    predict(cohort, out, two_heads, mask=mask)
    assert len(written) == len(set(written)) == sum(plan.shards_out for plan in plans)
    assert [path for path, reads in opened if reads and path.startswith(str(out)) and "/0/c/" in path] == []
    assert any(reads and "/t1/0/c/" in path for path, reads in opened)  # it would have been noticed
