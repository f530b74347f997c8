"""Inputs of ``zpatch predict`` that take more than a name: statistics, a mask in a file, reductions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from zpatch.cli.progress import Progress, say
from zpatch.runtime.byte_sizes import format_bytes

if TYPE_CHECKING:
    from zpatch.blending.reduction import Reduction, Reductions
    from zpatch.digests import Json
    from zpatch.images.image import Image
    from zpatch.images.subject import Subject

MASK, AUTO = "mask", "auto"
STAND_INS = {"mean": 0.0, "std": 2.0, "percentile_0_5": 0.0, "percentile_99_5": 2.0}  # any, but not 0 and 1


class StatisticsPasses:
    """Computes the statistics of images that have none, and says so before; in a dry run, only notes it.

    ``names`` are the images that it was asked for, and ``notes`` the lines about them.
    """

    def __init__(self, *, is_made: bool) -> None:
        self._is_made = is_made
        self.names: list[str] = []
        self.notes: list[str] = []

    def measure(self, image: Image, name: str) -> Json:
        """The statistics of an image; in a dry run, others: its plan depends on their being there only."""
        from zpatch.images.normalization import computed_statistics

        voxel_bytes = image.source.dtype.itemsize
        total = math.prod(image.shape) * voxel_bytes
        size = format_bytes(total)
        note = f"{name} has no statistics stored: they are computed first, reading its {size} once"
        self.names.append(name)
        self.notes.append(note)
        if not self._is_made:
            return dict(STAND_INS)
        say(note)
        with Progress("computing statistics", total) as progress:
            return computed_statistics(image, lambda voxels: progress(voxels * voxel_bytes))


def with_mask(
    subjects: Sequence[Subject], mask: str | None, tissue: str | None = None
) -> tuple[Sequence[Subject], str | None]:
    """The subjects, and the name of their mask; a mask in a file becomes an image of the one subject.

    ``tissue`` is the mask of a slide, or ``auto``, which finds it.
    """
    from zpatch.images.image import LabelMap
    from zpatch.images.tissue_map import tissue_map

    if mask is not None and tissue is not None:
        raise click.UsageError("--mask and --tissue both say where patches are run; say one of them")
    if tissue == AUTO:
        slide = next(image for image in subjects[0].images.values() if image.kind == "scalar")
        found = tissue_map(slide)
        say(f"tissue: {found.data.mean():.0%} of the slide")
        return [subjects[0].with_images(tissue=found)], "tissue"
    mask = tissue or mask
    if mask is None or mask in subjects[0].images:
        return subjects, mask
    if not Path(mask).exists():
        if len(Path(mask).parts) == 1 and not Path(mask).suffix:
            return subjects, mask  # a name that no subject has: said with the names that there are
        raise click.BadParameter(
            f"{mask} is neither an image of {subjects[0].name} ({', '.join(subjects[0].images)}) nor a file",
            param_hint="--mask",
        )
    if mask.lower().endswith(".nii.gz"):
        raise click.BadParameter(
            f"{mask} is compressed, so that boxes cannot be read from it: unpack it with 'gunzip -k {mask}', "
            f"and name {mask[:-3]}",
            param_hint="--mask",
        )
    if len(subjects) > 1:
        raise click.BadParameter(
            f"{mask} is a file, and there are {len(subjects)} subjects: name an image that each of them has, "
            f"or choose one subject with --include",
            param_hint="--mask",
        )
    name = "mask_file" if MASK in subjects[0].images else MASK
    return [subjects[0].with_images(**{name: LabelMap(Path(mask))})], name


def only_image(subject: Subject) -> str:
    """The name of the only intensity image of a subject; a usage error if there are several."""
    scalar = [name for name, image in subject.images.items() if image.kind == "scalar"]
    if len(scalar) != 1:
        raise click.UsageError(
            f"choose an --image to predict from; {subject.name} has {', '.join(subject.images)}"
        )
    return scalar[0]


def reductions(texts: Sequence[str]) -> Reductions:
    """One reduction for all outputs, or one for each: ``OUTPUT=HOW``."""
    named = [text.rpartition("=") for text in texts]
    if len(named) == 1 and not named[0][1]:
        return _reduction(texts[0])
    names = [name for name, _, _ in named]
    if "" in names or len(set(names)) < len(names):
        raise click.BadParameter(
            f"{' '.join(texts)}: give one for all outputs, or one for each as OUTPUT=HOW",
            param_hint="--reduce",
        )
    return {name: _reduction(how) for name, _, how in named}


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
