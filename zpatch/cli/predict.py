"""``zpatch predict``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zpatch.cli import EXIT_SOME_FAILED
from zpatch.cli.options import (
    STORE,
    Bytes,
    Micrometres,
    Millimetres,
    Numbers,
    Voxels,
    cluster_timeout_option,
    exclude_option,
    in_flags,
    include_option,
    json_option,
    overwrite_option,
    talk_options,
)
from zpatch.cli.prediction_inputs import StatisticsPasses, only_image, reductions, with_mask
from zpatch.cli.progress import Progress, clock, print_json, say
from zpatch.errors import one_line
from zpatch.runtime.byte_sizes import format_bytes

if TYPE_CHECKING:
    from zpatch.planning.prediction_plan import PredictionPlan
    from zpatch.prediction.stage_times import StageTimes


@click.command("predict", short_help="Run a network over every subject, patch by patch.")
@click.argument("store", type=STORE)
@click.argument("output", type=STORE)
@click.option(
    "--model",
    required=True,
    metavar="MODEL",
    help="package.module:factory (called without arguments), a torch.export file (.pt2) or TorchScript. "
    "A network is a program: load none that you do not trust.",
)
@click.option(
    "--image", multiple=True, metavar="NAME",
    help="The image to predict from, if there are several; may be repeated to stack images as channels.",
)  # fmt: skip
@click.option(
    "--axes", metavar="LETTERS", help="Axes of a Zarr array that has no names for them, slowest first: yxc."
)
@click.option(
    "--time",
    type=click.IntRange(0),
    metavar="N",
    help="The time point to predict, from 0: of OME-Zarr or Zarr.",
)
@click.option(
    "--channel", "channels", type=Numbers(), multiple=True, metavar="N",
    help="Feed only this channel of OME-Zarr or Zarr, from 0; several, in this order, as 0,2.",
)  # fmt: skip
@click.option(
    "--mpp", type=Micrometres(), metavar="UM",
    help="Micrometres per pixel that it was trained on, of a slide: 0.5, or 0.5x0.25 along x and y.",
)  # fmt: skip
@click.option("--level", type=click.IntRange(0), metavar="N", help="The level of a slide, 0 for the finest.")
@click.option(
    "--slide-mpp", type=Micrometres(), metavar="UM",
    help="Micrometres per pixel of the finest level, where the slide states none or a wrong one.",
)  # fmt: skip
@click.option(
    "--model-axes",
    metavar="LETTERS",
    show_default="xyz, of slides yx",
    help="The spatial axes that the network is fed, in its order: zyx if it was trained on (z, y, x) arrays "
    "(tifffile, zarr, scikit-image, nnU-Net), yx if it is 2-D, (B, C, H, W).",
)
@click.option(
    "--spacing", type=Millimetres(),
    help="The voxel size that it was trained on, in mm: 1.5, or 1x1x3 along I, J, K, after --orient.",
)  # fmt: skip
@click.option("--orient", "orientation", metavar="CODES", help="The orientation that it was trained on: RAS.")
@click.option("--align", metavar="NAME", help="The image on whose grid all others are put first.")
@click.option(
    "--output-grid", type=click.Choice(["native", "model"]), default="native", show_default=True,
    help="Where the output is: on the image's own grid, resampled before --reduce, or on the model's.",
)  # fmt: skip
@click.option(
    "--context", type=Numbers(), default=(), metavar="N,N",
    help="Stack coarser levels around the same centre as channels: 2,4 are 2 and 4 times as wide.",
)  # fmt: skip
@click.option(
    "--patch-size",
    type=Voxels(),
    required=True,
    help="One number or I,J,K, as 96 or 128,128,32; of slides, I,J.",
)
@click.option(
    "--overlap",
    "patch_overlap",
    type=Voxels(),
    default=0,
    show_default=True,
    help="Even, smaller than the patch.",
)
@click.option(
    "--blend",
    "overlap_mode",
    type=click.Choice(["crop", "average", "hann", "gaussian"]),
    default="hann",
    show_default=True,
    help="How overlapping patches are blended.",
)
@click.option(
    "--reduce",
    multiple=True,
    metavar="[OUTPUT=]HOW",
    default=("none",),
    show_default="none",
    help="none, argmax (a label map), softmax, sigmoid, or threshold:T; for several outputs, one for each: "
    "seg=argmax.",
)
@click.option(
    "--padding-mode",
    type=click.Choice(["constant", "edge", "reflect", "symmetric", "wrap"]),
    help="Pad half the overlap on each side; without it only volumes smaller than the patch are padded.",
)
@click.option(
    "--normalize",
    type=click.Choice(["zscore", "clip"]),
    help="Scale each image by its statistics: (value - mean) / std, or percentiles 0.5, 99.5 to 0, 1. Those "
    "that no store has are computed in one pass before.",
)
@click.option(
    "--mask", metavar="NAME|FILE",
    help="An image of the subjects, or for one subject a .nii or Zarr: patches wholly where it is 0 "
    "are not run.",
)  # fmt: skip
@click.option(
    "--tissue", metavar="auto|NAME|FILE",
    help="The mask of a slide: found by the saturation of its colours (auto), or as --mask, on any grid.",
)  # fmt: skip
@click.option("--fill", type=float, default=0, show_default=True, help="The value where no patch is run.")
@click.option(
    "--strict", is_flag=True,
    help="Stop at the first output that is NaN or infinite; without it such voxels are counted.",
)  # fmt: skip
@click.option("--tta", is_flag=True, help="Average the network over all flips of each patch.")
@click.option("--batch-size", type=click.IntRange(1), default=1, show_default=True, help="Patches at a time.")
@click.option(
    "--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ...; auto prefers a GPU."
)
@click.option("--amp", is_flag=True, help="Run the network in torch's automatic mixed precision.")
@click.option("-j", "--jobs", type=click.IntRange(1), default=1, show_default=True, help="Local processes.")
@click.option("--scheduler", metavar="WHERE", help="Run on a Dask cluster: tcp://... or a scheduler file.")
@cluster_timeout_option
@click.option(
    "--max-memory",
    type=Bytes(),
    help="A limit for all processes together, with the network: run some patches twice, or refuse. '2 GiB'.",
)
@click.option(
    "--keep-going/--stop-at-first", default=True, show_default=True,
    help="When a subject fails, predict the others, or end at once.",
)  # fmt: skip
@click.option(
    "--pyramid/--no-pyramid", default=None,
    help="Write coarser levels too, for viewers, until no side is over 64 voxels; also to a finished output. "
    "On for slides, off for volumes.",
)  # fmt: skip
@include_option
@exclude_option
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print the plan, how long it takes and what is done already; write nothing.",
)
@click.option("--no-resume", is_flag=True, help="Refuse an unfinished output instead of resuming it.")
@overwrite_option
@click.option(
    "--verify", is_flag=True,
    help="Compare every byte of a finished output, not only lengths, and mend what is damaged.",
)  # fmt: skip
@json_option
@talk_options
def predict_command(
    store: Path,
    output: Path,
    model: str,
    axes: str | None,
    time: int | None,
    channels: tuple[tuple[int, ...], ...],
    mpp: tuple[float, float] | None,
    level: int | None,
    slide_mpp: tuple[float, float] | None,
    tissue: str | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    dry_run: bool,
    no_resume: bool,
    json: bool,
    **given: Any,
) -> int:
    """Run a network over every subject of STORE and write its blended output into a store OUTPUT.

    STORE may also be one image: a slide (SVS, NDPI, OME-TIFF, ...), an uncompressed .nii, .mha or .nrrd,
    OME-Zarr or a Zarr array. If it has time points, choose one with --time; --channel chooses channels, --mpp
    or --level a level of a slide.

    THE NETWORK IS FED (x, y, z): a batch (B, C, x, y, z) of the type of its parameters. If it was trained on
    (z, y, x) arrays, say --model-axes zyx. It returns a batch in the same axes, stored as the image
    'prediction', or a dict of batches, stored under their keys.

    No volume is ever loaded whole, and each shard of the output is written once. After an interruption the
    same command resumes the prediction; if files of OUTPUT are lost or damaged, it computes those shards
    again. A subject that is damaged, or on which the network fails, is left out, with one line that says why;
    the others are predicted and the exit code is 3.

    At its end a line says where the time went: the seconds of all tasks, and the shares of reading, network,
    blending, reducing, writing and waiting. Reading and writing go on beside the network, so the shares may
    be more than the whole; --json has the seconds of each.

    A tile of a slide that is damaged is read as 0 and counted, and the exit code is 3; --strict stops there.

    \b
    Examples:
      zpatch predict cohort.zarr out.zarr --model net.pt2 --image t1 \\
          --patch-size 128 --overlap 32 --reduce argmax
      zpatch predict cohort.zarr out.zarr --model mypackage.nets:unet --image t1 --image flair \\
          --patch-size 96,96,64 --overlap 16 --blend gaussian --device cuda --amp
      zpatch predict cohort.zarr out.zarr --model net.pt2 --image ct --spacing 1.5 --orient RAS \\
          --patch-size 128 --overlap 64 --reduce argmax
      zpatch predict case.svs out.zarr --model net.pt2 --mpp 0.5 --patch-size 1024 \\
          --overlap 128 --tissue auto --reduce argmax
      zpatch predict slide.ome.zarr out.zarr --model mypackage.nets:stain \\
          --patch-size 1024,1024,1 --overlap 64,64,0 --model-axes yx --jobs 4
      zpatch predict movie.ome.zarr out.zarr --model net.pt2 --time 3 --channel 0,2 \\
          --patch-size 96 --normalize zscore --mask tissue.zarr
    """
    from zpatch.images.open_subjects import open_subjects
    from zpatch.images.slide_image import SlideOptions
    from zpatch.networks.model_files import ModelName, load_model
    from zpatch.networks.network import Network
    from zpatch.planning.model_inputs import are_slides
    from zpatch.planning.planning import plan_prediction
    from zpatch.planning.prediction_options import PredictOptions
    from zpatch.prediction.damaged_tiles import damaged_text
    from zpatch.prediction.prediction_run import begun_shards, check_output, patches_to_run, run_prediction
    from zpatch.runtime.failures import Failure, Failures
    from zpatch.store.image_writer import not_finite_text
    from zpatch.store.store_writer import check_can_create

    check_can_create(output, overwrite=given["overwrite"], resume=not no_resume)
    chosen = [number for numbers in channels for number in numbers]
    slide = SlideOptions(mpp, level, slide_mpp)
    subjects = open_subjects(store, include, exclude, axes, time, chosen or None, slide)
    if not subjects:
        raise click.UsageError(f"no subject of {store} is left to predict")
    given["image"] = given["image"] or only_image(subjects[0])
    given["reduce"] = reductions(given["reduce"])
    subjects, given["mask"] = with_mask(subjects, given["mask"], tissue)
    names = [subject.name for subject in subjects]
    options = PredictOptions.of(resume=not no_resume, of_slides=are_slides(subjects), **given)
    check_output(output, subjects, options)
    network = Network.of(load_model(model), options, ModelName.of_spec(model))
    begun = {} if options.overwrite else begun_shards(output)
    plans: list[Any] = []

    def say_why(failure: Failure) -> None:
        if plans and len(subjects) > 1:  # else it is the error of the command
            say(f"failed: {in_flags(str(failure))}", always=True)

    failures = Failures(keep_going=options.keep_going, on_failure=say_why)
    passes = StatisticsPasses(is_made=not dry_run)
    plans += plan_prediction(
        network,
        subjects,
        options,
        begun=begun,
        failures=failures,
        estimate=dry_run,
        measure=passes.measure,
    )
    for failure in failures.found:
        say_why(failure)
    patches, peak = sum(plan.patches_run for plan in plans), max(plan.peak_bytes for plan in plans)
    whose = "process's" if plans[0].cost else "network's"
    say(f"{len(plans)} subjects, {patches} patches, {format_bytes(peak)} of memory beside the {whose} own")
    if dry_run:
        notes = [in_flags(network.axes.notice), *passes.notes]
        if not passes.names:
            left = patches_to_run(network, plans, output, options, subjects=names)
        else:  # a prediction is known by its inputs, which are normalised
            left = [plan.patches_run for plan in plans]
            if output.exists():
                notes.append(f"what is done already in {output} is not known before that")
        if json:
            common = {"model_axes": network.axes.letters, "statistics_computed": passes.names}
            figures = [
                {**plan.to_json(), **common, "patches_left": n, "network_seconds": plan.network_seconds(n)}
                for plan, n in zip(plans, left, strict=True)
            ]
            print_json(figures)
        else:
            click.echo("\n".join([*notes, *map(str, plans), *_forecast(plans, left)]))
        return EXIT_SOME_FAILED if failures.found else 0
    times: list[StageTimes] = []
    with Progress("predicting", patches, unit="patches") as progress:
        listeners: Any = {"failures": failures, "progress": progress, "on_times": times.append}
        predictions = run_prediction(network, plans, output, options, subjects=names, **listeners)
    say(f"time of all tasks: {times[0]}")
    records = predictions.store.records.values()
    if text := not_finite_text(records):
        click.echo(f"warning: {text}; --strict stops at the first", err=True)
    if damaged := damaged_text(records):
        click.echo(f"warning: {damaged}", err=True)
    if json:
        failed = [{"subject": f.subject, "reason": one_line(f.error)} for f in failures.found]
        not_finite = sum(record.stats.get("not_finite", 0) for record in records)
        done = {"store": str(output), "subjects": predictions.names, "patches": patches}
        seconds = times[0].to_json()
        print_json({**done, "voxels_not_finite": not_finite, "seconds": seconds, "failed": failed})
    else:
        click.echo(output)
    return EXIT_SOME_FAILED if failures.found or damaged else 0


def _forecast(plans: Sequence[PredictionPlan], left: Sequence[int]) -> list[str]:
    """What is done already, and how long the network takes for the patches that are ``left``."""
    from zpatch.runtime.tasks import core_count

    lines, seconds, first = [], 0.0, plans[0]
    for plan, to_run in zip(plans, left, strict=True):
        seconds += plan.network_seconds(to_run) / min(first.jobs, core_count())
        if done := plan.patches_run - to_run:
            lines.append(f"{plan.subject.name}: {done} of {plan.patches_run} patches are done already")
    return [
        *lines,
        f"the network takes {first.network_seconds(1):.2g} s for a batch of {first.batch_size}: about "
        f"{clock(seconds)} for {sum(left)} patches",
    ]
