#!/usr/bin/env python
"""A demo of zpatch on real data: NIfTI to Zarr, training, prediction, and back to NIfTI.

    python scripts/demo.py --out demo

Makes a cohort from the MNI152 template, trains a small U-Net on all subjects but the last two, predicts
those two, and compares the exported NIfTI files with their true labels. Two subjects, of which one is tested,
have other voxel sizes and orientations: the network sees all of them on one grid, and the predictions come
back on the grid of each scan. Each stage is a separate process, whose memory is measured from outside.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import nibabel as nib
import numpy as np
import numpy.typing as npt

try:
    import psutil
    from make_cohort import LABELS, plan_cohort, run_plans
    from matplotlib.figure import Figure
except ModuleNotFoundError as missing:
    sys.exit(f"{missing.name} is not installed; run: pip install -e '.[demo]'")

NUM_TEST_SUBJECTS = 2
SPACING_MM = 1
ORIENTATION = "RAS"  # that of train.py
PATCH_SIZE = 64
PATCH_OVERLAP = 32
BATCH_SIZE = 2
MEMORY_POLL_S = 0.05
# Threads of torch that wait by spinning take the cores from the threads that they wait for: on two cores,
# beside other busy processes, this made training about five times slower.
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}
AFFINE_TOLERANCE_MM = 1e-3
TISSUES = {value: name for value, name in LABELS.items() if value}
TISSUE_COLORS = {1: (0.90, 0.35, 0.25), 2: (0.20, 0.60, 0.90)}
OPACITY = 0.5
MIB = 2**20

Volume = npt.NDArray[Any]
Words = Sequence[str | Path | int]


class Paths:
    """The paths of the files of one run."""

    def __init__(self, out: Path) -> None:
        self.cohort = out / "cohort"
        self.store = out / "cohort.zarr"
        self.model = out / "unet.pt2"
        self.predictions = out / "predictions.zarr"
        self.exported = out / "predictions"
        self.picture = out / "planes.png"

    def image(self, subject: str) -> Path:
        """The source file of a subject's T1 image."""
        return self.cohort / subject / "t1.nii.gz"

    def truth(self, subject: str) -> Path:
        """The true labels of a subject."""
        return self.cohort / subject / "seg.nii.gz"

    def predicted(self, subject: str) -> Path:
        """The labels that were predicted for a subject."""
        return self.exported / subject / "prediction.nii.gz"


@dataclass(frozen=True, slots=True)
class Stage:
    """A command to run and measure; `voxel_bytes` is the size of the volumes that it processes."""

    name: str
    title: str
    command: Words
    voxel_bytes: int


@dataclass(frozen=True, slots=True)
class Usage:
    """Time and memory of a stage; `peak_bytes` is of its whole process tree, shared pages counted once."""

    stage: Stage
    seconds: float
    peak_bytes: int


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=Path("demo"), show_default=True
)
@click.option("--train-seconds", type=click.IntRange(min=1), default=60, show_default=True)
@click.option("--subjects", type=click.IntRange(min=NUM_TEST_SUBJECTS + 1), default=8, show_default=True)
def main(out: Path, train_seconds: int, subjects: int) -> None:
    """Run zpatch from NIfTI to NIfTI on a cohort made from real data, and print the results."""
    paths = Paths(out)
    try:
        make_inputs(paths.cohort, subjects)
    except OSError as error:
        raise click.ClickException(str(error)) from error
    names = sorted(folder.name for folder in paths.cohort.iterdir())
    tested = names[-NUM_TEST_SUBJECTS:]
    usages = [run(stage) for stage in plan_stages(paths, names, tested, train_seconds)]

    header("Compare with the truth")
    scores = {name: dice(paths.predicted(name), paths.truth(name)) for name in tested}
    draw_planes(paths, tested[-1])
    print_scores(paths, scores)
    print_usages(usages)
    print_outputs(paths)


def make_inputs(cohort: Path, subjects: int) -> None:
    """Make the cohort, unless it exists."""
    header("Make a cohort of NIfTI files")
    if cohort.exists():
        if (found := len(list(cohort.iterdir()))) != subjects:
            raise FileExistsError(
                f"{cohort} holds {found} subjects, not {subjects}; remove it or change --out"
            )
        click.echo(f"{cohort} exists already")
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


