#!/usr/bin/env python
"""Train a small U-Net on a zpatch store for a set time, and save it for `zpatch predict`.

    python scripts/train.py cohort.zarr unet.pt2 --seconds 60 --exclude sub-07 --exclude sub-08

The images must be called `t1` and the label maps `seg`, as `scripts/make_cohort.py` names them. All
patches have voxels of one size and orientation, to which they are resampled as they are read. Give
`zpatch predict` the same, as `--spacing 1 --orient RAS`; its output lies on the scan's own grid.
The file `unet.json` beside the model holds the number of patches and the time of the training.
"""

from __future__ import annotations

import functools
import itertools
import json
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import click
import torch
from torch.nn import functional
from unet import UNet

import zpatch as zp

ORIENTATION = "RAS"
PATCH_SIZE = 48
BATCH_SIZE = 2
LABEL_PROBABILITIES = {0: 1, 1: 2, 2: 2}  # background is easy
PATCHES_PER_VOLUME = 16
MAX_LENGTH = 48
NUM_WORKERS = 2
LEARNING_RATE = 5e-3
LEARNING_RATE_DECAY = 0.9
SLOW_STEPS_PER_S = 4  # slower machines train for longer,
PATIENCE = 3  # up to this many times the requested time
PERCENT = 100


@click.command()
@click.argument("store", type=click.Path(path_type=Path, exists=True))
@click.argument("model", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--seconds",
    type=click.FloatRange(min=1),
    default=60,
    show_default=True,
    help=f"How long to train; a slow machine takes up to {PATIENCE} times as long.",
)
@click.option("--exclude", multiple=True, metavar="SUBJECT", help="Not to be trained on.")
@click.option(
    "--spacing",
    type=click.FloatRange(min=0, min_open=True),
    default=1,
    show_default=True,
    help="The voxel size to train on, in mm.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
def main(
    store: Path, model: Path, seconds: float, exclude: tuple[str, ...], spacing: float, seed: int
) -> None:
    """Train on STORE and save the network as MODEL, a torch.export file (.pt2)."""
    torch.manual_seed(seed)
    cohort = zp.Cohort(store)
    if unknown := set(exclude) - set(cohort.names):
        raise click.BadParameter(
            f"no subject {', '.join(sorted(unknown))} in {store}", param_hint="--exclude"
        )
    trained = cohort.select([name for name in cohort.names if name not in exclude])
    sampler = zp.LabelSampler(PATCH_SIZE, "seg", LABEL_PROBABILITIES)
    network = UNet(classes=len(LABEL_PROBABILITIES)).to(memory_format=torch.channels_last_3d)
    with zp.Queue(
        trained.map(functools.partial(on_one_grid, spacing=spacing)),
        sampler,
        max_length=MAX_LENGTH,
        patches_per_volume=PATCHES_PER_VOLUME,
        num_workers=NUM_WORKERS,
        seed=seed,
    ) as queue:
        start = time.monotonic()
        num_patches = fit(network, endless_batches(queue), seconds)
        seconds_taken = time.monotonic() - start
    save(network.eval(), model)
    report = {"patches": num_patches, "patch_size": PATCH_SIZE, "seconds": seconds_taken}
    model.with_suffix(".json").write_text(json.dumps(report))


def on_one_grid(subject: zp.Subject, spacing: float) -> zp.Subject:
    """The subject in voxels of one size and orientation; nothing is computed until a patch is read."""
    return subject.oriented(ORIENTATION).resampled(spacing)


def endless_batches(queue: zp.Queue) -> Iterator[zp.PatchBatch]:
    """Batches of one epoch after another, with different patches in each epoch."""
    loader = zp.SubjectsLoader(queue, batch_size=BATCH_SIZE, drop_last=True)
    for epoch in itertools.count():
        queue.set_epoch(epoch)
        yield from loader


def fit(network: UNet, batches: Iterator[zp.PatchBatch], seconds: float) -> int:
    """Train until `share_done` is 1, and return the number of patches."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE)
    start = time.monotonic()
    steps, done = 0, 0.0
    with click.progressbar(length=PERCENT, label="Training", item_show_func=lambda text: text) as bar:
        while done < 1:
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - done) ** LEARNING_RATE_DECAY
            batch = next(batches)
            loss = functional.cross_entropy(network(batch.t1.data), batch.seg.data[:, 0].long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps += 1
            before, done = done, share_done(time.monotonic() - start, seconds, steps)
            if passed := int(done * PERCENT) - int(before * PERCENT):
                bar.update(passed, f"loss {loss.item():.2f}")
    return steps * BATCH_SIZE


def share_done(elapsed: float, seconds: float, steps: int) -> float:
    """The share of the training that is done, up to 1: of the time, or of the steps if they lag behind."""
    wanted_steps = SLOW_STEPS_PER_S * seconds
    return min(1.0, max(min(elapsed / seconds, steps / wanted_steps), elapsed / (PATIENCE * seconds)))


def save(network: UNet, path: Path) -> None:
    """Export the network for batches of any length, and for all patch sizes that it accepts."""
    sides = {
        axis: UNet.SIDE_MULTIPLE * torch.export.Dim(f"side_{axis}", min=1, max=256) for axis in (2, 3, 4)
    }
    dynamic = ({0: torch.export.Dim.DYNAMIC, **sides},)
    example = torch.zeros(2, 1, 32, 32, 32)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="No complete tensor found in the group")
        torch.export.save(torch.export.export(network, (example,), dynamic_shapes=dynamic), path)


if __name__ == "__main__":
    main()
