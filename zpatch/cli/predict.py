"""``zpatch predict``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from zpatch.cli.options import (
    STORE,
    Voxels,
    exclude_option,
    include_option,
    json_option,
    overwrite_option,
    print_json,
    say,
    talk_options,
)
from zpatch.cli.progress import Progress

if TYPE_CHECKING:
    from zpatch.inference import PredictionPlan
    from zpatch.reduction import Reduction


@click.command("predict", short_help="Run a network over every subject, patch by patch.")
@click.argument("store", type=STORE)
@click.argument("output", type=STORE)
@click.option(
    "--model",
    required=True,
    metavar="MODEL",
    help="package.module:factory (called without arguments), a torch.export file (.pt2) or TorchScript.",
)
@click.option(
    "--image", multiple=True, required=True, metavar="NAME",
    help="The image to predict from; several are stacked as channels, in this order.",
)  # fmt: skip
@click.option("--patch-size", type=Voxels(), required=True, help="One number or I,J,K, as 96 or 128,128,32.")
@click.option("--overlap", type=Voxels(), default=0, show_default=True, help="Even, smaller than the patch.")
@click.option(
    "--blend",
    type=click.Choice(["crop", "average", "hann", "gaussian"]),
    default="hann",
    show_default=True,
    help="How overlapping patches are blended.",
)
@click.option(
    "--reduce",
    metavar="HOW",
    default="none",
    show_default=True,
    help="none, argmax (a label map), softmax, sigmoid, or threshold:T.",
)
@click.option(
    "--padding-mode",
    type=click.Choice(["constant", "edge", "reflect", "symmetric", "wrap"]),
    help="Pad half the overlap on each side; without it only volumes smaller than the patch are padded.",
)
@click.option("--batch-size", type=click.IntRange(1), default=1, show_default=True, help="Patches at a time.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ...; auto takes a GPU.")
@click.option("--amp", is_flag=True, help="Run the network in torch's automatic mixed precision.")
@include_option
@exclude_option
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@overwrite_option
@json_option
@talk_options
def predict_command(
    store: Path,
    output: Path,
    model: str,
    image: tuple[str, ...],
    patch_size: int | tuple[int, ...],
    overlap: int | tuple[int, ...],
    blend: str,
    reduce: str,
    padding_mode: str | None,
    batch_size: int,
    device: str,
    amp: bool,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    dry_run: bool,
    overwrite: bool,
    json: bool,
) -> None:
    """Run a network over every subject of STORE and write its blended output into a new store OUTPUT.

    The network takes a float32 batch (B, C, I, J, K) and gives one of the same spatial shape, kept as the
    image 'prediction'; or a dict of such, kept under their keys. Nothing is ever loaded whole, and each
    chunk of the output is written once.

    \b
    Examples:
      zpatch predict cohort.zarr out.zarr --model net.pt2 --image t1 \\
          --patch-size 128 --overlap 32 --reduce argmax
      zpatch predict cohort.zarr out.zarr --model mypackage.nets:unet --image t1 --image flair \\
          --patch-size 96,96,64 --overlap 16 --blend gaussian --device cuda --amp
    """
    from zpatch.cohort import Cohort
    from zpatch.inference import load_model, plan_prediction, predict
    from zpatch.store_writer import check_can_create

    check_can_create(output, overwrite=overwrite)
    cohort = Cohort(store)
    chosen = cohort.matching(include, exclude)
    plans = plan_prediction(chosen, image, patch_size, overlap, padding_mode)
    patches = sum(len(plan.grid) for plan in plans)
    say(f"{len(plans)} subjects, {patches} patches")
    if dry_run:
        _print_plan(plans, json)
        return
    with Progress("predicting", patches, unit="patches") as progress:
        predictions = predict(
            load_model(model),
            chosen,
            output,
            image=image,
            patch_size=patch_size,
            patch_overlap=overlap,
            overlap_mode=blend,
            reduce=_reduction(reduce),
            batch_size=batch_size,
            device=device,
            amp=amp,
            padding_mode=padding_mode,
            overwrite=overwrite,
            progress=progress,
        )
    if json:
        print_json({"store": str(output), "subjects": predictions.names, "patches": patches})
    else:
        click.echo(output)


def _print_plan(plans: list[PredictionPlan], json: bool) -> None:
    rows = [
        {"subject": plan.subject.name, "shape": plan.grid.spatial_shape, "patches": len(plan.grid)}
        for plan in plans
    ]
    if json:
        print_json(rows)
        return
    for row in rows:
        click.echo(f"{row['subject']}: {row['shape']}, {row['patches']} patches")


def _reduction(text: str) -> Reduction:
    if text == "none":
        return None
    name, colon, limit = text.partition(":")
    if name != "threshold":
        return text
    try:
        return name, float(limit) if colon else 0.5
    except ValueError:
        raise click.BadParameter(f"{limit!r} is no number", param_hint="--reduce") from None
