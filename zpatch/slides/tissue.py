"""A thumbnail of a slide -> where there is tissue: Otsu's threshold on the saturation, with holes closed.

Otsu, N. (1979): A threshold selection method from gray-level histograms. IEEE Trans. SMC 9(1), 62-66.
"""

from __future__ import annotations

import numpy as np

from zpatch.geometry.boxes import Bools, Integers, Voxels

LEAST_SATURATION = 0.05  # glass has less, also where a slide has no tissue at all to tell it from
BINS = 256


def saturation(pixels: Voxels) -> Voxels:
    """The saturation of HSV, 0 to 1, of pixels (3, I, J) of red, green and blue; of one channel, darkness.

    >>> saturation(np.array([[[255, 200]], [[255, 100]], [[255, 100]]], np.uint8)).tolist()
    [[0.0, 0.5]]
    """
    values = pixels.astype(np.float32)
    if len(values) < 3:
        most = values.max() or 1.0
        return np.asarray(1 - values[0] / most)
    high, low = values[:3].max(axis=0), values[:3].min(axis=0)
    return np.asarray(np.divide(high - low, high, out=np.zeros_like(high), where=high > 0))


def otsu_threshold(values: Voxels) -> float:
    """The threshold on values of 0 to 1 that parts them into the two classes that differ most.

    It maximises the variance between the classes, over a histogram of 256 bins.

    >>> 0.1 < otsu_threshold(np.array([0.1] * 50 + [0.8] * 50)) < 0.8
    True
    """
    counts, edges = np.histogram(values, bins=BINS, range=(0, 1))
    centres = (edges[:-1] + edges[1:]) / 2
    below, mass = np.cumsum(counts), np.cumsum(counts * centres)
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        difference = mass / below - (mass[-1] - mass) / above
        between = np.nan_to_num(below * above * difference**2)
    best = np.flatnonzero(between == between.max())
    return float(edges[1:][best].mean())


def tissue_of(pixels: Voxels) -> Bools:
    """Where there is tissue in pixels (C, I, J); glass that tissue surrounds counts as tissue."""
    found = saturation(pixels)
    return filled(found > max(otsu_threshold(found), LEAST_SATURATION))


def filled(mask: Bools) -> Bools:
    """A mask (I, J) with its holes closed: all that cannot be reached from the border outside of it.

    >>> ring = np.array([[0, 1, 1, 1], [0, 1, 0, 1], [0, 1, 1, 1]], bool)
    >>> filled(ring).astype(int).tolist()
    [[0, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1]]
    """
    free = np.pad(~mask, 1, constant_values=True)
    reached = np.zeros_like(free)
    reached[[0, -1]] = reached[:, [0, -1]] = True
    runs = [_runs(free), _runs(free.T)]
    count = -1
    while count != (count := int(reached.sum())):
        reached = _spread(reached, runs[0]) & free
        reached = _spread(reached.T, runs[1]).T & free
    return np.asarray(~reached[1:-1, 1:-1])


def _runs(free: Bools) -> Integers:
    """A number for each run of equal values in a row, over all rows."""
    starts = np.ones(free.shape, bool)
    starts[:, 1:] = free[:, 1:] != free[:, :-1]
    return np.asarray(np.cumsum(starts.ravel()).reshape(free.shape) - 1)


def _spread(reached: Bools, runs: Integers) -> Bools:
    """All pixels of the runs of which a pixel was reached."""
    hit = np.zeros(int(runs[-1, -1]) + 1, bool)
    hit[runs[reached]] = True
    return np.asarray(hit[runs])
