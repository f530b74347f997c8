"""A queue over a store before training begins."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import zpatch as zp
from zpatch.bench.benchmark_plan import plan_benchmark
from zpatch.bench.queue_trial import queue_trial, transform_of
from zpatch.errors import OptionError, QueueError

OPTIONS: dict[str, Any] = {"patches_per_volume": 4, "batch_size": 2, "num_workers": 0, "max_length": 8}


@pytest.fixture
def transforms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of transforms in the current folder."""
    (tmp_path / "transforms_of_bench.py").write_text(
        "import time\n"
        "def slow(patch):\n    time.sleep(0.03)\n    return patch\n"
        "def making_slow():\n    return slow\n"
        "def failing(patch):\n    raise ValueError('no such patch')\n"
        "def making_failing():\n    return failing\n"
        "def raising():\n    raise ZeroDivisionError('two\\nlines')\n"
        "def making_nothing():\n    return None\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.mark.parametrize("patches", [1, 8, 100])
def test_an_epoch_has_about_so_many_patches_of_different_subjects(cohort: zp.Cohort, patches: int) -> None:
    plan = plan_benchmark(cohort, patch_size=16)
    stats = queue_trial(plan, patches=patches, **OPTIONS)
    assert stats.patches == max(4, min(patches, 4 * len(cohort)))
    assert stats.epoch == 1  # after the one that warmed it up
    assert stats.new_chunks == 0 or stats.known_chunks > 0


@pytest.mark.usefixtures("transforms")
def test_a_slow_transform_is_named_before_training_begins(cohort: zp.Cohort) -> None:
    options = OPTIONS | {"num_workers": 1, "transform": "transforms_of_bench:making_slow"}
    stats = queue_trial(plan_benchmark(cohort, patch_size=16), patches=16, **options)
    assert stats.transform > 0.5
    assert "more workers or a cheaper transform will help" in stats.advice


@pytest.mark.usefixtures("transforms")
@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("transforms_of_bench", "is not package.module:factory"),
        (
            "no_such_module:augmentation",
            "cannot be loaded: ModuleNotFoundError: No module named 'no_such_module'",
        ),
        ("transforms_of_bench:other", "cannot be loaded: AttributeError: .*'other'"),
        ("transforms_of_bench:raising", "cannot be loaded: ZeroDivisionError: two lines$"),
        ("transforms_of_bench:making_nothing", "gave NoneType, which cannot be called with a patch"),
        ("transforms_of_bench:slow", "cannot be loaded: TypeError: slow.. missing 1 required"),
    ],
)
def test_a_factory_that_makes_no_transform_is_refused_in_one_line(spec: str, text: str) -> None:
    with pytest.raises(OptionError, match=f"^transform '{spec}' {text}") as caught:
        transform_of(spec)
    assert caught.value.option == "transform"
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("transforms")
def test_a_transform_that_fails_names_its_subject(cohort: zp.Cohort) -> None:
    options = OPTIONS | {"transform": "transforms_of_bench:making_failing"}
    with pytest.raises(QueueError, match=r"subject 'sub-.*ValueError: no such patch"):
        queue_trial(plan_benchmark(cohort, patch_size=16), patches=4, **options)
