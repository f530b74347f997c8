"""Intensities on one scale, from statistics that were computed when the images were converted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zpatch.errors import OptionError
from zpatch.images.image import Image

MODES = ("zscore", "clip")


class Normalize:
    """Normalise images as they are read: ``normalize(image)`` is a lazy image of the normalised values.

    ``zscore`` gives (value - mean) / std; ``clip`` clips values to the percentiles 0.5 and 99.5, and scales
    these to 0 and 1. Statistics are those of the image in its store, or the ``statistics`` of a whole cohort,
    as in ``Normalize(statistics=cohort.statistics["ct"])``. With ``foreground`` they are those of the voxels
    that are not stored as zero. An image whose values are all equal becomes 0.

    Raises OptionError for an unknown mode, and for an image without these statistics.

    >>> import numpy as np
    >>> from zpatch.images.image import ScalarImage
    >>> normalize = Normalize("zscore", statistics={"mean": 10.0, "std": 2.0})
    >>> normalize(ScalarImage(np.full((1, 1, 1), 14, np.int16))).data.tolist()
    [[[[2.0]]]]
    """

    def __init__(
        self,
        mode: str = "zscore",
        *,
        statistics: Mapping[str, Any] | None = None,
        foreground: bool = False,
    ) -> None:
        if mode not in MODES:
            raise OptionError(f"mode must be one of {', '.join(MODES)}, not {mode!r}", option="mode")
        self.mode = mode
        self.statistics = statistics
        self.foreground = foreground

    def __call__(self, image: Image) -> Image:
        """The image, normalised where it is read; float32, or float64 for voxels of 32 bits and more."""
        statistics = image.statistics if self.statistics is None else self.statistics
        if self.foreground:
            statistics = statistics.get("foreground") or {}
        if self.mode == "zscore":
            mean, std = self._of(statistics, image, "mean"), self._of(statistics, image, "std")
            return image.rescaled(1 / std, -mean / std) if std > 0 else image.rescaled(0, 0)
        low, high = (self._of(statistics, image, key) for key in ("percentile_0_5", "percentile_99_5"))
        if not high > low:
            return image.rescaled(0, 0)
        return image.rescaled(1 / (high - low), -low / (high - low), low, high)

    def _of(self, statistics: Mapping[str, Any], image: Image, key: str) -> Any:
        if statistics.get(key) is None:
            lacking = "its foreground has" if self.foreground else "there is"
            raise OptionError(
                f"{image!r} cannot be normalised: {lacking} no {key!r} in its statistics; only scalar images "
                f"of a store have them, give them for other images, as in Normalize(statistics=...)"
            )
        return statistics[key]

    def __repr__(self) -> str:
        whose = "each image's own" if self.statistics is None else "given"
        return f"Normalize({self.mode!r}, {whose} statistics{', foreground' * self.foreground})"
