"""What a worker of the queue does: a draw in, its transformed patches out."""

from __future__ import annotations

import contextlib
import random
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from zpatch.cohort import Subject
from zpatch.geometry import PatchLocation
from zpatch.patch import Patch
from zpatch.randomness import Purpose, rng
from zpatch.samplers import GridSampler, PatchSampler, RandomSampler, read_patches

Transform = Callable[[Patch], Patch]


@dataclass(frozen=True, slots=True)
class Draw:
    """A task for a worker: patches ``first`` to ``stop`` of a subject in an epoch."""

    epoch: int
    subject: int
    first: int
    stop: int


@dataclass(frozen=True, slots=True)
class FailedDraw:
    """What a worker says instead of patches."""

    subject: str
    reason: str
    traceback: str


class SubjectDraws(Dataset[list[Patch] | FailedDraw]):
    """What a worker does: a draw in, its transformed patches out."""

    def __init__(
        self,
        subjects: Sequence[Subject],
        sampler: PatchSampler,
        patches_per_volume: int,
        transform: Transform | None,
        dtype: torch.dtype,
        seed: int,
    ) -> None:
        self._subjects = subjects
        self._sampler = sampler
        self._patches_per_volume = patches_per_volume
        self._transform = transform
        self._dtype = dtype
        self._seed = seed

    def __getitem__(self, draw: Draw) -> list[Patch] | FailedDraw:
        subject = self._subjects[draw.subject]
        try:
            return self._patches(subject, draw)
        except Exception as error:  # whatever it is, it must reach the caller with its subject
            return FailedDraw(subject.name, f"{type(error).__name__}: {error}", traceback.format_exc())

    def _patches(self, subject: Subject, draw: Draw) -> list[Patch]:
        if isinstance(self._sampler, GridSampler):
            grid = self._sampler.grid_of(subject)
            numbers = range(draw.first, draw.stop)
            patches = self._sampler.read(subject, [grid.location(number) for number in numbers])
        else:
            patches = read_patches(subject, self._drawn(self._sampler, subject, draw))
        return [self._finished(patch, draw, number) for number, patch in enumerate(patches, start=draw.first)]

    def _drawn(self, sampler: RandomSampler, subject: Subject, draw: Draw) -> list[PatchLocation]:
        generator = rng(self._seed, draw.epoch, draw.subject, purpose=Purpose.LOCATIONS)
        return sampler.locations(subject, self._patches_per_volume, generator)[draw.first : draw.stop]

    def _finished(self, patch: Patch, draw: Draw, number: int) -> Patch:
        cast = {
            name: image.data.to(self._dtype)
            for name, image in patch.images.items()
            if image.kind != "label" and not image.data.is_complex()
        }
        patch = patch.with_data(**cast)
        if self._transform is None:
            return patch
        stream = rng(self._seed, draw.epoch, draw.subject, number, purpose=Purpose.TRANSFORM)
        with seeded_globals(int(stream.integers(2**63))):
            return self._transform(patch)


def packed(patches: list[Patch] | FailedDraw) -> list[Patch] | FailedDraw:
    """Patches as a worker sends them: arrays in memory order, which take no file descriptor each."""
    if isinstance(patches, FailedDraw):
        return patches
    return [patch.map_data(_as_array) for patch in patches]


def unpacked(patches: list[Patch] | FailedDraw) -> list[Patch] | FailedDraw:
    """The patches of a worker as tensors again."""
    if isinstance(patches, FailedDraw):
        return patches
    return [patch.map_data(_as_tensor) for patch in patches]


def _as_array(data: torch.Tensor) -> Any:
    if data.dtype == torch.bfloat16:
        return data.detach()  # numpy has no such type; torch sends it its own way
    return _memory_order(data.detach()).contiguous().numpy()


def _as_tensor(data: Any) -> torch.Tensor:
    return data if isinstance(data, torch.Tensor) else _memory_order(torch.from_numpy(data))


def _memory_order(data: torch.Tensor) -> torch.Tensor:
    """(C, I, J, K) as (c, z, y, x), and back; whatever else a transform made, as it is."""
    return data.permute(0, 3, 2, 1) if data.ndim == 4 else data


@contextlib.contextmanager
def seeded_globals(seed: int) -> Iterator[None]:
    """Seed torch's, numpy's and Python's global generators, and put them back as they were."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])