def plan_stages(paths: Paths, names: list[str], tested: list[str], train_seconds: int) -> list[Stage]:
    """The commands of the demo, in order."""
    zpatch = find_zpatch()
    train = Path(__file__).with_name("train.py")
    trained = [name for name in names if name not in tested]
    excluded = [word for name in tested for word in ("--exclude", name)]
    included = [word for name in tested for word in ("--include", name)]
    network: Words = ["--model", paths.model, "--image", "t1", "--batch-size", BATCH_SIZE]
    grid: Words = ["--spacing", SPACING_MM]
    patches: Words = ["--patch-size", PATCH_SIZE, "--overlap", PATCH_OVERLAP, "--reduce", "argmax"]
    return [
        Stage(
            "import torch",
            "For comparison: import torch and do nothing",
            [sys.executable, "-c", "import torch"],
            0,
        ),
        Stage(
            "convert",
            "Convert the cohort to Zarr",
            [zpatch, "convert", paths.cohort, paths.store, "--overwrite"],
            total_bytes(map(paths.image, names)) + total_bytes(map(paths.truth, names)),
        ),
        Stage(
            "train",
            f"Train a U-Net for {train_seconds} s on {', '.join(trained)}",
            [sys.executable, train, paths.store, paths.model, "--seconds", train_seconds, *grid, *excluded],
            total_bytes(map(paths.image, trained)) + total_bytes(map(paths.truth, trained)),
        ),
        Stage(
            "predict",
            f"Predict {', '.join(tested)}, which were not used for training",
            [
                *(zpatch, "predict", paths.store, paths.predictions, "--overwrite"),
                *(*network, *grid, "--orient", ORIENTATION, *patches, *included),
            ],
            total_bytes(map(paths.image, tested)),
        ),
        Stage(
            "verify",
            "Verify what was written",
            [zpatch, "verify", paths.predictions],
            total_bytes(map(paths.truth, tested)),
        ),
        Stage(
            "export",
            "Export the predictions as NIfTI",
            [zpatch, "export", paths.predictions, paths.exported, "--overwrite"],
            total_bytes(map(paths.truth, tested)),
        ),
    ]


def find_zpatch() -> str:
    """The `zpatch` command of this Python."""
    command = shutil.which("zpatch", path=Path(sys.executable).parent) or shutil.which("zpatch")
    if command is None:
        raise click.ClickException("zpatch is not installed; run: pip install -e '.[demo]'")
    return command


def total_bytes(files: Iterable[Path]) -> int:
    """Bytes of the voxels of NIfTI files, uncompressed."""
    headers = [nib.Nifti1Image.from_filename(file).header for file in files]
    return sum(math.prod(h.get_data_shape()) * h.get_data_dtype().itemsize for h in headers)


def run(stage: Stage) -> Usage:
    """Run a stage to its end, watching its memory."""
    header(stage.title)
    peak_bytes = 0
    start = time.monotonic()
    command = [str(word) for word in stage.command]
    with subprocess.Popen(command, env={**ENVIRONMENT, **os.environ}) as process:
        tree = psutil.Process(process.pid)
        while process.poll() is None:
            peak_bytes = max(peak_bytes, tree_bytes(tree))
            time.sleep(MEMORY_POLL_S)
    if process.returncode:
        raise click.ClickException(f"{stage.name} ended with exit code {process.returncode}")
    return Usage(stage, time.monotonic() - start, peak_bytes)


def tree_bytes(root: psutil.Process) -> int:
    """Memory of a process and its descendants together."""
    try:
        return sum(process_bytes(process) for process in [root, *root.children(recursive=True)])
    except psutil.NoSuchProcess:
        return 0


def process_bytes(process: psutil.Process) -> int:
    """Memory of a process with its share of shared pages (PSS), or without them (USS) if PSS is unknown."""
    try:
        memory = process.memory_full_info()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0  # it has ended in the meantime
    return int(getattr(memory, "pss", memory.uss))


def dice(predicted: Path, truth: Path) -> dict[int, float]:
    """The Dice coefficient of each tissue, of two NIfTI label maps on the same grid."""
    ours, theirs = (nib.Nifti1Image.from_filename(path) for path in (predicted, truth))
    if ours.shape != theirs.shape or not np.allclose(ours.affine, theirs.affine, atol=AFFINE_TOLERANCE_MM):
        raise click.ClickException(f"{predicted} and {truth} are on different grids")
    found, expected = np.asarray(ours.dataobj), np.asarray(theirs.dataobj)
    scores = {}
    for tissue in TISSUES:
        overlap = np.sum((found == tissue) & (expected == tissue))
        scores[tissue] = float(2 * overlap / (np.sum(found == tissue) + np.sum(expected == tissue)))
    return scores


