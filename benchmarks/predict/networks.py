"""Networks for predictions under a limit of memory: each holds memory in its own way."""

from __future__ import annotations

import torch
from torch import nn

CLASSES = 4


class Bands(nn.Module):
    """Pointwise: it holds little more than its output."""

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return torch.cat([batch * (n + 1) for n in range(CLASSES)], dim=1)


class SmallUNet(nn.Module):
    """It holds the activations of two resolutions, in blocks of many sizes."""

    def __init__(self, width: int = 6, classes: int = CLASSES) -> None:
        super().__init__()
        self.fine = nn.Sequential(nn.Conv3d(1, width, 3, padding=1), nn.ReLU())
        self.down = nn.Conv3d(width, 2 * width, 2, stride=2)
        self.coarse = nn.Sequential(nn.Conv3d(2 * width, 2 * width, 3, padding=1), nn.ReLU())
        self.up = nn.ConvTranspose3d(2 * width, width, 2, stride=2)
        self.out = nn.Conv3d(2 * width, classes, 1)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        fine = self.fine(batch)
        return self.out(torch.cat([fine, self.up(self.coarse(self.down(fine)))], dim=1))  # type: ignore[no-any-return]


class TwoHeads(nn.Module):
    """Two outputs, one of half the resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, CLASSES, 3, padding=1)

    def forward(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        scores = self.conv(batch)
        return {"seg": scores, "coarse": nn.functional.avg_pool3d(scores[:, :1], 2)}


def bands() -> nn.Module:
    """Pointwise."""
    return Bands()


def unet() -> nn.Module:
    """Two resolutions."""
    torch.manual_seed(0)
    return SmallUNet()


def two_heads() -> nn.Module:
    """Two outputs."""
    torch.manual_seed(0)
    return TwoHeads()


def larger() -> nn.Module:
    """An output of twice the resolution."""
    return nn.Upsample(scale_factor=2)
