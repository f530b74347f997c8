"""Predictions equal those of MONAI's sliding windows by the same network in the same order of axes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import zpatch as zp
from zpatch.tiling.windows import partition_of_unity, window

inferers = pytest.importorskip("monai.inferers", reason="MONAI is not installed")

PATCH, OVERLAP = 16, 8
SHAPE = (44, 40, 52)


@pytest.fixture
def volume() -> np.ndarray[Any, Any]:
    """Two channels, (C, x, y, z)."""
    return np.random.default_rng(5).uniform(-1, 1, (2, *SHAPE)).astype(np.float32)


def network(dimensions: int) -> torch.nn.Module:
    """Its weights differ along its axes, and its output depends on the patch: a normalisation."""
    torch.manual_seed(3)
    conv: Any = (torch.nn.Conv2d, torch.nn.Conv3d)[dimensions - 2]
    norm: Any = (torch.nn.InstanceNorm2d, torch.nn.InstanceNorm3d)[dimensions - 2]
    return torch.nn.Sequential(conv(2, 4, 3, padding=1), norm(4), torch.nn.ReLU(), conv(4, 3, 3, padding=1))


def by_zpatch(volume: np.ndarray[Any, Any], out: Path, net: Any, letters: str) -> np.ndarray[Any, Any]:
    size, overlap = (tuple(n if a in letters else m for a in "xyz") for n, m in ((PATCH, 1), (OVERLAP, 0)))
    predicted = zp.predict(
        net, [zp.Subject(name="ann", t1=zp.ScalarImage(volume))], out, image="t1", patch_size=size,
        patch_overlap=overlap, overlap_mode="average", batch_size=4, model_axes=letters,
    )  # fmt: skip
    return np.asarray(predicted[0].prediction.data)


def by_monai(batch: np.ndarray[Any, Any], net: Callable[[torch.Tensor], Any]) -> np.ndarray[Any, Any]:
    roi = (PATCH,) * (batch.ndim - 2)
    with torch.inference_mode():
        found = inferers.sliding_window_inference(
            torch.from_numpy(np.ascontiguousarray(batch)),
            roi,
            4,
            net,
            overlap=OVERLAP / PATCH,
            mode="constant",
        )
    return np.asarray(found)


@pytest.mark.parametrize("letters", ["xyz", "zyx", "yxz"])
def test_a_3d_network_of_any_order_of_axes(
    volume: np.ndarray[Any, Any], tmp_path: Path, letters: str
) -> None:
    net = network(3).eval()
    found = by_zpatch(volume, tmp_path / "out", net, letters)
    wanted = by_monai(np.einsum(f"cxyz->c{letters}", volume)[None], net)[0]
    np.testing.assert_allclose(found, np.einsum(f"c{letters}->cxyz", wanted), rtol=0, atol=1e-5)
    if letters != "xyz":  # the order matters to this network
        assert np.abs(found - by_monai(volume[None], net)[0]).max() > 0.1


@pytest.mark.parametrize("letters", ["yx", "xy"])
def test_a_2d_network_plane_by_plane(volume: np.ndarray[Any, Any], tmp_path: Path, letters: str) -> None:
    net, volume = network(2).eval(), volume[..., :5]
    found = by_zpatch(volume, tmp_path / "out", net, letters)
    wanted = by_monai(np.einsum(f"cxyz->zc{letters}", volume), net)
    np.testing.assert_allclose(found, np.einsum(f"zc{letters}->cxyz", wanted), rtol=0, atol=1e-5)


class TwoHeads(torch.nn.Module):
    """Scores of three classes, and a distance; not a number where the input is below -0.9."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network(3)

    def forward(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        found = self.net(batch)
        distance = found[:, :1].masked_fill(batch[:, :1] < -0.9, torch.nan)
        return {"seg": found, "dist": distance}


@pytest.fixture
def by_two_heads(volume: np.ndarray[Any, Any], tmp_path: Path) -> Callable[[], zp.Subject]:
    """Predict with each head reduced in its own way, or mend what was predicted."""

    def run() -> zp.Subject:
        with pytest.warns(UserWarning, match="NaN or infinite"):
            cohort = zp.predict(
                TwoHeads().eval(), [zp.Subject(name="ann", t1=zp.ScalarImage(volume))], tmp_path / "out",
                image="t1", patch_size=PATCH, patch_overlap=OVERLAP, overlap_mode="average", batch_size=4,
                reduce={"seg": "argmax", "dist": None},
            )  # fmt: skip
        return cohort[0]

    return run


def test_each_head_is_reduced_in_its_own_way_and_what_is_not_finite_is_counted(
    volume: np.ndarray[Any, Any], by_two_heads: Callable[[], zp.Subject]
) -> None:
    found, net = by_two_heads(), TwoHeads().eval()
    scores = by_monai(volume[None], lambda batch: net(batch)["seg"])[0]
    wanted = by_monai(volume[None], lambda batch: net(batch)["dist"])[0]
    np.testing.assert_allclose(found.dist.data, wanted, rtol=0, atol=1e-5, equal_nan=True)
    assert found.dist.statistics["not_finite"] == np.isnan(wanted).sum() > 0
    low, high = np.sort(scores, axis=0)[-2:]
    is_clear = high - low > 1e-5
    assert is_clear.mean() > 0.99
    np.testing.assert_array_equal(found.seg.data[0][is_clear], scores.argmax(axis=0)[is_clear])


def test_shards_that_were_lost_are_predicted_again_as_before(
    volume: np.ndarray[Any, Any], by_two_heads: Callable[[], zp.Subject], tmp_path: Path
) -> None:
    by_two_heads()
    shards = [file for file in (tmp_path / "out" / "ann" / "dist" / "0" / "c").rglob("*") if file.is_file()]
    shards[-1].unlink()
    found, net = by_two_heads(), TwoHeads().eval()
    wanted = by_monai(volume[None], lambda batch: net(batch)["dist"])[0]
    np.testing.assert_allclose(found.dist.data, wanted, rtol=0, atol=1e-5, equal_nan=True)
    assert zp.verify(tmp_path / "out").ok


# Weights


@pytest.mark.parametrize(("dimensions", "clamped"), [(2, 0.32), (3, 0.58)])
def test_gaussian_weights_are_those_of_monai_without_its_least_weight(
    dimensions: int, clamped: float
) -> None:
    ours = functools.reduce(np.multiply.outer, [window("gaussian", 32)] * dimensions)
    assert (ours < 1e-3).mean() == pytest.approx(clamped, abs=0.005)
    theirs = importance_map(dimensions)
    np.testing.assert_allclose(np.maximum(ours, 1e-3), theirs, rtol=1e-5)


@pytest.mark.parametrize(
    ("dimensions", "overlap", "most", "mean"),
    [(3, 8, 0.85, 0.12), (3, 16, 0.03, 0.006), (2, 8, 0.57, 0.05), (2, 16, 0.005, 0.001)],
)
def test_shares_of_gaussian_patches_differ_from_those_of_monai_as_documented(
    dimensions: int, overlap: int, most: float, mean: float
) -> None:
    starts = np.arange(3) * (32 - overlap)
    [_, middle, _] = partition_of_unity("gaussian", starts, starts + 32, overlap)
    ours = functools.reduce(np.multiply.outer, [middle] * dimensions)
    theirs = importance_map(dimensions)
    total = np.zeros((starts[-1] + 32,) * dimensions)
    for corner in itertools.product(starts, repeat=dimensions):
        total[tuple(slice(start, start + 32) for start in corner)] += theirs
    theirs = theirs / total[(slice(starts[1], starts[1] + 32),) * dimensions]
    difference = np.abs(ours - theirs)
    assert difference.max() == pytest.approx(most, rel=0.1)
    assert difference.mean() == pytest.approx(mean, rel=0.25)


def importance_map(dimensions: int) -> np.ndarray[Any, Any]:
    """MONAI's weights of a patch of 32 voxels along each axis."""
    utils = pytest.importorskip("monai.data.utils")
    weights = utils.compute_importance_map((32,) * dimensions, mode="gaussian")
    return np.asarray(weights, dtype=np.float64)
