"""A small 3-D U-Net that takes raw intensities: it normalises each patch itself."""

from __future__ import annotations

import torch
from torch import nn


class UNet(nn.Module):
    """Patches (B, C, I, J, K) to logits (B, classes, I, J, K).

    Each side of a patch must be a multiple of `2 ** (levels - 1)`. The first layer is an instance
    norm, so that intensities of any scanner may come in as they are stored.
    """

    def __init__(
        self, *, channels: int = 1, classes: int = 3, width: int = 8, levels: int = 3
    ) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(levels)]
        self.normalise = nn.InstanceNorm3d(channels)
        self.encoders = nn.ModuleList(
            block(before, after) for before, after in zip([channels, *widths], widths, strict=False)
        )
        self.upsamplers = nn.ModuleList(
            nn.ConvTranspose3d(below, above, kernel_size=2, stride=2)
            for above, below in reversed(list(zip(widths, widths[1:], strict=False)))
        )
        self.decoders = nn.ModuleList(block(2 * above, above) for above in reversed(widths[:-1]))
        self.shrink = nn.MaxPool3d(2)
        self.head = nn.Conv3d(width, classes, kernel_size=1)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Logits of each class at each voxel."""
        features = self.normalise(patches)
        skips: list[torch.Tensor] = []
        for level, encode in enumerate(self.encoders):
            features = encode(self.shrink(features) if level else features)
            skips.append(features)
        skips.pop()
        for upsample, decode in zip(self.upsamplers, self.decoders, strict=True):
            features = decode(torch.cat([upsample(features), skips.pop()], dim=1))
        return self.head(features)


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
