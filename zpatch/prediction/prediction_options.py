"""What a user may choose of a prediction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from zpatch.blending.reduction import Reduction, check_reduction
from zpatch.blending.windows import check_overlap_mode
from zpatch.errors import OptionError
from zpatch.geometry.boxes import PatchLocation, Triple, patch_overlap_triple, patch_size_triple
from zpatch.geometry.padding import check_padding_mode
from zpatch.images.normalization import Normalize
from zpatch.images.subject import Subject
from zpatch.runtime.byte_sizes import parse_bytes

MaskFunction = Callable[[Subject, PatchLocation], bool]


@dataclass(frozen=True, slots=True)
class PredictOptions:
    """What a user may choose; see ``predict``."""

    image: tuple[str, ...]
    patch_size: Triple
    patch_overlap: Triple
    overlap_mode: str = "hann"
    reduce: Reduction = None
    batch_size: int = 1
    padding_mode: str | None = None
    normalize: str | None = None
    mask: str | MaskFunction | None = None
    fill: float = 0
    max_memory: int | str | None = None
    jobs: int = 1
    scheduler: str | None = None

    @classmethod
    def of(
        cls,
        *,
        image: str | Sequence[str],
        patch_size: int | Sequence[int],
        patch_overlap: int | Sequence[int] = 0,
        **options: Any,
    ) -> Self:
        """Options in the forms that ``predict`` takes them in."""
        size = patch_size_triple(patch_size)
        return cls(
            image=(image,) if isinstance(image, str) else tuple(image),
            patch_size=size,
            patch_overlap=patch_overlap_triple(patch_overlap, size),
            **options,
        )

    def __post_init__(self) -> None:
        check_overlap_mode(self.overlap_mode)
        check_reduction(self.reduce)
        check_padding_mode(self.padding_mode)
        if self.normalize is not None:
            Normalize(self.normalize)
        if not self.image:
            raise OptionError("image= names no image to predict from", option="image")
        for name, count in (("batch_size", self.batch_size), ("jobs", self.jobs)):
            if count < 1:
                raise OptionError(f"{name} must be at least 1, not {count}", option=name)
        if self.max_memory is not None:
            parse_bytes(self.max_memory)
