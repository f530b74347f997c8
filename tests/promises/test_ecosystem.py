"""zpatch with tools for training: torch's DataLoader, torchdata, Lightning, accelerate, MONAI, torchrun."""

from __future__ import annotations

import csv
import os
import pickle
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from streams import items
from torch import nn
from torch.utils.data import DataLoader
from unet import UNet

import zpatch as zp

PATCH_SIZE = 16
TRAIN_DDP = Path(zp.__file__).parent.parent / "scripts" / "train_ddp.py"


def queue_of(cohort: zp.Cohort, **options: Any) -> zp.Queue:
    sampler = zp.LabelSampler(PATCH_SIZE, "seg", {0: 1, 1: 2, 2: 2})
    return zp.Queue(cohort, sampler, max_length=8, patches_per_volume=4, seed=3, **options)


def patches_in(batches: Any) -> list[Any]:
    """Subject, location and voxels of each patch of some batches."""
    return [
        (subject, location, data.numpy().tobytes())
        for batch in batches
        for subject, location, data in zip(
            batch.subjects, batch.patch_location, batch.t1.data.contiguous(), strict=True
        )
    ]


# torch


@pytest.mark.parametrize("workers", [0, 2])
def test_a_plain_dataloader_gives_the_batches_of_subjects_loader(cohort: zp.Cohort, workers: int) -> None:
    with queue_of(cohort, num_workers=workers) as queue:
        plain = DataLoader(queue, batch_size=3)
        assert len(plain) == 6
        found = patches_in(plain)
        queue.set_epoch(0)
        assert found == patches_in(zp.SubjectsLoader(queue, 3))


def test_a_grid_is_a_dataset_for_workers_of_a_dataloader(cohort: zp.Cohort) -> None:
    grid = zp.GridSampler(cohort[0], PATCH_SIZE, 4)
    loader = DataLoader(grid, batch_size=5, num_workers=2, collate_fn=zp.collate)
    assert [place for batch in loader for place in batch.patch_location] == grid.locations
    plain = [grid[n] for n in range(len(grid))]
    assert items(plain) == items(grid)


# torchdata


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torchdata's own
def test_a_stateful_dataloader_resumes_an_epoch(cohort: zp.Cohort) -> None:
    torchdata = pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is not installed")

    def loader_over(queue: zp.Queue) -> Any:
        return torchdata.StatefulDataLoader(queue, batch_size=4, collate_fn=zp.collate)

    with queue_of(cohort) as queue, queue_of(cohort, num_workers=2) as other:
        loader = loader_over(queue)
        batches = iter(loader)
        begun = [next(batches), next(batches)]
        state = pickle.dumps(loader.state_dict())
        rest = list(batches)
        resumed = loader_over(other)
        resumed.load_state_dict(pickle.loads(state))
        assert patches_in(resumed) == patches_in(rest)
    with queue_of(cohort) as queue:
        assert patches_in([*begun, *rest]) == patches_in(zp.SubjectsLoader(queue, 4))


# Statistics


class Writer:
    """As torch.utils.tensorboard's SummaryWriter, which needs tensorboard."""

    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars.append((tag, float(value), step))


def test_statistics_of_each_epoch_are_logged(cohort: zp.Cohort) -> None:
    writer = Writer()

    def log(stats: zp.QueueStats) -> None:
        writer.add_scalar("queue/waiting", stats.waiting, stats.epoch)
        writer.add_scalar("queue/transform", stats.transform, stats.epoch)

    with queue_of(cohort, num_workers=2, on_stats=log) as queue:
        for _ in range(3):
            for _ in zp.SubjectsLoader(queue, 4):
                pass
    steps = [(tag, step) for tag, _, step in writer.scalars]
    assert steps == [(f"queue/{name}", epoch) for epoch in range(3) for name in ("waiting", "transform")]
    assert all(0 <= value <= 1 for _, value, _ in writer.scalars)


