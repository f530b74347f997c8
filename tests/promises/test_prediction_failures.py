"""A subject that is damaged fails alone; the others are predicted, and the same command tries it again."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import children
from test_faults import assert_whole
from test_prediction_faults import Commands, Net, commands, make_store, predict, undisturbed

import zpatch as zp
from zpatch.chunks.mapped_shards import close_shards
from zpatch.errors import DamageError, MemoryLimitError, ModelError, StoreError, UnknownNameError, WorkerError
from zpatch.prediction import shard_ledger
from zpatch.records.names import UNFINISHED
from zpatch.runtime.failures import Failures

pytestmark = pytest.mark.usefixtures("one_thread")
assert commands  # a fixture

NAMES = ("ann", "bob", "eve")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Path]:
    yield make_store(tmp_path, subjects=NAMES)
    close_shards(tmp_path)


@pytest.fixture
def cohort(store: Path) -> zp.Cohort:  # type: ignore[override]  # not the one that other files share
    return zp.Cohort(store)


class Shards:
    """The shards of an image, which are taken away and put back."""

    def __init__(self, store: Path, subject: str, image: str = "t1") -> None:
        self._folder = store / subject / image / "0" / "c"
        self._aside = store.parent / f"{subject}-{image}"

    def lose(self) -> None:
        close_shards(self._folder)
        self._folder.rename(self._aside)

    def find(self) -> None:
        self._aside.rename(self._folder)


@pytest.mark.parametrize("lost", ["ann", "bob"])
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_damaged_subject_fails_alone_with_one_line_and_the_same_command_tries_it_again(
    commands: Commands, store: Path, cohort: zp.Cohort, out: Path, jobs: int, lost: str, full: bool
) -> None:
    if not full and (jobs, lost) != (2, "ann"):
        pytest.skip("either subject with any number of jobs needs --full")
    expected = undisturbed(cohort, out)
    shards = Shards(store, lost)
    shards.lose()
    ran = commands.predict(store, out, "--jobs", jobs)
    [line] = ran.err.splitlines()
    assert ran.code == 3
    assert line.startswith(f"failed: {lost}: ")
    assert f"image 't1' of subject '{lost}'" in line
    assert ran.out.strip() == str(out)
    assert sorted(zp.Cohort(out).names) == sorted({*NAMES} - {lost})
    assert zp.verify(out).missing_subjects == (lost,)
    shards.find()
    commands.forget()
    ran = commands.predict(store, out, "--jobs", jobs)
    assert (ran.code, ran.err) == (0, "")
    assert_whole(out, expected)


def test_an_input_that_is_lost_after_its_prediction_is_finished_is_no_failure(
    commands: Commands, store: Path, out: Path
) -> None:
    assert commands.predict(store, out).code == 0
    Shards(store, "ann").lose()  # the network would be tried on its first patch
    ran = commands.predict(store, out)
    assert (ran.code, ran.err) == (0, "")


def test_a_subject_with_a_damaged_chunk_keeps_what_was_predicted_of_it(
    commands: Commands, store: Path, cohort: zp.Cohort, out: Path
) -> None:
    expected = undisturbed(cohort, out)
    file = max(file for file in (store / "bob/t1/0/c").rglob("*") if file.is_file())
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2] + bytes(64) + data[len(data) // 2 + 64 :])
    assert commands.predict(store, out).code == 3
    assert list((out / UNFINISHED / "bob").glob(f"*/{shard_ledger.LEDGER}/*/*.json"))
    file.write_bytes(data)
    commands.forget()
    assert commands.predict(store, out).code == 0
    assert 0 < commands.patches < 3 * 3 * 13  # all patches of a subject
    assert_whole(out, expected)


def test_the_function_raises_at_the_end_the_error_of_the_only_subject_that_failed(
    store: Path, cohort: zp.Cohort, out: Path
) -> None:
    Shards(store, "bob").lose()
    with pytest.raises(DamageError, match="image 't1' of subject 'bob'"):
        predict(cohort, out, Net())
    assert zp.Cohort(out).names == ["ann", "eve"]


def test_the_function_names_all_subjects_that_failed_in_an_error_of_the_class_of_the_first(
    store: Path, cohort: zp.Cohort, out: Path
) -> None:
    for lost in ("ann", "bob"):
        Shards(store, lost).lose()
    with pytest.raises(DamageError, match=r"2 subjects failed: ann: .* of subject 'ann'.*; bob: .* 'bob'"):
        predict(cohort, out, Net())
    assert zp.Cohort(out).names == ["eve"]


def test_without_keep_going_the_first_error_ends_the_run(store: Path, cohort: zp.Cohort, out: Path) -> None:
    Shards(store, "bob").lose()
    with pytest.raises(DamageError, match="image 't1' of subject 'bob'"):
        predict(cohort, out, Net(), keep_going=False)
    assert zp.Cohort(out).names == ["ann"]


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_network_that_fails_on_one_subject_leaves_the_others_alone(
    cohort: zp.Cohort, out: Path, jobs: int
) -> None:
    corner = float(cohort["bob"]["t1"].data[0, 0, 0, 0])

    def model(batch: torch.Tensor) -> torch.Tensor:
        if corner == batch[0, 0, 0, 0, 0]:
            raise ArithmeticError("too odd")
        return batch

    with pytest.raises(ModelError, match=r"the model failed on subject 'bob'.*too odd"):
        predict(cohort, out, model, jobs=jobs)
    assert sorted(zp.Cohort(out).names) == ["ann", "eve"]
    assert children() == []


def test_a_subject_without_the_image_or_the_mask_fails_alone(
    store: Path, cohort: zp.Cohort, out: Path
) -> None:
    others = [zp.Subject(name="kim", mask=cohort[0]["mask"]), *cohort]
    with pytest.raises(UnknownNameError, match="no image 't1' in subject 'kim'"):
        predict(others, out, Net())
    assert zp.Cohort(out).names == list(NAMES)
    Shards(store, "eve", "mask").lose()
    with pytest.raises(DamageError, match="image 'mask' of subject 'eve'"):
        predict(cohort, out, Net(), mask="mask", overwrite=True)
    assert zp.Cohort(out).names == ["ann", "bob"]


def test_a_name_that_no_subject_has_is_one_error_and_no_line_for_each(
    commands: Commands, store: Path, out: Path
) -> None:
    line = commands.predict(store, out, "--image", "t9").refusal()
    assert "3 subjects failed: ann: no image 't9' in subject 'ann'; did you mean 't1'" in line
    assert not out.exists()


def test_a_failing_network_is_not_tried_on_every_subject_before_anything_is_written(
    cohort: zp.Cohort, out: Path
) -> None:
    broken = Net(fail_at=0)
    with pytest.raises(ModelError, match="the model failed on subject 'ann'"):
        predict(cohort, out, broken)
    assert broken.patches == 1
    assert not out.exists()


def test_a_failing_output_or_a_memory_limit_is_no_failure_of_a_subject(
    cohort: zp.Cohort, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MemoryLimitError, match="the process alone takes"):
        predict(cohort, out, Net(), max_memory=2**20)

    def fail(*args: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard_ledger, "write_shard", fail)
    counted = Net()
    with pytest.raises(StoreError, match=r"out.zarr: .*No space left"):
        predict(cohort, out, counted)
    assert counted.patches < 100


def test_an_output_of_which_every_subject_fails_is_an_error_with_the_lines_of_all(
    commands: Commands, store: Path, out: Path
) -> None:
    commands.fail_at(1)
    ran = commands.predict(store, out)
    *lines, line = ran.err.splitlines()
    assert ran.code == 1
    assert [text.partition(": the")[0] for text in lines] == [f"failed: {name}" for name in NAMES]
    assert line.startswith("zpatch: error: 3 subjects failed: ann: the model failed on subject 'ann'")


def test_failures_keep_no_array_alive_and_name_the_first_five() -> None:
    import weakref

    failures = Failures(keep_going=True)

    def fail() -> None:
        array = np.zeros(10)
        kept.append(weakref.ref(array))
        raise WorkerError("killed")

    kept: list[Any] = []
    for number in range(7):
        with failures.caught(f"sub-{number}"):
            fail()
    assert [reference() for reference in kept] == [None] * 7
    assert str(failures.error()).endswith("; sub-4: killed; and sub-5, sub-6")
    assert isinstance(failures.error(), WorkerError)


def test_the_json_of_the_command_lists_the_failures(commands: Commands, store: Path, out: Path) -> None:
    import json

    Shards(store, "bob").lose()
    ran = commands.predict(store, out, "--json")
    said = json.loads(ran.out)
    assert said["subjects"] == ["ann", "eve"]
    assert [failed["subject"] for failed in said["failed"]] == ["bob"]
    shutil.rmtree(out)
