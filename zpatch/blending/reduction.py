"""Final voxels of blended ones: classes, probabilities, or the blended values themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import torch

from zpatch.errors import ModelError, OptionError, UnknownNameError
from zpatch.records.image_record import Kind

try:
    from zpatch.blending._blend import classify as _compiled
    from zpatch.blending._blend import is_finite as _compiled_is_finite
except ImportError:  # zpatch was installed without a compiler
    _compiled = _compiled_is_finite = None  # type: ignore[assignment]

Reduction = None | str | tuple[str, float] | Callable[[torch.Tensor], torch.Tensor]
Reductions = Reduction | Mapping[str, Reduction]  # of all outputs of a network, or of each by its name

STORED_AS = {torch.bool: torch.uint8, torch.float16: torch.float32, torch.bfloat16: torch.float32}
COMPARED_AS = {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.float64}

_NAMES = "'argmax', 'softmax', 'sigmoid', ('threshold', t), a function or None"


def check_reduction(reduce: Reduction) -> None:
    """Raise OptionError for a reduction that does not exist."""
    _function_of(reduce)


def check_known(names: Collection[str], outputs: Collection[str], option: str) -> None:
    """Raise OptionError if an option names an output that a network does not have.

    >>> check_known(["sge"], ["seg", "dist"], "reduce")
    Traceback (most recent call last):
    zpatch.errors.OptionError: reduce: no output 'sge' in the network; did you mean 'seg'? (it has: seg, dist)
    """
    for name in names:
        if name not in outputs:
            unknown = UnknownNameError.among("output", name, outputs, "the network")
            raise OptionError(f"{option}: {unknown}", option=option)


def check_channels(reduce: Reduction, channels: int, output: str | None) -> None:
    """Raise OptionError for a reduction that gives every voxel of an ``output`` the same value.

    That is ``argmax`` and ``softmax`` of one channel.
    """
    if channels == 1 and isinstance(reduce, str) and reduce in _OF_ONE_CHANNEL:
        value, instead = _OF_ONE_CHANNEL[reduce]
        of_output = "the output" if output is None else f"the output {output!r}"
        raise OptionError(
            f"reduce='{reduce}' would give {value} everywhere, as {of_output} has one channel; use {instead}",
            option="reduce",
        )


def kind_of(reduce: Reduction) -> Kind:
    """The kind of image that a reduction gives: label maps of classes, else scalars."""
    is_label = reduce == "argmax" or (isinstance(reduce, tuple) and reduce[0] == "threshold")
    return "label" if is_label else "scalar"


def reduce_channels(
    voxels: torch.Tensor, reduce: Reduction, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Reduce blended voxels (C, I, J, K) to (C', I, J, K), cast to ``dtype`` if one is given.

    ``argmax`` gives one channel of the smallest integers that hold the classes, ``threshold`` as many
    channels of 0 and 1. A function that gives anything but a tensor of the same extent raises ModelError.

    >>> reduce_channels(torch.tensor([0.2, 0.5, 0.3]).reshape(3, 1, 1, 1), "argmax").item()
    1
    """
    reduced = _function_of(reduce)(voxels)
    if not isinstance(reduced, torch.Tensor) or reduced.shape[1:] != voxels.shape[1:]:
        got = tuple(reduced.shape) if isinstance(reduced, torch.Tensor) else type(reduced).__name__
        raise ModelError(
            f"the reduce function made {got} of {tuple(voxels.shape)}; only the channels may change"
        )
    return reduced if dtype is None else reduced.to(dtype)


def not_finite(voxels: torch.Tensor) -> int:
    """How many voxels of (C, I, J, K) are NaN or infinite in any channel.

    One pass sees whether there are any: in the compiled loop, or as a sum, which is not finite then either.

    >>> not_finite(torch.tensor([[0.0, 1.0], [float("nan"), 2.0]]).reshape(2, 2, 1, 1))
    1
    """
    if not (voxels.is_floating_point() or voxels.is_complex()) or _are_finite(voxels):
        return 0
    return int((~voxels.isfinite()).any(dim=0).sum())


def _are_finite(voxels: torch.Tensor) -> bool:
    """Whether all voxels are finite; may be False too if their sum is too large for their type."""
    if _compiled_is_finite is not None and voxels.dtype == torch.float32 and voxels.device.type == "cpu":
        return _compiled_is_finite(voxels.numpy())
    return bool(voxels.sum().isfinite())


class Final(NamedTuple):
    """Final voxels (C', I, J, K), and how many were NaN or infinite before they were reduced."""

    voxels: torch.Tensor
    not_finite: int


