"""Fixtures of tests against TorchIO and MONAI."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import zpatch as zp
from zpatch.compat.transforms import is_torchio_2


@pytest.fixture(scope="session")
def tio() -> Any:
    """TorchIO 1."""
    torchio = pytest.importorskip("torchio", reason="TorchIO is not installed")
    if is_torchio_2(torchio):
        pytest.skip("the TorchIO that is installed is not TorchIO 1")
    return torchio


@pytest.fixture(scope="session")
def monai() -> Any:
    """The transforms of MONAI."""
    return pytest.importorskip("monai.transforms", reason="MONAI is not installed")


@pytest.fixture(scope="session")
def oblique() -> zp.Subject:
    """A scan with two channels, another one, and a label map, on an oblique grid with axes to (about) PLS."""
    rng = np.random.default_rng(5)
    shape = (26, 21, 17)
    angle = 0.2
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.array([[0, -1, 0], [-1, 0, 0], [0, 0, 1]]) @ np.diag([1.0, 1.3, 2.0])
    affine[:3, 3] = [12.0, 30.0, -7.0]
    two = (rng.gamma(2, 100, (2, *shape)) * (rng.random((2, *shape)) > 0.2)).astype(np.float32)
    t1 = rng.integers(-50, 1000, shape).astype(np.int16)
    seg = np.zeros(shape, np.uint8)
    seg[6:20, 3:15, 5:12] = rng.integers(1, 4, (14, 12, 7))
    images = {
        "two": zp.ScalarImage(two, affine=affine),
        "t1": zp.ScalarImage(t1, affine=affine),
        "seg": zp.LabelMap(seg, affine=affine),
    }
    return zp.Subject.of(images, name="oblique")
