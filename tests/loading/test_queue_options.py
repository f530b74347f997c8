"""The options of a queue: one list, which checks itself."""

from __future__ import annotations

import dataclasses
import inspect

import numpy as np
import pytest
import torch

import zpatch as zp
from zpatch.epochs.epoch_plan import Share
from zpatch.errors import OptionError
from zpatch.loading.queue_options import QueueOptions


def test_a_queue_takes_each_option_by_its_name_and_with_its_default() -> None:
    parameters = inspect.signature(zp.Queue).parameters
    given = {name: parameters[name].default for name in list(parameters)[2:]}
    assert list(parameters)[:2] == ["subjects", "patch_sampler"]
    assert given == QueueOptions().as_keywords()


def test_a_queue_has_the_options_that_it_was_given() -> None:
    subject = zp.Subject(t1=zp.ScalarImage(np.zeros((8, 8, 8))))
    options = QueueOptions(max_length=7, seed=3, dtype=None, shuffle_patches=False)
    queue = zp.Queue([subject], zp.UniformSampler(4), **options.as_keywords())
    assert queue.options == options
    assert (queue.max_length, queue.seed, queue.dtype, queue.shuffle_patches) == (7, 3, None, False)
    with pytest.raises(AttributeError):
        queue.max_length = 8  # type: ignore[misc]


def test_integers_of_any_type_are_made_integers() -> None:
    options = QueueOptions(max_length=np.int32(7), seed=np.int64(3))  # type: ignore[arg-type]
    assert [type(n) for n in (options.max_length, options.seed)] == [int, int]
    assert dataclasses.replace(options, seed=4).seed == 4
    with pytest.raises(OptionError, match=r"max_length must be an integer, not 2\.5"):
        dataclasses.replace(options, max_length=2.5)


def test_the_share_is_given_or_found_in_torch_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    given, found = QueueOptions(rank=1, world_size=3, uneven="drop"), QueueOptions()
    sampled = QueueOptions(subject_sampler=[0], shuffle_subjects=False)
    assert (given.share(), found.share(), sampled.share()) == (Share(1, 3, "drop"), Share(), Share())
    for name, value in (("is_initialized", True), ("get_rank", 1), ("get_world_size", 2)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    assert (given.share(), found.share(), sampled.share()) == (Share(1, 3, "drop"), Share(1, 2), Share())
