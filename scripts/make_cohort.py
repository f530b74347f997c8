#!/usr/bin/env python
"""Make a NIfTI cohort of any size from real data: the MNI152 T1 template and its tissue maps.

    python scripts/make_cohort.py DEST --subjects 8

writes `DEST/sub-01/t1.nii.gz` and `DEST/sub-01/seg.nii.gz` (0 background, 1 grey matter, 2 white
matter), and so on. Each subject is the template under a smooth random warp, with a random bias
field, noise and field of view, in voxels of 1 mm whose axes point to the right, anterior and
superior (RAS). Four subjects are awkward on purpose, as in real cohorts:

    sub-02    an oblique affine
    sub-03    its image is float32 on disk, with a slope and an intercept
    sub-06    voxels of 1.25 mm, axes that all point the other way (LPI)
    sub-08    voxels of 0.8 x 0.8 x 1.6 mm: sagittal slices, axes in another order (PIR)

The last two are sampled from the template on their own grids. With `--zoom Z` all these sizes are
divided by Z.

A subject depends only on the seed and its number: neither `subjects` nor `jobs` changes a byte of
it (except in cohorts of fewer than three, where other subjects are oblique and float32).
"""

import gzip
import importlib.util
import os
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import click
import nibabel as nib
import numpy as np
import numpy.typing as npt
from scipy.interpolate import CubicSpline
from scipy.ndimage import map_coordinates

LABELS = {0: "background", 1: "grey matter", 2: "white matter"}

TEMPLATE_FILE = "mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
TEMPLATE_SPACING_MM = 1.0
NILEARN_HINT = "run: pip install --no-deps nilearn"

FIELD_OF_VIEW_MM = (150, 190)  # of each axis, low to high
CENTRE_JITTER_MM = 8.0
CONTROL_POINTS = 6  # of a smooth field, along each axis
WARP_MM = 3.0  # standard deviation of the displacement along each axis
BIAS_LOG_STD = 0.12
NOISE_STD = 6.0  # in units of the template, whose white matter is about 214
GAIN = (3.0, 5.0)  # stored intensity per unit of the template, low to high

OBLIQUE_ANGLES_DEG = (12.0, -7.0)  # about the first and the third axis
OBLIQUE, FLOAT = 1, 2  # indices of subjects
FLOAT_SLOPE, FLOAT_INTERCEPT = 0.5, -64.0

GZIP_LEVEL = 1
VOXEL_OFFSET = 352  # of a NIfTI-1 file without header extensions

Floats = npt.NDArray[np.float32]
Affine = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Template:
    """The source volumes, each (I, J, K) float32 on the scale 0 to 255.

    affine: voxels to millimetres.
    centre: of the brain's bounding box, in voxels.
    """

    t1: Floats
    grey: Floats
    white: Floats
    affine: Affine
    centre: npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Grid:
    """The voxels of a subject: their size along I, J, K at a zoom of 1, and where these axes point to."""

    spacing_mm: tuple[float, float, float]
    orientation: str


USUAL_GRID = Grid((1.0, 1.0, 1.0), "RAS")
OTHER_GRIDS = {5: Grid((1.25, 1.25, 1.25), "LPI"), 7: Grid((0.8, 0.8, 1.6), "PIR")}  # by index of the subject


@dataclass(frozen=True, slots=True)
class SubjectPlan:
    """All parameters of the files of one subject.

    folder: the folder that its files are written to.
    seed, index: its random stream.
    zoom: how many times more voxels there are along each axis than at the spacing of `grid`.
    grid: its voxel size and orientation.
    oblique: whether its affine is rotated about two axes.
    float_on_disk: whether its image is float32 with a slope and an intercept, rather than int16.
    """

    folder: Path
    seed: int
    index: int
    zoom: float
    grid: Grid
    oblique: bool
    float_on_disk: bool


def make_cohort(
    destination: Path, *, subjects: int = 8, seed: int = 0, zoom: float = 1.0, jobs: int = 1
) -> list[Path]:
    """Write a cohort and return its subject folders, in order.

    `zoom` multiplies the number of voxels of every axis: 1 gives 150 to 190 voxels of 1 mm (see
    `OTHER_GRIDS` for others), 0.25 small volumes for tests. Raises `FileNotFoundError` where the
    template is not installed.
    """
    plans = plan_cohort(Path(destination), subjects=subjects, seed=seed, zoom=zoom)
    return sorted(run_plans(plans, jobs=jobs))


def plan_cohort(destination: Path, *, subjects: int, seed: int, zoom: float = 1.0) -> list[SubjectPlan]:
    """Decide what each subject will be, without writing anything."""
    if subjects < 1:
        raise ValueError(f"a cohort has at least 1 subject, not {subjects}")
    if zoom <= 0:
        raise ValueError(f"zoom must be positive, not {zoom}")
    digits = max(2, len(str(subjects)))
    return [
        SubjectPlan(
            folder=destination / f"sub-{index + 1:0{digits}d}",
            seed=seed,
            index=index,
            zoom=zoom,
            grid=OTHER_GRIDS.get(index, USUAL_GRID),
            oblique=index == OBLIQUE % subjects,
            float_on_disk=index == FLOAT % subjects,
        )
        for index in range(subjects)
    ]


