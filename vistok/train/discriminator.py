"""The patch discriminator that TiTok and TA-TiTok train against."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAKY_SLOPE = 0.1
PATCHES = 16


class BlurPool(nn.Module):
    """Halve height and width with the binomial filter outer([1, 3, 3, 1]), normalised to sum 1.

    [B, C, H, W] -> [B, C, ceil(H/2), ceil(W/2)]; the border is zero-padded, the odd row or column at the end.
    "Making Convolutional Networks Shift-Invariant Again" (2019, arXiv 1904.11486).
    """

    def __init__(self) -> None:
        """Register the filter; it has no learned weights."""
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
        kernel = torch.outer(taps, taps)
        self.register_buffer("kernel", (kernel / kernel.sum())[None, None])  # [1, 1, 4, 4]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, ceil(H/2), ceil(W/2)]."""
        channels, height, width = hidden_states.shape[1:]
        rows, columns = 2 + height % 2, 2 + width % 2
        padded = F.pad(hidden_states, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return F.conv2d(padded, self.kernel.expand(channels, -1, -1, -1), stride=2, groups=channels)


class NLayerDiscriminator(nn.Module):
    """Classify 16x16 patches of an image of any size: positive logits for real, negative for made.

    Each of `num_stages` stages halves the resolution and, after the first, doubles the width, which starts
    at `hidden_channels` (a multiple of 32, the number of normalisation groups). Images [B, 3, H, W] in [0, 1]
    -> logits [B, 1, 16, 16]. A `hidden_channels` that the groups do not divide raises ValueError.

    "Image-to-Image Translation with Conditional Adversarial Networks" (2017, arXiv 1611.07004) in the form of
    "Democratizing Text-to-Image Masked Generative Models with Compact Text-Aware One-Dimensional Tokens"
    (2025, arXiv 2501.07730); state-dict keys are those of its code.
    """

    def __init__(self, hidden_channels: int = 128, num_stages: int = 3) -> None:
        """Build the layers with PyTorch's default weights."""
        super().__init__()
        if hidden_channels < 32 or hidden_channels % 32:
            raise ValueError(
                f"hidden_channels is {hidden_channels}; give a positive multiple of 32, such as 128"
            )
        if num_stages < 1:
            raise ValueError(f"num_stages is {num_stages}; the discriminator needs at least one stage")
        widths = [hidden_channels] + [hidden_channels * 2**stage for stage in range(num_stages)]
        self.block_in = nn.Sequential(nn.Conv2d(3, hidden_channels, 5, padding=2), nn.LeakyReLU(LEAKY_SLOPE))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(narrow, wide, 3, padding=1),
                BlurPool(),
                nn.GroupNorm(32, wide),
                nn.LeakyReLU(LEAKY_SLOPE),
            )
            for narrow, wide in pairwise(widths)
        )
        self.pool = nn.AdaptiveMaxPool2d(PATCHES)
        self.to_logits = nn.Sequential(
            nn.Conv2d(widths[-1], widths[-1], 1),
            nn.LeakyReLU(LEAKY_SLOPE),
            nn.Conv2d(widths[-1], 1, 5, padding=2),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] -> logits [B, 1, 16, 16]."""
        hidden_states = self.block_in(images)  # [B, C, H, W]
        for block in self.blocks:
            hidden_states = block(hidden_states)  # [B, 2C, H/2, W/2]
        return self.to_logits(self.pool(hidden_states))  # [B, 1, 16, 16]