class Finaliser:
    """Makes final voxels (C', I, J, K) of blended ones (C, I, J, K), tile by tile.

    They are reduced as by ``reduce_channels``, and with ``is_stored`` cast to a type that an image on disk
    can have. All tiles must get the same number of channels: ``channels``, or that of the first tile.
    """

    def __init__(
        self,
        reduce: Reduction,
        dtype: torch.dtype | None = None,
        *,
        is_stored: bool = False,
        channels: int | None = None,
    ) -> None:
        self._reduce = reduce
        self._dtype = dtype
        self._is_stored = is_stored
        self._channels = channels

    def __call__(self, voxels: torch.Tensor) -> Final:
        """The final voxels of some blended ones. The compiled loop counts in the pass that reduces them."""
        if self._reduce == "argmax" and _is_classified_at_once(voxels):
            classes, are_finite = _classified(voxels)
            count = 0 if are_finite else not_finite(voxels)
            final = classes if self._dtype is None else classes.to(self._dtype)
        else:
            count = not_finite(voxels)  # before a function, which may change them in place
            final = reduce_channels(voxels, self._reduce, self._dtype)
        self._channels = len(final) if self._channels is None else self._channels
        if len(final) != self._channels:
            raise ModelError(
                f"the reduce function made {len(final)} channels of some voxels and {self._channels} of "
                f"others; the number of channels must not depend on the values"
            )
        return Final(as_stored(final) if self._is_stored else final, count)


def as_stored(voxels: torch.Tensor) -> torch.Tensor:
    """The voxels, cast to a type that an image on disk can have."""
    return voxels.to(STORED_AS.get(voxels.dtype, voxels.dtype))


def fitting_fill(fill: float, dtype: torch.dtype) -> float:
    """A fill as a number of the output's type; raises OptionError if that type cannot hold it."""
    if dtype.is_floating_point or dtype.is_complex:
        fits = not math.isfinite(fill) or abs(fill) <= torch.finfo(dtype).max
    else:
        limits = torch.iinfo(torch.uint8 if dtype == torch.bool else dtype)
        fits = math.isfinite(fill) and fill % 1 == 0 and limits.min <= fill <= limits.max
    if not fits:
        raise OptionError(
            f"fill={fill} does not fit the output, which is of {dtype}; choose another", option="fill"
        )
    return fill if dtype.is_floating_point or dtype.is_complex else int(fill)


def _function_of(reduce: Reduction) -> Callable[[torch.Tensor], torch.Tensor]:
    if reduce is None:
        return _unchanged
    if callable(reduce):
        return reduce
    if isinstance(reduce, str) and reduce in _FUNCTIONS:
        return _FUNCTIONS[reduce]
    match reduce:
        case ("threshold", float() | int() as limit) if isinstance(reduce, tuple):
            return lambda voxels: (_comparable(voxels) > limit).to(torch.uint8)
    raise OptionError(f"reduce must be {_NAMES}, not {reduce!r}", option="reduce")


def _unchanged(voxels: torch.Tensor) -> torch.Tensor:
    return voxels


def _comparable(voxels: torch.Tensor) -> torch.Tensor:
    """The voxels in a type that torch can compare: it cannot compare most unsigned integers."""
    return voxels.to(COMPARED_AS.get(voxels.dtype, voxels.dtype))


def _is_classified_at_once(voxels: torch.Tensor) -> bool:
    """Whether the compiled loop finds the classes of such voxels."""
    is_float = voxels.dtype == torch.float32 and voxels.device.type == "cpu"
    return _compiled is not None and is_float and len(voxels) <= 256


def _classified(voxels: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """The classes of voxels, and whether all voxels are finite."""
    winners = torch.empty_like(voxels[:1], dtype=torch.uint8)
    return winners, _compiled(voxels.numpy(), winners.numpy())


def _argmax(voxels: torch.Tensor) -> torch.Tensor:
    voxels = _comparable(voxels)
    classes = len(voxels)
    dtype = torch.uint8 if classes <= 256 else torch.int16 if classes <= 2**15 else torch.int32
    if _is_classified_at_once(voxels):
        return _classified(voxels)[0]
    # Channel by channel: five times as fast as torch's argmax over the first axis.
    best, winner = voxels[0].clone(), torch.zeros_like(voxels[0], dtype=dtype)
    for number, channel in enumerate(voxels[1:], start=1):
        torch.maximum(winner, (channel > best).to(dtype).mul_(number), out=winner)
        torch.maximum(best, channel, out=best)
    if best.is_floating_point() and best.sum().isnan():  # NaN counts as the greatest value, as in torch
        return voxels.max(dim=0, keepdim=True).indices.to(dtype)
    return winner[None]


_OF_ONE_CHANNEL = {
    "argmax": ("class 0", "a threshold: 0.5 of probabilities, 0 of logits"),
    "softmax": ("1", "sigmoid"),
}

_FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "argmax": _argmax,
    "softmax": lambda voxels: voxels.softmax(dim=0),
    "sigmoid": torch.sigmoid,
}