def run_plans(plans: list[SubjectPlan], *, jobs: int) -> Generator[Path]:
    """Make the planned subjects, and yield the folder of each as it is done."""
    load_template()  # before any worker starts: one error, and with fork one copy
    jobs = min(jobs, len(plans))
    if jobs <= 1:
        yield from map(make_subject, plans)
        return
    with ProcessPoolExecutor(jobs) as pool:
        for future in as_completed([pool.submit(make_subject, plan) for plan in plans]):
            yield future.result()


def make_subject(plan: SubjectPlan) -> Path:
    """Write the image and the label map of one subject, and return its folder."""
    template = load_template()
    rng = np.random.default_rng([plan.seed, plan.index])
    coordinates, affine = draw_view(template, plan, rng)
    labels = classify(sample(template.grey, coordinates), sample(template.white, coordinates))
    image = acquire(sample(template.t1, coordinates), rng)

    plan.folder.mkdir(parents=True, exist_ok=True)
    write_nifti(plan.folder / "seg.nii.gz", labels, affine)
    if plan.float_on_disk:
        stored = (image - FLOAT_INTERCEPT) / FLOAT_SLOPE
        scaling = {"slope": FLOAT_SLOPE, "intercept": FLOAT_INTERCEPT}
        write_nifti(plan.folder / "t1.nii.gz", stored.astype(np.float32), affine, **scaling)
    else:
        write_nifti(plan.folder / "t1.nii.gz", np.rint(image).astype(np.int16), affine)
    return plan.folder


def draw_view(template: Template, plan: SubjectPlan, rng: np.random.Generator) -> tuple[Floats, Affine]:
    """Draw a field of view and a warp.

    Returns the template coordinates (3, I, J, K) of each voxel, and the affine of the view.
    """
    low, high = (round(extent * plan.zoom) for extent in FIELD_OF_VIEW_MM)
    sizes_at_1mm = rng.integers(low, high, size=3, endpoint=True)
    spacing = [size_mm / TEMPLATE_SPACING_MM for size_mm in plan.grid.spacing_mm]
    shape = tuple(round(int(size) / step) for size, step in zip(sizes_at_1mm, spacing, strict=True))
    # For each axis of the template, which is in RAS: the voxel axis along it, and whether that points back.
    turns = nib.orientations.axcodes2ornt(plan.grid.orientation)
    axes = [int(axis) for axis in np.argsort(turns[:, 0])]
    steps = [spacing[axis] * float(turns[axis, 1]) for axis in axes]
    extent = np.array([shape[axis] * step for axis, step in zip(axes, steps, strict=True)]) / plan.zoom
    origin = template.centre - extent / 2
    origin += rng.uniform(-1, 1, size=3) * CENTRE_JITTER_MM / TEMPLATE_SPACING_MM

    coordinates = np.empty((3, *shape), dtype=np.float32)
    to_template = np.zeros((4, 4))
    to_template[:, 3] = [*origin, 1.0]
    for of_template, (axis, step) in enumerate(zip(axes, steps, strict=True)):
        along = np.arange(shape[axis], dtype=np.float32) * step / plan.zoom + origin[of_template]
        warp = smooth_field(shape, rng) * (WARP_MM / TEMPLATE_SPACING_MM)
        coordinates[of_template] = warp + along.reshape([-1 if a == axis else 1 for a in range(3)])
        to_template[of_template, axis] = step / plan.zoom
    affine = template.affine @ to_template
    return coordinates, rotation(OBLIQUE_ANGLES_DEG) @ affine if plan.oblique else affine


def acquire(signal: Floats, rng: np.random.Generator) -> Floats:
    """Turn template intensities (I, J, K) into those of a scanner: gain, bias field and noise."""
    bias = np.exp(smooth_field(signal.shape, rng) * np.float32(BIAS_LOG_STD))
    noise = rng.standard_normal(signal.shape, dtype=np.float32) * np.float32(NOISE_STD)
    return np.abs(signal * bias + noise) * np.float32(rng.uniform(*GAIN))  # a magnitude image


def classify(grey: Floats, white: Floats) -> npt.NDArray[np.uint8]:
    """The most probable of the `LABELS` at each voxel (I, J, K), from probabilities times 255."""
    rest = 255 - grey - white
    grey_wins, white_wins = (grey > rest) & (grey >= white), (white > rest) & (white > grey)
    return grey_wins.astype(np.uint8) + 2 * white_wins.astype(np.uint8)


