"""The options of a queue, in one list: what a user may choose, and which choices are refused."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import get_worker_info

from zpatch.digests import Json
from zpatch.epochs.class_balance import ClassBalance
from zpatch.epochs.epoch_plan import Share, Uneven
from zpatch.epochs.stream_position import SHUFFLE, order_identity
from zpatch.epochs.subject_weights import GivenWeights, SubjectWeights, checked_weights, given_weights
from zpatch.errors import OptionError, QueueError
from zpatch.images.subject import Subject
from zpatch.loading.queue_stats import QueueStats
from zpatch.loading.queue_subjects import ON_BAD, AnyTransform, OnBad, fitted_sampler, subjects_of_queue
from zpatch.loading.shared_slots import MOST_WORKERS
from zpatch.loading.worker_pool import check_processes
from zpatch.sampling.patch_sampler import PatchSampler
from zpatch.sampling.randomness import Purpose, rng

IMAGE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueOptions:
    """What a user may choose of a queue; see ``Queue``.

    ``max_length`` is the number of patches in the buffer at most. ``patches_per_volume`` patches are taken of
    each subject in each epoch (all of them with a GridSampler). ``num_workers`` processes read them; 0 reads
    in this process. ``shuffle_subjects`` and ``shuffle_patches`` shuffle the order of subjects and the
    patches in the buffer. ``transform`` is called with each patch. ``subject_sampler`` gives the order of
    subjects by their numbers, anew for each epoch. ``seed`` chooses the stream. ``subject_weights`` and
    ``class_balance`` choose how often subjects come.

    ``rank`` and ``world_size`` are those of this process; None takes them from torch.distributed.
    ``uneven`` says how an epoch that cannot be divided evenly is shared out: pad, drop or error.
    ``on_bad`` says what becomes of subjects that no patch can be taken of: error or skip.
    ``start_method`` is one of multiprocessing's; None is fork on Linux, spawn elsewhere. A worker that gives
    nothing for ``timeout`` seconds has hung. ``dtype`` is the type of images; None is their stored type.
    ``on_stats`` is called with the ``QueueStats`` of each epoch as its last batch is handed out, in this
    process; not for an epoch that is broken off.
    """

    max_length: int = 300
    patches_per_volume: int = 10
    num_workers: int = 0
    shuffle_subjects: bool = True
    shuffle_patches: bool = True
    transform: AnyTransform | None = None
    subject_sampler: Iterable[int] | None = None
    seed: int = 0
    subject_weights: GivenWeights | None = None
    class_balance: Mapping[str, Mapping[int, float]] | None = None
    rank: int | None = None
    world_size: int | None = None
    uneven: Uneven = "pad"
    on_bad: OnBad = "error"
    start_method: str | None = None
    timeout: float = 120
    dtype: torch.dtype | None = torch.float32
    on_stats: Callable[[QueueStats], object] | None = None

    def __post_init__(self) -> None:
        for name, least in (("max_length", 1), ("patches_per_volume", 1), ("num_workers", 0), ("seed", None)):
            value = as_integer(name, getattr(self, name))
            if least is not None and value < least:
                raise OptionError(f"{name} must be at least {least}, not {value}")
            object.__setattr__(self, name, value)
        if self.num_workers > MOST_WORKERS:
            raise OptionError(f"num_workers must be at most {MOST_WORKERS}, not {self.num_workers}")
        if self.on_stats is not None and not callable(self.on_stats):
            raise OptionError(f"on_stats must be a function of QueueStats, not {self.on_stats!r}")
        if self.subject_sampler is not None and self.shuffle_subjects:
            raise OptionError("a subject_sampler decides the order; say shuffle_subjects=False with it")
        if self.subject_sampler is not None and (self.rank, self.world_size) != (None, None):
            raise OptionError("a subject_sampler deals out subjects; leave out rank and world_size with it")
        if (self.rank is None) != (self.world_size is None):
            raise OptionError("rank and world_size go together; say both or neither")
        if self.dtype not in IMAGE_DTYPES:
            raise OptionError(f"dtype must be one of {', '.join(map(str, IMAGE_DTYPES))}, not {self.dtype}")
        if self.on_bad not in ON_BAD:
            raise OptionError(f"on_bad must be one of {', '.join(ON_BAD)}, not {self.on_bad!r}")
        if self.on_bad == "skip" and self.subject_sampler is not None:
            raise OptionError("a subject_sampler gives numbers of subjects, which on_bad='skip' would change")
        self._check_weights()
        _check_transform(self.transform)
        check_processes(self.start_method, self.timeout)

    def _check_weights(self) -> None:
        """Refuse weights that are no numbers, and two ways at once to say how often subjects come."""
        ways = ("subject_weights", "class_balance", "subject_sampler")
        given = [name for name in ways if getattr(self, name) is not None]
        if len(given) > 1:
            raise OptionError(f"{' and '.join(given)} both say how often subjects come; say one of them")
        if self.class_balance is not None:
            ClassBalance.of(self.class_balance)
        if self.subject_weights is not None and not isinstance(self.subject_weights, Mapping):
            weights = checked_weights(self.subject_weights, "subject_weights")
            object.__setattr__(self, "subject_weights", tuple(weights.tolist()))

    def choose(
        self, subjects: Any, sampler: PatchSampler
    ) -> tuple[Sequence[Subject], PatchSampler, SubjectWeights | None]:
        """The subjects that patches are taken of, the sampler that draws them, and how often each comes."""
        sampler = fitted_sampler(subjects, sampler)
        balance = None if self.class_balance is None else ClassBalance.of(self.class_balance)
        checked = sampler if balance is None else balance.sampler(sampler, balance.shares)
        found, kept = subjects_of_queue(
            subjects, checked, self.transform, self.on_bad, lack_classes=balance is not None
        )
        if balance is not None:
            return found, *balance.over(found, sampler)
        if self.subject_weights is None:
            return found, sampler, None
        return found, sampler, given_weights(self.subject_weights, found, kept, len(subjects))

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

    def check_process(self, share: Share) -> None:
        """Refuse to run in a worker of another loader, or with a share that is not that of this process.

        That is one that was found before torch.distributed had ranks to share subjects with.
        """
        if get_worker_info() is not None:
            raise QueueError(
                "a queue runs its own workers: give DataLoader num_workers=0, and the number of workers "
                "to Queue(num_workers=...)"
            )
        if not self.asks_torch_distributed:
            return
        now = self.share()
        if now != share and now.world_size > 1:
            raise QueueError(
                f"the queue was made as rank {share.rank} of {share.world_size}, and this is rank "
                f"{now.rank} of {now.world_size}; make the queue after init_process_group"
            )

    def share_of(self, patches: NDArray[np.int64]) -> Share:
        """The share of this process; an OptionError if subjects of so many patches cannot be shared out."""
        share = self.share()
        share.check(int(np.count_nonzero(patches)))
        self._check_subject_sampler(len(patches))
        return share

    def _check_subject_sampler(self, num_subjects: int) -> None:
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

    def subject_order(
        self, epoch: int, num_subjects: int, weights: SubjectWeights | None = None
    ) -> NDArray[np.int64]:
        """The subjects of an epoch by their numbers, in order, before they are dealt out to ranks."""
        sampler: Any = self.subject_sampler
        if sampler is not None:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
            return np.array(list(sampler), dtype=np.int64)
        stream = rng(self.seed, epoch, purpose=Purpose.SUBJECT_ORDER)
        order = stream.permutation(num_subjects) if self.shuffle_subjects else np.arange(num_subjects)
        return order if weights is None else weights.order(order, stream, is_shuffled=self.shuffle_subjects)

    def fingerprint(self, share: Share, first_order: Callable[[], NDArray[np.int64]]) -> Json:
        """What the stream depends on, except the seed; ``first_order`` gives the order of epoch 0."""
        sampler = self.subject_sampler
        return {
            "patches_per_volume": self.patches_per_volume,
            "max_length": self.max_length,
            "shuffle_subjects": self.shuffle_subjects,
            "shuffle_patches": self.shuffle_patches and SHUFFLE,
            "subject_sampler": sampler is not None and order_identity(sampler, first_order()),
            "world_size": share.world_size,
            "uneven": share.uneven,
        }

    def as_keywords(self) -> dict[str, Any]:
        """The options by their names, as ``Queue`` takes them."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