def draw_planes(paths: Paths, subject: str) -> None:
    """Draw the middle planes of a subject: a row for each axis; image, truth and prediction."""
    (image, spacing), (truth, _) = upright(paths.image(subject)), upright(paths.truth(subject))
    predicted, _ = upright(paths.predicted(subject))
    columns = {subject: np.zeros_like(truth), "truth": truth, "prediction": predicted}
    figure = Figure(figsize=(9, 9), facecolor="black", layout="constrained")
    grid = figure.subplots(3, len(columns))
    for row, axis in zip(grid, (2, 1, 0), strict=True):  # axial, coronal, sagittal
        across, up = np.delete(spacing, axis)
        for cell, labels in zip(row, columns.values(), strict=True):
            cell.imshow(overlay(middle(image, axis), middle(labels, axis)), aspect=up / across)
            cell.set_axis_off()
    for cell, title in zip(grid[0], columns, strict=True):
        cell.set_title(title, color="white")
    figure.savefig(paths.picture, dpi=120)


def upright(path: Path) -> tuple[Volume, npt.NDArray[np.float64]]:
    """The values of a NIfTI file (I, J, K), turned to RAS, and the size of its voxels in mm."""
    image = nib.as_closest_canonical(nib.Nifti1Image.from_filename(path))
    return np.asarray(image.dataobj), nib.affines.voxel_sizes(image.affine)


def middle(volume: Volume, axis: int) -> Volume:
    """The middle plane perpendicular to an axis, with the last axis upwards."""
    return np.rot90(volume.take(volume.shape[axis] // 2, axis))


def overlay(plane: Volume, labels: Volume) -> npt.NDArray[np.float64]:
    """A plane in grey with its tissues in colour: (rows, columns, RGB), from 0 to 1."""
    grey = np.clip(plane / np.percentile(plane, 99.5), 0, 1)
    picture = np.repeat(grey[..., np.newaxis], 3, axis=-1)
    for tissue, color in TISSUE_COLORS.items():
        inside = labels == tissue
        picture[inside] = (1 - OPACITY) * picture[inside] + OPACITY * np.array(color)
    return picture


def print_scores(paths: Paths, scores: dict[str, dict[int, float]]) -> None:
    """Dice per subject and tissue, and the grid on which it was computed, the subject's own."""
    click.echo(f"{'Dice':<14}" + "".join(f"{name:>16}" for name in TISSUES.values()) + "    voxels")
    for subject, of_tissue in scores.items():
        affine = nib.Nifti1Image.from_filename(paths.truth(subject)).affine
        sizes = " x ".join(f"{size:g}" for size in nib.affines.voxel_sizes(affine).round(3))
        grid = f"{sizes} mm, {''.join(nib.aff2axcodes(affine))}"
        cells = "".join(f"{of_tissue[tissue]:>16.3f}" for tissue in TISSUES)
        click.echo(f"{subject:<14}{cells}    {grid}")


def print_usages(usages: list[Usage]) -> None:
    """Time and memory of each stage."""
    click.echo(f"\n{'Stage':<14}{'seconds':>16}{'peak memory MiB':>18}{'volumes MiB':>16}")
    for usage in usages:
        volumes = f"{usage.stage.voxel_bytes / MIB:.0f}" if usage.stage.voxel_bytes else "-"
        click.echo(
            f"{usage.stage.name:<14}{usage.seconds:>16.1f}{usage.peak_bytes / MIB:>18.0f}{volumes:>16}"
        )


def print_outputs(paths: Paths) -> None:
    """The speed of the training, and the paths of all outputs."""
    training = json.loads(paths.model.with_suffix(".json").read_text())
    rate, size = training["patches"] / training["seconds"], training["patch_size"]
    click.echo(f"\nTraining took {rate:.1f} patches of {size} x {size} x {size} voxels per second.\n")
    for what, path in {
        "cohort": paths.cohort,
        "store": paths.store,
        "network": paths.model,
        "predictions": paths.predictions,
        "as NIfTI": paths.exported,
        "picture": paths.picture,
    }.items():
        click.echo(f"{what:<14}{path}")


def header(title: str) -> None:
    """Print the title of a step."""
    click.secho(f"\n== {title}", bold=True)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
