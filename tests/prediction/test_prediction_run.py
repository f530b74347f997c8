"""How many patches a run would still run, compared with those that it runs."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import zpatch as zp
from zpatch.errors import ModelError, StoreExistsError
from zpatch.networks.network import Network
from zpatch.planning.planning import plan_prediction
from zpatch.planning.prediction_options import PredictOptions
from zpatch.prediction.prediction_run import begun_shards, patches_to_run, run_prediction

pytestmark = pytest.mark.usefixtures("small_chunks")

PATCHES: list[int] = []  # of each batch that was run
FAILS_AFTER: list[int] = []  # a number of patches


def double(batch: torch.Tensor) -> torch.Tensor:
    """A network that counts, and fails when it is told to; its identity is always the same."""
    if FAILS_AFTER and sum(PATCHES) >= FAILS_AFTER[0]:
        raise ArithmeticError("too hard")
    PATCHES.append(len(batch))
    return 2 * batch


@pytest.fixture(autouse=True)
def nothing_counted() -> None:
    PATCHES.clear()
    FAILS_AFTER.clear()


def subjects_of(*names: str) -> list[zp.Subject]:
    rng = np.random.default_rng(0)
    images = (zp.ScalarImage(rng.random((96, 20, 24), dtype=np.float32)) for _ in names)
    return [zp.Subject(name=name, t1=image) for name, image in zip(names, images, strict=True)]


def left(output: Path, subjects: list[zp.Subject], **options: Any) -> list[int]:
    """By the plan of the same call; the output is not changed."""
    before = {file: file.stat() for file in output.rglob("*")}
    chosen = options_of(**options)
    network = Network.of(double, chosen)
    plans = plan_prediction(network, subjects, chosen, begun=begun_shards(output))
    found = patches_to_run(network, plans, output, chosen, subjects=[each.name for each in subjects])
    assert {file: file.stat() for file in output.rglob("*")}.keys() == before.keys()
    return found


def options_of(**options: Any) -> PredictOptions:
    given = {"image": "t1", "patch_size": 12, "patch_overlap": 4, "batch_size": 2, "device": "cpu", **options}
    return PredictOptions.of(**given)


def predicted(output: Path, subjects: list[zp.Subject], **options: Any) -> int:
    """Predict; the number of patches that were run, but for the one that every call begins with."""
    PATCHES.clear()
    chosen = options_of(**options)
    network = Network.of(double, chosen)
    plans = plan_prediction(network, subjects, chosen, begun=begun_shards(output))
    PATCHES.clear()
    with contextlib.suppress(ModelError):
        run_prediction(network, plans, output, chosen)
    return sum(PATCHES)


@pytest.mark.parametrize("fails_after", [1, 30, 70, 140])
def test_a_run_after_a_failure_runs_as_many_patches_as_are_said_to_be_left(
    out: Path, fails_after: int
) -> None:
    subjects = subjects_of("ann", "bob")
    in_all = left(out, subjects)
    FAILS_AFTER.append(fails_after)
    ran = predicted(out, subjects)
    FAILS_AFTER.clear()
    still = left(out, subjects)
    assert sum(in_all) - ran <= sum(still) <= sum(in_all)
    assert (sum(still) < sum(in_all)) == (fails_after > 1)
    assert predicted(out, subjects) == sum(still)
    assert left(out, subjects) == [0, 0]
    assert predicted(out, subjects) == 0


def test_the_patches_of_lost_and_damaged_shards_are_left(out: Path) -> None:
    subjects = subjects_of("ann", "bob")
    [in_all, _] = left(out, subjects)
    predicted(out, subjects)
    files = sorted(file for file in (out / "ann" / "prediction" / "0" / "c").rglob("*") if file.is_file())
    files[0].unlink()
    [ann, bob] = left(out, subjects)
    assert 0 < ann < in_all
    assert bob == 0
    damaged = bytearray(files[-1].read_bytes())
    damaged[len(damaged) // 2] ^= 1
    files[-1].write_bytes(damaged)
    assert left(out, subjects) == [ann, 0]
    [both, _] = left(out, subjects, verify=True)
    assert both > ann
    assert predicted(out, subjects, verify=True) == both
    assert left(out, subjects, verify=True) == [0, 0]


def test_an_output_that_cannot_be_resumed_is_refused_as_by_a_run(out: Path, cohort_store: Path) -> None:
    subjects = subjects_of("ann", "bob")
    predicted(out, subjects)
    for changed, text in (
        (lambda: left(out, subjects, patch_overlap=2), "differs in patch_overlap"),
        (lambda: left(out, subjects[:1]), "differs in subjects"),
        (lambda: left(out, [subjects[1], subjects[0]]), "differs in subjects"),
        (lambda: left(cohort_store, subjects), "holds images that were converted"),
    ):
        with pytest.raises(StoreExistsError, match=text):
            changed()
    other = [subjects[0], zp.Subject(name="bob", t1=zp.ScalarImage(np.ones((96, 20, 24), np.float32)))]
    with pytest.raises(StoreExistsError, match="'bob' was made from other inputs"):
        left(out, other)
    assert left(out, other, overwrite=True) == left(out.with_name("new.zarr"), other)
