"""Where the time of a prediction goes: stages inside each other, in threads, and of several processes."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import zpatch as zp
from zpatch.errors import ModelError
from zpatch.prediction.stage_times import STAGES, StageClock, StageTimes


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Lets seconds pass, as the clock of a stage sees them."""
    passed = [0]
    monkeypatch.setattr(time, "perf_counter_ns", lambda: passed[0])

    def wait(seconds: int) -> None:
        passed[0] += seconds * 10**9

    return wait


def test_a_stage_inside_another_counts_for_itself_only(now: Callable[[int], None]) -> None:
    clock = StageClock()
    with clock.task():
        for _ in range(2):
            with clock.stage("blending"):
                now(1)
                with clock.stage("reducing"):
                    now(2)
                    with clock.stage("waiting"):
                        now(4)
                    now(8)
                now(16)
        now(100)
    assert clock.times == StageTimes({"blending": 34, "reducing": 20, "waiting": 8}, total=162)


def test_a_stage_that_fails_counts_until_then(now: Callable[[int], None]) -> None:
    clock = StageClock()

    def fail() -> None:
        with clock.task(), clock.stage("network"):
            now(3)
            raise ModelError("no luck here")

    with pytest.raises(ModelError):
        fail()
    assert clock.times == StageTimes({"network": 3}, total=3)


def test_stages_of_threads_are_not_inside_each_other(now: Callable[[int], None]) -> None:
    clock = StageClock()

    def read() -> None:
        with clock.stage("reading"):
            now(5)

    with clock.stage("waiting"):
        reader = threading.Thread(target=read)
        reader.start()
        reader.join()
    assert clock.times.seconds == {"reading": 5, "waiting": 5}


def test_waiting_for_items_counts_and_keeps_none_of_them(now: Callable[[int], None]) -> None:
    class Item:
        alive = 0

        def __init__(self) -> None:
            Item.alive += 1

        def __del__(self) -> None:
            Item.alive -= 1

    def items() -> Iterator[Item]:
        for _ in range(3):
            assert Item.alive == 0
            now(2)
            yield Item()

    clock = StageClock()
    for item in clock.waiting_for(items()):
        now(10)
        del item
    assert clock.times.seconds == {"waiting": 6}


def test_times_of_processes_are_summed_and_shown_as_shares(now: Callable[[int], None]) -> None:
    clock = StageClock()
    clock.add(StageTimes({"network": 6.0, "reading": 5.0}, total=8.0))
    clock.add(StageTimes({"network": 1.0, "waiting": 1.0}, total=2.0))
    with clock.task(), clock.stage("writing"):
        now(10)
    assert clock.times.to_json() == {
        "reading": 5, "network": 7, "blending": 0, "reducing": 0, "writing": 10, "waiting": 1, "total": 20,
    }  # fmt: skip
    text = "20.0 s: reading 25 %, network 35 %, blending 0 %, reducing 0 %, writing 50 %, waiting 5 %"
    assert str(clock.times) == text
    assert str(StageTimes()).startswith("0.0 s: reading 0 %")


class Slow(torch.nn.Module):
    """A network that takes a hundredth of a second for each batch."""

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        time.sleep(0.01)
        return batch


def made() -> torch.nn.Module:
    return Slow()


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_prediction_counts_every_stage_of_all_its_processes(
    cohort: zp.Cohort, out: Path, jobs: int
) -> None:
    found: list[StageTimes] = []
    patches: list[int] = []
    zp.predict(
        Slow(), cohort[:2], out, image="t1", patch_size=24, device="cpu", jobs=jobs,
        progress=patches.append, on_times=found.append,
    )  # fmt: skip
    (times,) = found
    assert set(times.seconds) == set(STAGES)
    assert all(seconds > 0 for seconds in times.seconds.values())
    assert 0.01 * sum(patches) < times.seconds["network"] < times.total
    of_tasks = sum(times.seconds[stage] for stage in ("network", "blending", "reducing", "waiting"))
    assert of_tasks <= times.total


def test_a_prediction_that_is_complete_takes_no_time_of_any_stage(cohort: zp.Cohort, out: Path) -> None:
    found: list[StageTimes] = []
    for _ in range(2):
        zp.predict(
            torch.nn.Identity(), cohort[:1], out, image="t1", patch_size=24, device="cpu",
            on_times=found.append,
        )  # fmt: skip
    assert found[0].total > 0
    assert found[1] == StageTimes({}, total=0)


def test_subjects_that_fail_count_until_then(cohort: zp.Cohort, out: Path) -> None:
    found: list[StageTimes] = []
    options: dict[str, Any] = {"image": "t1", "patch_size": 24, "device": "cpu"}
    whole = predicted_patches(cohort[:1], out.with_name("whole.zarr"), **options)
    with pytest.raises(ModelError, match="no luck here"):
        zp.predict(FailingLater(whole + 3), cohort[:2], out, **options, on_times=found.append)
    assert found[0].seconds["network"] > 0.01 * whole


def predicted_patches(cohort: zp.Cohort, out: Path, **options: Any) -> int:
    patches: list[int] = []
    zp.predict(torch.nn.Identity(), cohort, out, **options, progress=patches.append)
    return sum(patches)


class FailingLater(Slow):
    """A network that fails after some batches."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.calls = calls

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        self.calls -= 1
        if self.calls < 0:
            raise ModelError("no luck here")
        return super().forward(batch)


def test_the_command_prints_where_the_time_went(
    cohort_store: Path, out: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    options: list[Any] = ["--model", f"{__name__}:made", "--image", "t1", "--patch-size", 24]
    code, text, said = run("predict", cohort_store, out, *options, "--device", "cpu", "--json")
    assert code == 0, said
    seconds = json.loads(text)["seconds"]
    assert [*seconds] == [*STAGES, "total"]
    assert seconds["total"] > seconds["network"] > 0.01
    share = f"network {seconds['network'] / seconds['total']:.0%}".replace("%", " %")
    (line,) = [line for line in said.splitlines() if line.startswith("time of all tasks:")]
    assert line.startswith(f"time of all tasks: {seconds['total']:.1f} s: reading ")
    assert share in line