class ShownOptions:
    """The options of a queue that it shows under their names."""

    options: QueueOptions

    max_length = property(attrgetter("options.max_length"))
    patches_per_volume = property(attrgetter("options.patches_per_volume"))
    num_workers = property(attrgetter("options.num_workers"))
    shuffle_subjects = property(attrgetter("options.shuffle_subjects"))
    shuffle_patches = property(attrgetter("options.shuffle_patches"))
    subject_sampler = property(attrgetter("options.subject_sampler"))
    seed = property(attrgetter("options.seed"))
    dtype = property(attrgetter("options.dtype"))


def as_integer(name: str, value: Any) -> int:
    """The integer that a value is, of any integer type; an OptionError that names it otherwise."""
    try:
        return operator.index(value)
    except TypeError:
        raise OptionError(f"{name} must be an integer, not {value!r}") from None


def _check_transform(transform: Any) -> None:
    """Refuse what cannot be called with a patch: a transform of another library, or no function at all."""
    libraries = {base.__module__.partition(".")[0] for base in type(transform).__mro__}
    for library in ("torchio", "monai"):
        if library in libraries:
            name = type(transform).__name__
            raise OptionError(
                f"{name} is a transform of another library, which takes no patch of zpatch; say "
                f"transform=from_{library}({name}(...)), of zpatch.compat.transforms"
            )
    if transform is not None and not callable(transform):
        raise OptionError(f"transform must be a function of a patch, not {transform!r}")
