#!/usr/bin/env python
"""The whole of zpatch on real data: convert, train, predict, verify, export, and look.

    python scripts/demo.py --out demo

Makes a cohort from the MNI152 template, trains a small U-Net on all subjects but the last two,
predicts those two, and compares the exported NIfTI files with the true labels. Each stage is a
process of its own, whose memory is watched from outside.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import click
import nibabel as nib
import numpy as np
import numpy.typing as npt

try:
    import psutil
    from make_cohort import LABELS, plan_cohort, run_plans
except ImportError as error:
    sys.exit(f"{error.name} is missing; run: pip install -e '.[demo]'")

NUM_TEST_SUBJECTS = 2
PATCH_SIZE = 64
PATCH_OVERLAP = 32
BATCH_SIZE = 2
TISSUES = {value: name for value, name in LABELS.items() if value}
POLL_S = 0.05
AFFINE_TOLERANCE_MM = 1e-3
COLORS = {1: (0.90, 0.35, 0.25), 2: (0.20, 0.60, 0.90)}
OPACITY = 0.5


@dataclass(frozen=True, slots=True)
class Folders:
    """Where everything of one run lies."""

    out: Path

    @property
    def cohort(self) -> Path:
        """The NIfTI files that the demo starts from."""
        return self.out / "cohort"

    @property
    def store(self) -> Path:
        """The same as Zarr."""
        return self.out / "cohort.zarr"

    @property
    def model(self) -> Path:
        """The trained network, a torch.export file."""
        return self.out / "unet.pt2"

    @property
    def predictions(self) -> Path:
        """What the network says of the test subjects, as Zarr."""
        return self.out / "predictions.zarr"

    @property
    def exported(self) -> Path:
        """The same as NIfTI."""
        return self.out / "predictions"

    @property
    def picture(self) -> Path:
        """Three planes of a test subject."""
        return self.out / "planes.png"


@dataclass(frozen=True, slots=True)
class Usage:
    """What one stage took.

    peak_bytes: most memory of its process tree at any moment, shared pages counted once.
    volume_bytes: all voxels that it read, as if uncompressed.
    """

    stage: str
    seconds: float
    peak_bytes: int
    volume_bytes: int


@click.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("demo"))
@click.option("--train-seconds", type=click.IntRange(min=1), default=60, show_default=True)
@click.option("--subjects", type=click.IntRange(min=3), default=8, show_default=True)
def main(out: Path, train_seconds: int, subjects: int) -> None:
    """Run zpatch from NIfTI to NIfTI on a cohort made from real data."""
    folders = Folders(out)
    try:
        make_inputs(folders.cohort, subjects)
    except OSError as error:
        raise click.ClickException(str(error)) from error
    names = sorted(path.name for path in folders.cohort.iterdir())
    tested = names[-NUM_TEST_SUBJECTS:]
    usages = run_stages(folders, names, tested, train_seconds)
    scores = {name: score(folders, name) for name in tested}
    draw_planes(folders, tested[0])
    print_results(folders, usages, scores)


def make_inputs(cohort: Path, subjects: int) -> None:
    """Make the cohort, unless it is there."""
    header("Make a cohort of NIfTI files")
    if cohort.exists():
        if (found := len(list(cohort.iterdir()))) != subjects:
            raise FileExistsError(
                f"{cohort} holds {found} subjects, not {subjects}; remove it or choose another --out"
            )
        click.echo(f"{cohort} is there already")
        return
    unfinished = cohort.with_suffix(".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    plans = plan_cohort(unfinished, subjects=subjects, seed=0)
    with (
        closing(run_plans(plans, jobs=os.cpu_count() or 1)) as done,
        click.progressbar(done, length=subjects, label="Making subjects") as bar,
    ):
        for _ in bar:
            pass
    unfinished.rename(cohort)


def run_stages(
    folders: Folders, names: list[str], tested: list[str], train_seconds: int
) -> list[Usage]:
    """Run each stage as a process of its own, and say what each took."""
    zpatch = find_zpatch()
    python = [sys.executable, str(Path(__file__).with_name("train.py"))]
    trained = [name for name in names if name not in tested]
    excluded = [word for name in tested for word in ("--exclude", name)]
    included = [word for name in tested for word in ("--include", name)]
    shutil.rmtree(folders.exported, ignore_errors=True)

    def size(subjects: list[str], *images: str) -> int:
        return sum(nifti_bytes(folders.cohort / s / f"{i}.nii.gz") for s in subjects for i in images)

    return [
        run("idle", [sys.executable, "-c", "import torch"], 0),
        run(
            "convert",
            [zpatch, "convert", folders.cohort, folders.store, "--overwrite"],
            size(names, "t1", "seg"),
        ),
        run(
            "train",
            [*python, folders.store, folders.model, "--seconds", train_seconds, *excluded],
            size(trained, "t1", "seg"),
        ),
        run(
            "predict",
            [
                *(zpatch, "predict", folders.store, folders.predictions, "--overwrite"),
                *("--model", folders.model, "--image", "t1", "--reduce", "argmax"),
                *("--patch-size", PATCH_SIZE, "--overlap", PATCH_OVERLAP, "--blend", "hann"),
                *("--batch-size", BATCH_SIZE, *included),
            ],
            size(tested, "t1"),
        ),
        run("verify", [zpatch, "verify", folders.predictions], size(tested, "seg")),
        run(
            "export",
            [zpatch, "export", folders.predictions, folders.exported],
            size(tested, "seg"),
        ),
    ]
