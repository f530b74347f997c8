"""However a prediction is shared out, over processes or machines, it gives the same bytes."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import psutil
import pytest
import torch
from processes import children, eventually, local_cluster
from test_faults import assert_whole, contents, is_worker

import zpatch as zp
import zpatch.cli
from zpatch.chunks.mapped_shards import close_shards
from zpatch.errors import MemoryLimitError, OptionError
from zpatch.networks import network
from zpatch.networks.network import Network, torch_device
from zpatch.planning import planning
from zpatch.planning.model_inputs import ModelInputs
from zpatch.planning.planning import plan_prediction
from zpatch.planning.prediction_options import PredictOptions
from zpatch.planning.prediction_plan import PredictionPlan
from zpatch.planning.probe import probe
from zpatch.prediction import shared_work
from zpatch.records.names import UNFINISHED
from zpatch.runtime.tasks import run_tasks

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = {"ann": (40, 36, 300), "bob": (24, 180, 30)}  # the longest axis differs
OPTIONS: dict[str, Any] = {"image": "t1", "patch_size": 20, "patch_overlap": 8, "batch_size": 2}


@dataclass
class Watch:
    """What is hooked to a network: it takes its time, and notes which process it is in."""

    pause_s: float = 0
    marks: Path | None = None

    def __call__(self, network: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        time.sleep(self.pause_s)
        if self.marks is not None:
            with self.marks.open("a") as marks:
                marks.write(f"{os.getpid()}\n")


class Conv(torch.nn.Module):
    """A small network whose sums of floats would show any change of order."""

    def __init__(self, channels: int = 2, **watched: Any) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        layers = torch.nn.Conv3d(1, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv3d(4, channels, 1)
        self.layers = torch.nn.Sequential(*layers)
        for parameter in self.parameters():
            parameter.data = torch.rand(parameter.shape, generator=generator) - 0.5
        self.register_forward_pre_hook(Watch(**watched))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.layers(batch)
        return found


def pointwise(batch: torch.Tensor) -> torch.Tensor:
    return torch.cat([batch * 2 + 1, 500 - batch, batch.new_full(batch.shape, 300)], dim=1)


Choice = dict[str, Any]
CHOICES: dict[str, Choice] = {
    "hann": {"model": Conv(), "overlap_mode": "hann"},
    "argmax": {"model": pointwise, "overlap_mode": "crop", "reduce": "argmax"},
    "masked": {"model": Conv(), "overlap_mode": "gaussian", "mask": "mask", "fill": -1.0},
    "returned": {
        "model": Conv(), "spacing": (1.3, 0.7, 1.5), "orientation": "PIL", "mask": "mask", "fill": -1.0,
    },
}  # fmt: skip
each_choice = pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("scaling")
    for number, (subject, shape) in enumerate(SHAPES.items()):
        (folder / "source" / subject).mkdir(parents=True)
        voxels = np.random.default_rng(number).integers(0, 900, shape).astype(np.int16)
        mask = np.zeros(shape, np.uint8)
        mask[5:20, 10:30, 10:20] = 1
        mask[-8:, -8:, -8:] = 1
        for name, values in (("t1", voxels), ("mask", mask)):
            nib.Nifti1Image(values, np.eye(4)).to_filename(folder / "source" / subject / f"{name}.nii")
    zp.convert(folder / "source", folder / "cohort.zarr", chunk=16)
    yield folder / "cohort.zarr"
    close_shards(folder)


@pytest.fixture
def cohort(store: Path) -> zp.Cohort:  # type: ignore[override]  # not the one that other files share
    return zp.Cohort(store)


def predict(cohort: Any, out: Path, *, model: Any, **options: Any) -> zp.Cohort:
    return zp.predict(model, cohort, out, **{**OPTIONS, **options})


def plans_of(cohort: Any, *, model: Any, **options: Any) -> list[PredictionPlan]:
    network = Network(model, torch_device("cpu"))
    return plan_prediction(network, cohort, PredictOptions.of(**{**OPTIONS, **options}))


def in_one_process(cohort: Any, out: Path, **choice: Any) -> dict[str, Any]:
    """What one process gives, in another place."""
    predict(cohort, out.with_name("one.zarr"), **choice)
    return contents(out.with_name("one.zarr"))


# Local processes


@each_choice
def test_two_and_four_jobs_give_the_bytes_of_one(cohort: zp.Cohort, out: Path, choice: Choice) -> None:
    expected = in_one_process(cohort, out, **choice)
    for jobs in (2, 4):
        regions = [len(plan.regions) for plan in plans_of(cohort, jobs=jobs, **choice)]
        assert regions == [jobs // 2] * 2
        predict(cohort, out, jobs=jobs, overwrite=True, **choice)
        assert_whole(out, expected)
    assert children() == []


def test_one_volume_is_shared_out_among_jobs_too(cohort: zp.Cohort, out: Path) -> None:
    expected = in_one_process(cohort[:1], out, **CHOICES["hann"])
    [alone] = plans_of(cohort[:1], **CHOICES["hann"])
    for jobs in (2, 3, 4):
        [plan] = plans_of(cohort[:1], jobs=jobs, **CHOICES["hann"])
        assert len(plan.regions) == jobs
        assert alone.patches == plan.patches < plan.patches_run
        predict(cohort[:1], out, jobs=jobs, overwrite=True, **CHOICES["hann"])
        assert_whole(out, expected)


def test_progress_of_jobs_adds_up_to_the_patches_that_the_plan_says_are_run(
    cohort: zp.Cohort, out: Path
) -> None:
    choice = {"model": pointwise, "jobs": 4, "batch_size": 1}
    reported: list[int] = []
    predict(cohort, out, progress=reported.append, **choice)
    assert sum(reported) == sum(plan.patches_run for plan in plans_of(cohort, **choice))


@pytest.mark.parametrize("seed", range(3))
def test_regions_in_any_order_and_run_twice_give_the_same_bytes(
    cohort: zp.Cohort, out: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    choice = CHOICES["hann"]
    expected = in_one_process(cohort, out, **choice)
    orders: list[list[int]] = []

    def shuffled(function: Callable[..., Any], tasks: Sequence[Any], **_: Any) -> Iterator[tuple[int, Any]]:
        order = random.Random(seed).sample(range(len(tasks)), len(tasks))
        orders.append(order)
        for number in order:
            function(tasks[number], lambda patches: None)
            yield number, function(tasks[number], lambda patches: None)

    monkeypatch.setattr(shared_work, "run_tasks", shuffled)
    predict(cohort, out, jobs=6, **choice)
    assert sorted(orders[0]) == list(range(6))
    assert_whole(out, expected)


def test_the_caller_keeps_its_threads_also_where_there_is_but_one_region(out: Path) -> None:
    torch.set_num_threads(2)
    subject = zp.Subject(t1=zp.ScalarImage(np.zeros((30, 30, 30), np.float32)))
    assert len(plans_of([subject], model=Conv(), jobs=2)[0].regions) == 1
    model = Conv().train()
    predict([subject], out, model=model, jobs=2)
    assert torch.get_num_threads() == 2
    assert model.training


@pytest.mark.timeout(60)
def test_jobs_work_after_torch_used_several_threads_in_this_process(cohort: zp.Cohort, out: Path) -> None:
    """Threads do not survive a fork: a worker that waited for them would wait for ever."""
    torch.set_num_threads(2)
    model = Conv(8)
    with torch.inference_mode():
        model(torch.zeros(2, 1, 64, 64, 64))
    assert predict(cohort, out, model=model, jobs=2).names == ["ann", "bob"]


# Networks that cannot be pickled by name


def scaled_by(factor: float, offset: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda batch: batch * factor + offset


class Scaled:
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        return batch * self.factor


def local_module() -> torch.nn.Module:
    class Local(torch.nn.Module):
        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            return batch * 3 + 1

    return Local()


MODELS = {
    "a lambda": lambda batch: batch * 3 + 1,
    "a closure": scaled_by(3, torch.ones(1)),
    "a partial function": functools.partial(torch.add, 1, alpha=3),
    "a class of a function": local_module(),
    "a method": torch.nn.Identity().forward,
    "an object": Scaled(3),
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_any_function_may_be_the_network_of_jobs(cohort: zp.Cohort, out: Path, model: Any) -> None:
    expected = in_one_process(cohort, out, model=model)
    predict(cohort, out, model=model, jobs=2)
    assert_whole(out, expected)


PICKLED: list[int] = []


class Counted(torch.nn.Identity):
    """Counts how often its state is taken: for its identity, and for each pickle."""

    def __getstate__(self) -> Any:
        PICKLED.append(os.getpid())
        return super().__getstate__()  # type: ignore[no-untyped-call]


def test_a_network_is_pickled_once_for_all_jobs(cohort: zp.Cohort, out: Path) -> None:
    counts = []
    for jobs in (1, 3):
        PICKLED.clear()
        predict(cohort, out, model=Counted(), jobs=jobs, overwrite=True)
        counts.append(len(PICKLED))
    assert counts == [1, 2]


def test_functions_for_masks_and_reductions_work_in_jobs(cohort: zp.Cohort, out: Path) -> None:
    limit = 60
    choice: Choice = {
        "model": pointwise,
        "mask": lambda subject, location: min(location.index) < limit,
        "reduce": lambda voxels: voxels[:2] * limit,
    }
    expected = in_one_process(cohort, out, **choice)
    predict(cohort, out, jobs=3, **choice)
    assert_whole(out, expected)


def test_subjects_of_arrays_work_in_jobs(out: Path, rng: np.random.Generator) -> None:
    volumes = {name: rng.normal(size=(40, 40, 90)).astype(np.float32) for name in ("ann", "bob")}
    subjects = [zp.Subject(name=name, t1=zp.ScalarImage(volume)) for name, volume in volumes.items()]
    expected = in_one_process(subjects, out, model=Conv())
    predict(subjects, out, model=Conv(), jobs=2)
    assert_whole(out, expected)


# What cannot be


def test_jobs_are_refused_where_a_gpu_does_the_work(
    cohort: zp.Cohort, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "torch_device", lambda name: torch.device("meta"))
    options = PredictOptions.of(**OPTIONS)
    heads = probe(Network(pointwise, torch.device("cpu")), ModelInputs.of(cohort[0], options), options)
    monkeypatch.setattr(planning, "probe", lambda *_: heads)
    with pytest.raises(OptionError, match="one process feeds meta: leave jobs=1"):
        predict(cohort, out, model=pointwise, jobs=2, device="cuda")
    assert not out.exists()


@pytest.mark.parametrize("jobs", [0, -1])
def test_a_number_of_jobs_below_one_is_refused(cohort: zp.Cohort, out: Path, jobs: int) -> None:
    with pytest.raises(OptionError, match=f"jobs must be at least 1, not {jobs}"):
        predict(cohort, out, model=pointwise, jobs=jobs)


def test_memory_is_that_of_all_jobs_together(cohort: zp.Cohort, out: Path) -> None:
    choice: Choice = {"model": pointwise, "reduce": "argmax"}
    one, four = (max(p.peak_bytes for p in plans_of(cohort, jobs=jobs, **choice)) for jobs in (1, 4))
    assert 2 * one < four <= 4 * one
    with pytest.raises(MemoryLimitError, match=r"5 processes alone take .*, or use fewer jobs"):
        predict(cohort, out, jobs=4, max_memory=2**20, **choice)
    assert not out.exists()


# Clusters


@pytest.mark.timeout(300)
def test_a_cluster_gives_the_bytes_of_one_process(cohort: zp.Cohort, out: Path, tmp_path: Path) -> None:
    with local_cluster() as cluster:
        address = cluster.scheduler_address
        for name, choice in CHOICES.items():
            expected = in_one_process(cohort, out.with_name(f"of-{name}") / "x", **choice)
            reported: list[int] = []
            predict(cohort, out, scheduler=address, overwrite=True, progress=reported.append, **choice)
            assert_whole(out, expected)
            assert sum(reported) == sum(p.patches_run for p in plans_of(cohort, scheduler=address, **choice))
        marks = tmp_path / "marks"
        predict(cohort, out, scheduler=address, model=Conv(marks=marks), overwrite=True)
    pids = marked_by(marks)
    assert len(pids) == 3  # the two workers, and this process for the first patch
    assert pids[os.getpid()] == 1


def marked_by(marks: Path) -> dict[int, int]:
    lines = marks.read_text().split()
    return {int(pid): lines.count(pid) for pid in set(lines)}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("moment", range(4))
def test_a_cluster_of_which_a_worker_is_killed_gives_the_same_bytes(
    cohort: zp.Cohort, out: Path, tmp_path: Path, full: bool, moment: int
) -> None:
    if moment and not full:
        pytest.skip("one moment in the quick run")
    expected = in_one_process(cohort, out, model=Conv())
    marks = tmp_path / "marks"
    killed: list[int] = []

    def kill_one() -> None:
        eventually(lambda: marks.exists() and len(marked_by(marks)) > 2, "both workers at work")
        eventually(lambda: len(marks.read_text().split()) > 20 + 25 * moment, "some patches")
        workers = [child for child in psutil.Process().children(recursive=True) if is_worker(child)]
        at_work = [worker for worker in workers if worker.pid in marked_by(marks)]
        with contextlib.suppress(psutil.NoSuchProcess):
            at_work[moment % 2].kill()
            killed.append(at_work[moment % 2].pid)

    with local_cluster() as cluster:
        killer = threading.Thread(target=kill_one)
        killer.start()
        predict(cohort, out, model=Conv(pause_s=0.02, marks=marks), scheduler=cluster.scheduler_address)
        killer.join()
    assert killed
    assert {os.getpid(), *killed} < set(marked_by(marks))  # and another went on
    assert_whole(out, expected)


@pytest.mark.slow
def test_a_network_that_fails_on_a_cluster_is_the_same_error_and_a_rerun_resumes(
    cohort: zp.Cohort, out: Path, tmp_path: Path, full: bool
) -> None:
    if not full:
        pytest.skip("a network that fails under jobs is in the quick run, a cluster needs --full")
    broken = tmp_path / "broken"
    broken.touch()

    def model(batch: torch.Tensor) -> torch.Tensor:
        if broken.exists() and bool((batch[0, 0, 0, 0, 0] == last).item()):
            raise ArithmeticError("too hard")
        return pointwise(batch)

    corner = [n - 20 for n in SHAPES["ann"]]
    last = float(cohort[0]["t1"].data[(0, *corner)])
    options = {"model": model, "batch_size": 1}
    with local_cluster() as cluster:
        address = cluster.scheduler_address
        with pytest.raises(zp.ZpatchError, match=r"the model failed on subject 'ann', patches at \(\d+, "):
            predict(cohort, out, scheduler=address, **options)
        assert zp.verify(out).damages == ()
        broken.unlink()
        predict(cohort, out, scheduler=address, **options)
    assert_whole(out, in_one_process(cohort, out, **options))


@pytest.mark.parametrize("where", ["tcp://127.0.0.1:9", "nowhere.json"])
def test_a_scheduler_that_does_not_answer_is_one_line_and_the_output_can_be_resumed(
    cohort: zp.Cohort, out: Path, where: str
) -> None:
    with pytest.raises(OptionError, match="no Dask scheduler answers at"):
        predict(cohort, out, scheduler=where, **CHOICES["hann"])
    expected = in_one_process(cohort, out, **CHOICES["hann"])
    assert (out / UNFINISHED).exists()
    plans = [plan.regions for plan in plans_of(cohort, scheduler=where, **CHOICES["hann"])]
    assert all(len(regions) > 1 for regions in plans)
    predict(cohort, out, **CHOICES["hann"])
    assert_whole(out, expected)


def test_no_array_passes_the_scheduler(cohort: zp.Cohort, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is sent to a worker is a path and two numbers."""
    import cloudpickle

    sent: list[int] = []

    def measured(function: Any, tasks: Sequence[Any], **options: Any) -> Iterator[tuple[int, Any]]:
        sent.extend(len(cloudpickle.dumps((function, task))) for task in tasks)
        results = list(run_tasks(function, tasks, **options))
        sent.extend(len(cloudpickle.dumps(result)) for result in results)
        yield from results

    monkeypatch.setattr(shared_work, "run_tasks", measured)
    predict(cohort, out, jobs=2, model=Conv(64))
    assert len(sent) == 4
    assert max(sent) < 1000


def test_the_command_line_takes_jobs(store: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "nets_of_scaling.py").write_text("def net():\n    return lambda batch: batch * 2\n")
    with contextlib.chdir(tmp_path):
        model = ("--model", "nets_of_scaling:net", "--patch-size", "20", "--overlap", "8", "-q")
        for path, jobs in ((out, "1"), (out.with_name("two.zarr"), "2")):
            command = ["predict", str(store), str(path), *model, "--image", "t1", "--jobs", jobs]
            assert zpatch.cli.run(command) == 0
    assert_whole(out, contents(out.with_name("two.zarr")))