def test_lightning_logs_statistics_of_each_epoch(lightning: Any, cohort: zp.Cohort, tmp_path: Path) -> None:
    class Mean(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def training_step(self, batch: zp.PatchBatch, number: int) -> torch.Tensor:
            return (self.weight * batch.t1.data.mean()).square()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-9)

    def log(stats: zp.QueueStats) -> None:
        trainer.logger.log_metrics({"waiting": stats.waiting, "patches": stats.patches}, stats.epoch)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice
        trainer = lightning.Trainer(
            max_epochs=2, accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, logger=lightning.pytorch.loggers.CSVLogger(tmp_path),
        )  # fmt: skip
        with queue_of(cohort, num_workers=2, on_stats=log) as queue:
            trainer.fit(Mean(), zp.SubjectsLoader(queue, batch_size=4))
    trainer.logger.save()
    [file] = tmp_path.rglob("metrics.csv")
    logged = list(csv.DictReader(file.read_text().splitlines()))
    assert [(int(row["step"]), float(row["patches"])) for row in logged] == [(0, 16), (1, 16)]


# Lightning


@pytest.fixture
def lightning() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("lightning", reason="Lightning is not installed")


def test_a_lightning_module_trains_on_a_data_module(
    lightning: Any, cohort_store: Path, tmp_path: Path
) -> None:
    class Brains(lightning.LightningDataModule):  # type: ignore[misc]
        """Patches for training from all subjects but the last, and its whole grid for validation."""

        def __init__(self, store: Path) -> None:
            super().__init__()
            self.store = store

        def setup(self, stage: str) -> None:
            cohort = zp.Cohort(self.store)
            self.queue = queue_of(cohort[:-1], num_workers=2)
            self.grid = zp.GridSampler(cohort[-1], 24)

        def train_dataloader(self) -> zp.SubjectsLoader:
            return zp.SubjectsLoader(self.queue, batch_size=6)

        def val_dataloader(self) -> zp.SubjectsLoader:
            return zp.SubjectsLoader(self.grid, batch_size=4)

        def teardown(self, stage: str) -> None:
            self.queue.close()

    class Segmentation(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.network = nn.Conv3d(1, 3, 3, padding=1)
            self.places: list[list[Any]] = []
            self.validated = 0

        def training_step(self, batch: zp.PatchBatch, number: int) -> torch.Tensor:
            self.places.append(list(zip(batch.subjects, batch.patch_location, strict=True)))
            logits = self.network(batch.t1.data / 1000)
            loss = nn.functional.cross_entropy(logits, batch.seg.data[:, 0].long())
            self.log("loss", loss, on_epoch=True)
            return loss

        def validation_step(self, batch: zp.PatchBatch, number: int) -> None:
            self.validated += batch.batch_size
            self.log("size", float(batch.batch_size))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module, brains = Segmentation(), Brains(cohort_store)
    before = module.network.weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice about loggers and workers, but for this
        warnings.filterwarnings("error", message=".*infer the `?batch_size")
        trainer = lightning.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
            default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module, datamodule=brains)
    assert trainer.global_step == len(module.places) == 4  # 12 patches in each epoch
    assert module.validated == 2 * len(brains.grid)
    sizes = [batch.batch_size for batch in brains.val_dataloader()]
    mean = sum(size**2 for size in sizes) / sum(sizes)  # each value weighs as many patches as its batch has
    assert trainer.callback_metrics["size"].item() == pytest.approx(mean)
    assert "loss_epoch" in trainer.callback_metrics
    assert not torch.equal(module.network.weight, before)
    with queue_of(zp.Cohort(cohort_store)[:-1]) as queue:
        epochs = [[(patch.subject, patch.location) for patch in queue] for _ in range(2)]
    assert [module.places[0] + module.places[1], module.places[2] + module.places[3]] == epochs


RANKS = """
import sys, warnings
import lightning, torch, zpatch as zp

class Segmentation(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = torch.nn.Conv3d(1, 3, 3, padding=1)

    def training_step(self, batch, number):
        loss = self.network(batch.t1.data / 1000).square().mean()
        self.log("loss", loss, sync_dist=True, on_epoch=True)
        return loss

    def validation_step(self, batch, number):
        self.log("size", float(batch.batch_size), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

class Brains(lightning.LightningDataModule):
    def setup(self, stage):
        cohort = zp.Cohort(sys.argv[1])
        self.queue = zp.Queue(cohort, zp.UniformSampler(16), patches_per_volume=4)
        self.grid = zp.GridSampler(cohort[0], 24)

    def train_dataloader(self):
        return zp.SubjectsLoader(self.queue, batch_size=4)

    def val_dataloader(self):
        return zp.SubjectsLoader(self.grid, batch_size=4)

warnings.filterwarnings("error", message=".*infer the `?batch_size")
trainer = lightning.Trainer(
    max_epochs=1, accelerator="cpu", strategy="ddp", devices=2, logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
)
trainer.fit(Segmentation(), datamodule=Brains())
print(f"rank {trainer.global_rank}: {trainer.global_step} steps, {sorted(trainer.callback_metrics)}")
"""