def sample(volume: Floats, coordinates: Floats) -> Floats:
    """Interpolate linearly at coordinates (3, I, J, K); zero outside the volume."""
    return np.asarray(map_coordinates(volume, coordinates, order=1, prefilter=False))


def smooth_field(shape: tuple[int, ...], rng: np.random.Generator) -> Floats:
    """A smooth random field (I, J, K) of unit variance at its control points (cubic spline)."""
    controls = rng.standard_normal((CONTROL_POINTS,) * 3)
    knots = np.linspace(0, 1, CONTROL_POINTS)
    spline = CubicSpline(knots, np.eye(CONTROL_POINTS))
    i, j, k = (spline(np.linspace(0, 1, size)) for size in shape)
    field = np.einsum("ia,jb,kc,abc->ijk", i, j, k, controls, optimize=True)
    return np.ascontiguousarray(field, dtype=np.float32)


def rotation(angles_deg: tuple[float, float]) -> Affine:
    """The affine (4, 4) that rotates the world about its first axis, then about its third."""
    first, third = np.deg2rad(angles_deg)
    about_first, about_third = np.eye(4), np.eye(4)
    about_first[1:3, 1:3] = [[np.cos(first), -np.sin(first)], [np.sin(first), np.cos(first)]]
    about_third[0:2, 0:2] = [[np.cos(third), -np.sin(third)], [np.sin(third), np.cos(third)]]
    return np.asarray(about_third @ about_first, dtype=np.float64)


def write_nifti(
    path: Path,
    stored: npt.NDArray[np.generic],
    affine: Affine,
    *,
    slope: float = 1.0,
    intercept: float = 0.0,
) -> None:
    """Write stored voxels (I, J, K), whose values are `stored * slope + intercept`.

    nibabel is used for the header only: it recomputes the scaling of images that are built from an
    array, and writes the time to gzip headers.
    """
    header = nib.Nifti1Header()
    header.set_data_shape(stored.shape)
    header.set_data_dtype(stored.dtype)
    header.set_sform(affine, code="scanner")
    header.set_qform(affine, code="scanner")
    header.set_xyzt_units("mm")
    header.set_data_offset(VOXEL_OFFSET)
    header.set_slope_inter(slope, intercept)
    head = header.binaryblock.ljust(VOXEL_OFFSET, b"\0")
    path.write_bytes(gzip.compress(head + stored.tobytes(order="F"), GZIP_LEVEL, mtime=0))


@cache
def load_template() -> Template:
    """Read the template from nilearn's wheel, without importing nilearn."""
    folder = template_folder()
    paths = [folder / TEMPLATE_FILE.format(name) for name in ("t1", "gm", "wm")]
    images = [nib.Nifti1Image.from_filename(path) for path in paths]
    t1, grey, white = (np.asarray(image.dataobj, dtype=np.float32) for image in images)
    return Template(t1, grey, white, np.asarray(images[0].affine), bounding_box_centre(t1 > 0))


def bounding_box_centre(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """The centre, in voxels, of the smallest box that holds every true voxel of (I, J, K)."""
    others = ((1, 2), (0, 2), (0, 1))
    inside = [np.flatnonzero(mask.any(axis=axes)) for axes in others]
    return np.array([(where[0] + where[-1]) / 2 for where in inside])


def template_folder() -> Path:
    """The folder of the template's files."""
    spec = importlib.util.find_spec("nilearn")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"the MNI152 template comes with nilearn; {NILEARN_HINT}")
    folder = Path(spec.origin).parent / "datasets" / "data"
    if not (folder / TEMPLATE_FILE.format("t1")).is_file():
        raise FileNotFoundError(f"no MNI152 template in {folder}; {NILEARN_HINT} --force-reinstall")
    return folder


@click.command()
@click.argument("destination", type=click.Path(path_type=Path, file_okay=False))
@click.option("--subjects", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--zoom",
    type=click.FloatRange(min=0.05, max=10),
    default=1.0,
    show_default=True,
    help="Multiplies the number of voxels along each axis; 0.25 gives small volumes for tests.",
)
@click.option("--jobs", "-j", type=click.IntRange(min=1), help="Processes; by default one for each core.")
def main(destination: Path, subjects: int, seed: int, zoom: float, jobs: int | None) -> None:
    """Make a NIfTI cohort in DESTINATION from the MNI152 template."""
    plans = plan_cohort(destination, subjects=subjects, seed=seed, zoom=zoom)
    try:
        with (
            closing(run_plans(plans, jobs=jobs or os.cpu_count() or 1)) as done,
            click.progressbar(done, length=subjects, label="Making subjects") as bar,
        ):
            total_bytes = sum(file.stat().st_size for folder in bar for file in folder.iterdir())
    except OSError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{subjects} subjects, {total_bytes / 2**20:.1f} MiB in {destination}")


if __name__ == "__main__":
    main()
