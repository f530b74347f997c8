#!/usr/bin/env python
"""Train a small U-Net on a zpatch store for a set time, and save it for `zpatch predict`.

    python scripts/train.py cohort.zarr unet.pt2 --seconds 60 --exclude sub-07 --exclude sub-08

The images must be called `t1` and the label maps `seg`, as `scripts/make_cohort.py` names them.
Beside the model, `unet.json` says how many patches it saw, and how fast.
"""

from __future__ import annotations

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

PATCH_SIZE = 48
BATCH_SIZE = 2
LABEL_PROBABILITIES = {0: 1, 1: 2, 2: 2}  # background is easy
PATCHES_PER_VOLUME = 16
MAX_LENGTH = 48
NUM_WORKERS = 2
LEARNING_RATE = 3e-3


@click.command()
@click.argument("store", type=click.Path(path_type=Path, exists=True))
@click.argument("model", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--seconds", type=click.FloatRange(min=1), default=60, show_default=True)
@click.option("--exclude", multiple=True, metavar="SUBJECT", help="Not to be trained on.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
def main(store: Path, model: Path, seconds: float, exclude: tuple[str, ...], seed: int) -> None:
    """Train on STORE and save the network as MODEL, a torch.export file (.pt2)."""
    torch.manual_seed(seed)
    cohort = zp.Cohort(store)
    subjects = [cohort[name] for name in cohort.names if name not in exclude]
    sampler = zp.LabelSampler(PATCH_SIZE, "seg", LABEL_PROBABILITIES)
    network = UNet(classes=len(LABEL_PROBABILITIES)).to(memory_format=torch.channels_last_3d)
    with zp.Queue(
        subjects,
        sampler,
        max_length=MAX_LENGTH,
        patches_per_volume=PATCHES_PER_VOLUME,
        num_workers=NUM_WORKERS,
        seed=seed,
    ) as queue:
        num_patches = fit(network, endless_batches(queue), seconds)
    save(network.eval(), model)
    report = {"patches": num_patches, "patch_size": PATCH_SIZE, "seconds": seconds}
    model.with_suffix(".json").write_text(json.dumps(report))


def endless_batches(queue: zp.Queue) -> Iterator[zp.PatchBatch]:
    """Batches of one epoch after another, each epoch of other patches."""
    loader = zp.SubjectsLoader(queue, batch_size=BATCH_SIZE, drop_last=True)
    for epoch in itertools.count():
        queue.set_epoch(epoch)
        yield from loader


def fit(network: UNet, batches: Iterator[zp.PatchBatch], seconds: float) -> int:
    """Train until the time is over, and return the number of patches seen."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE)
    steps = 0
    start = shown = time.monotonic()
    with click.progressbar(length=round(seconds), label="Training", item_show_func=lambda text: text) as bar:
        while (elapsed := time.monotonic() - start) < seconds:
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - elapsed / seconds) ** 0.9
            batch = next(batches)
            loss = functional.cross_entropy(network(batch.t1.data), batch.seg.data[:, 0].long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps += 1
            if (passed := int(time.monotonic() - shown)) > 0:
                shown += passed
                bar.update(passed, f"loss {loss.item():.2f}")
    return steps * BATCH_SIZE


def save(network: UNet, path: Path) -> None:
    """Export the network for batches of any length and patches of any size that it takes."""
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
