#!/usr/bin/env python
"""Train a small U-Net on several processes, each with its share of the subjects.

    torchrun --nproc-per-node 2 scripts/train_ddp.py cohort.zarr unet.pt --epochs 5

A queue takes its rank from torch.distributed. Images must be called `t1` and label maps `seg`; patches of
all subjects are resampled to one voxel size and orientation as they are read.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import click
import torch
from torch import distributed
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from train import on_one_grid
from unet import UNet

import zpatch as zp


def check_side(context: click.Context, option: click.Parameter, side: int) -> int:
    """Refuse a side of patches that the network cannot halve at each level."""
    if side % UNet.SIDE_MULTIPLE:
        raise click.BadParameter(f"{side} is not a multiple of {UNet.SIDE_MULTIPLE}, as the U-Net needs it")
    return side


@click.command()
@click.argument("store", type=click.Path(path_type=Path, exists=True))
@click.argument("weights", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--epochs", type=click.IntRange(min=1), default=5, show_default=True)
@click.option(
    "--patch-size",
    type=click.IntRange(min=8),
    default=48,
    show_default=True,
    callback=check_side,
    help=f"Voxels on each side, a multiple of {UNet.SIDE_MULTIPLE}.",
)
@click.option(
    "--spacing",
    type=click.FloatRange(min=0, min_open=True),
    default=1,
    show_default=True,
    help="The voxel size to train on, in mm.",
)
@click.option("--workers", type=click.IntRange(min=0), default=2, show_default=True, help="Of each rank.")
def main(store: Path, weights: Path, epochs: int, patch_size: int, spacing: float, workers: int) -> None:
    """Train on STORE and save the network's WEIGHTS."""
    has_gpu = torch.cuda.is_available()
    device = f"cuda:{os.environ['LOCAL_RANK']}" if has_gpu else "cpu"
    distributed.init_process_group("nccl" if has_gpu else "gloo")
    torch.manual_seed(0)
    network = DistributedDataParallel(UNet().to(device))
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    sampler = zp.LabelSampler(patch_size, "seg", {0: 1, 1: 2, 2: 2})
    cohort = zp.Cohort(store).map(functools.partial(on_one_grid, spacing=spacing))
    with zp.Queue(cohort, sampler, patches_per_volume=8, num_workers=workers) as queue:
        loader = zp.SubjectsLoader(queue, batch_size=2, pin_memory=has_gpu, device=device)
        for epoch in range(epochs):
            queue.set_epoch(epoch)
            total = torch.zeros((), device=device)
            for batch in loader:
                loss = functional.cross_entropy(network(batch.t1.data), batch.seg.data[:, 0].long())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.detach() / len(loader)
            distributed.all_reduce(total)
            if distributed.get_rank() == 0:
                loss = total / distributed.get_world_size()
                click.echo(f"epoch {epoch}: {len(queue)} patches on each rank, loss {loss:.3f}")
    if distributed.get_rank() == 0:
        torch.save(network.module.state_dict(), weights)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
