"""The options of a queue, in one list: what a user may choose, and which choices are refused."""

from __future__ import annotations

import dataclasses
import operator
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from zpatch.errors import OptionError, QueueError
from zpatch.images.subject import Subject
from zpatch.loading.draw_reader import Transform
from zpatch.loading.epoch_plan import Share, Uneven
from zpatch.loading.worker_pool import check_processes

IMAGE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueOptions:
    """What a user may choose of a queue; see ``Queue``.

    ``max_length`` is the number of patches in the buffer at most. ``patches_per_volume`` patches are taken of
    each subject in each epoch (all of them with a GridSampler). ``num_workers`` processes read them; 0 reads
    in this process. ``shuffle_subjects`` and ``shuffle_patches`` shuffle the order of subjects and the
    patches in the buffer. ``transform`` is called with each patch. ``subject_sampler`` gives the order of
    subjects by their numbers, anew for each epoch. ``seed`` chooses the stream.

    ``rank`` and ``world_size`` are those of this process; None takes them from torch.distributed.
    ``uneven`` says how an epoch that cannot be divided evenly is shared out: pad, drop or error.
    ``start_method`` is one of multiprocessing's; None is fork on Linux, spawn elsewhere. A worker that gives
    nothing for ``timeout`` seconds has hung. ``dtype`` is the type of images; None is their stored type.
    """

    max_length: int = 300
    patches_per_volume: int = 10
    num_workers: int = 0
    shuffle_subjects: bool = True
    shuffle_patches: bool = True
    transform: Transform | None = None
    subject_sampler: Iterable[int] | None = None
    seed: int = 0
    rank: int | None = None
    world_size: int | None = None
    uneven: Uneven = "pad"
    start_method: str | None = None
    timeout: float = 120
    dtype: torch.dtype | None = torch.float32

    def __post_init__(self) -> None:
        for name, least in (("max_length", 1), ("patches_per_volume", 1), ("num_workers", 0), ("seed", None)):
            value = as_integer(name, getattr(self, name))
            if least is not None and value < least:
                raise OptionError(f"{name} must be at least {least}, not {value}")
            object.__setattr__(self, name, value)
        if self.subject_sampler is not None and self.shuffle_subjects:
            raise OptionError("a subject_sampler decides the order; say shuffle_subjects=False with it")
        if self.subject_sampler is not None and (self.rank, self.world_size) != (None, None):
            raise OptionError("a subject_sampler deals out subjects; leave out rank and world_size with it")
        if (self.rank is None) != (self.world_size is None):
            raise OptionError("rank and world_size go together; say both or neither")
        if self.dtype not in IMAGE_DTYPES:
            raise OptionError(f"dtype must be one of {', '.join(map(str, IMAGE_DTYPES))}, not {self.dtype}")
        check_processes(self.start_method, self.timeout)

    @property
    def asks_torch_distributed(self) -> bool:
        """Whether the share of this process is found in torch.distributed."""
        return self.subject_sampler is None and self.rank is None

    def share(self) -> Share:
        """The share of this process: by its options, else by torch.distributed, else all of each epoch.

        With a ``subject_sampler``, which deals subjects out itself, it is all that the sampler gives.
        """
        if self.subject_sampler is not None:
            return Share()
        if self.rank is not None and self.world_size is not None:
            return Share(self.rank, self.world_size, self.uneven)
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized():
            return Share(distributed.get_rank(), distributed.get_world_size(), self.uneven)
        return Share(uneven=self.uneven)

    def check_share(self, share: Share) -> None:
        """Refuse a share that was found before torch.distributed had ranks to share subjects with."""
        if not self.asks_torch_distributed:
            return
        now = self.share()
        if now != share and now.world_size > 1:
            raise QueueError(
                f"the queue was made as rank {share.rank} of {share.world_size}, and this is rank "
                f"{now.rank} of {now.world_size}; make the queue after init_process_group"
            )

    def check_subject_sampler(self, num_subjects: int) -> None:
        """Refuse a ``subject_sampler`` that can be iterated only once, or that gives unknown subjects."""
        if self.subject_sampler is None:
            return
        if iter(self.subject_sampler) is self.subject_sampler:
            raise OptionError("a subject_sampler is iterated anew for each epoch; give a list, or a Sampler")
        given = list(self.subject_sampler)
        if not given:
            raise OptionError("the subject_sampler gives no subject")
        for subject in given:
            if not 0 <= subject < num_subjects:
                raise OptionError(
                    f"subject_sampler gives {subject} of {num_subjects} subjects; they count from 0"
                )

    def as_keywords(self) -> dict[str, Any]:
        """The options by their names, as ``Queue`` takes them."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def as_integer(name: str, value: Any) -> int:
    """The integer that a value is, of any integer type; an OptionError that names it otherwise."""
    try:
        return operator.index(value)
    except TypeError:
        raise OptionError(f"{name} must be an integer, not {value!r}") from None


def check_subjects(subjects: Any) -> None:
    """Refuse what is not a sequence of subjects: one subject, the path of a store, an iterator."""
    if isinstance(subjects, Subject):
        raise OptionError(
            f"a queue needs a list of subjects, and {subjects.name!r} is a single one; "
            f"say Queue([subject], ...)"
        )
    if isinstance(subjects, str | os.PathLike):
        path = os.fspath(subjects)
        raise OptionError(
            f"a queue needs a list of subjects, and {path!r} is a path; "
            f"say Queue(zpatch.Cohort({path!r}), ...)"
        )
    if not (hasattr(subjects, "__len__") and hasattr(subjects, "__getitem__")):
        raise OptionError(
            f"a queue needs a list of subjects, or another sequence of them, not {type(subjects).__name__}; "
            f"say Queue(list(subjects), ...)"
        )
    if not len(subjects):
        raise OptionError("a queue needs at least one subject")