def test_lightning_logs_on_two_ranks(lightning: Any, cohort_store: Path, tmp_path: Path, full: bool) -> None:
    if not full:
        pytest.skip("two processes that import Lightning need --full")
    program = tmp_path / "train.py"
    program.write_text(RANKS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ran = subprocess.run(
        [*torchrun, str(program), str(cohort_store)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=100,
        cwd=tmp_path,
    )
    assert ran.returncode == 0, ran.stderr
    for rank in range(2):  # 4 subjects of 4 patches, shared by two
        assert f"rank {rank}: 2 steps, ['loss', 'loss_epoch', 'loss_step', 'size']" in ran.stdout


# accelerate


@pytest.mark.filterwarnings("ignore:the loop refers to more:UserWarning")
@pytest.mark.parametrize("plain", [False, True])
def test_an_accelerate_loop_trains_and_finds_the_size_of_batches(cohort: zp.Cohort, plain: bool) -> None:
    """It leaves a SubjectsLoader as it is, whose queue knows its rank; of a DataLoader it makes its own."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    loading = accelerate.utils.DataLoaderConfiguration(dispatch_batches=False)
    accelerator = accelerate.Accelerator(
        cpu=True, gradient_accumulation_steps=2, dataloader_config=loading if plain else None
    )
    network = nn.Conv3d(1, 3, 3, padding=1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    with queue_of(cohort) as queue:
        loader = (DataLoader if plain else zp.SubjectsLoader)(queue, batch_size=4)
        network, optimizer, loader = accelerator.prepare(network, optimizer, loader)
        sizes, seen = [], []
        for batch in loader:
            sizes.append(accelerate.utils.find_batch_size(batch))
            seen.append(batch)
            with accelerator.accumulate(network):
                logits = network(batch.t1.data / 1000)
                accelerator.backward(nn.functional.cross_entropy(logits, batch.seg.data[:, 0].long()))
                optimizer.step()
                optimizer.zero_grad()
        queue.set_epoch(0)
        assert patches_in(seen) == patches_in(zp.SubjectsLoader(queue, 4))
    assert sizes == [4] * 4
    moved = accelerate.utils.send_to_device(seen[0], "meta")
    assert isinstance(moved, zp.PatchBatch)
    assert moved.t1.data.device.type == "meta"


# MONAI


def test_a_monai_trainer_trains_on_a_queue(cohort: zp.Cohort) -> None:
    engines = pytest.importorskip("monai.engines", reason="MONAI is not installed")
    pytest.importorskip("ignite", reason="ignite is not installed")
    network = nn.Conv3d(1, 3, 3, padding=1)
    before = network.weight.detach().clone()

    def image_and_label(batch: zp.PatchBatch, device: Any, non_blocking: bool, **_: Any) -> Any:
        batch = batch.to(device, non_blocking=non_blocking)
        return batch.t1.data / 1000, batch.seg.data[:, 0].long()

    with queue_of(cohort) as queue:
        trainer = engines.SupervisedTrainer(
            device=torch.device("cpu"),
            max_epochs=2,
            train_data_loader=zp.SubjectsLoader(queue, batch_size=4),
            network=network,
            optimizer=torch.optim.SGD(network.parameters(), lr=0.1),
            loss_function=nn.CrossEntropyLoss(),
            prepare_batch=image_and_label,
        )
        trainer.run()
    assert trainer.state.iteration == 8
    assert not torch.equal(network.weight, before)


# torchrun


def test_the_example_trains_on_two_ranks(cohort_store: Path, tmp_path: Path, full: bool) -> None:
    if not full:
        pytest.skip("torchrun runs in the quick run with test_ranks.py; the example needs --full")
    weights = tmp_path / "unet.pt"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--epochs", "2", "--patch-size", "16", "--spacing", "4", "--workers", "1"]
    process = subprocess.Popen(
        [*torchrun, str(TRAIN_DDP), str(cohort_store), str(weights), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=100)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    assert process.returncode == 0, errors
    losses = re.findall(r"epoch \d: 16 patches on each rank, loss (\d\.\d+)", output)
    assert len(losses) == 2  # 4 subjects, 2 for each rank, 8 patches from each; printed by one rank only
    assert float(losses[1]) < float(losses[0])
    UNet().load_state_dict(torch.load(weights))
