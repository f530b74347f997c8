"""A small 3-D U-Net for raw intensities: its first layer normalises each patch."""

from __future__ import annotations

import torch
from torch import nn

LEVELS = 3


class UNet(nn.Module):
    """Patches (B, C, I, J, K) to logits (B, classes, I, J, K).

    The first layer is an instance norm, so that stored intensities of any scanner can be used. Each
    side of a patch must be a multiple of `SIDE_MULTIPLE`.
    """

    SIDE_MULTIPLE = 2 ** (LEVELS - 1)

    def __init__(self, *, channels: int = 1, classes: int = 3, width: int = 8) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(LEVELS)]
        above = [channels, *widths]
        self.normalise = nn.InstanceNorm3d(channels)
        self.encoders = nn.ModuleList(block(*pair) for pair in zip(above, widths, strict=False))
        self.shrink = nn.MaxPool3d(2)
        self.upsamplers = nn.ModuleList(
            nn.ConvTranspose3d(2 * wide, wide, kernel_size=2, stride=2) for wide in widths[-2::-1]
        )
        self.decoders = nn.ModuleList(block(2 * wide, wide) for wide in widths[-2::-1])
        self.head = nn.Conv3d(width, classes, kernel_size=1)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Logits of each class at each voxel."""
        features = self.normalise(patches)
        skips: list[torch.Tensor] = []
        for encode in self.encoders:
            features = encode(self.shrink(features) if skips else features)
            skips.append(features)
        for upsample, decode, skip in zip(self.upsamplers, self.decoders, skips[-2::-1], strict=True):
            features = decode(torch.cat([upsample(features), skip], dim=1))
        logits: torch.Tensor = self.head(features)
        return logits


def block(before: int, after: int) -> nn.Sequential:
    """Two convolutions of 3 x 3 x 3, each with instance norm and a leaky rectifier."""
    return nn.Sequential(*convolution(before, after), *convolution(after, after))


def convolution(before: int, after: int) -> list[nn.Module]:
    """One convolution with its norm and its activation."""
    return [
        nn.Conv3d(before, after, kernel_size=3, padding=1, bias=False),
        nn.InstanceNorm3d(after, affine=True),
        nn.LeakyReLU(0.01, inplace=True),
    ]
