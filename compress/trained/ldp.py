"""Lightweight downsample projectors: visual states to fewer, wider tokens by small convolutions.

LDP: "MobileVLM: A Fast, Strong and Open Vision Language Assistant for Mobile Devices" (Chu et al., 2023,
arXiv 2312.16886). LDPv2: "MobileVLM V2: Faster and Stronger Baseline for Vision Language Model" (Chu et al.,
2024, arXiv 2402.03766). LangDC (Wang et al., 2025, arXiv 2509.00969) takes them as projectors of its base
branch. Parameters have the keys of its checkpoints.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ...saved_module import SavedModule
from ..algorithms.grid import square_side

NORM_EPSILON = 1e-5


@dataclass(frozen=True)
class LDPConfig:
    """`mm_hidden_size` channels per state of the vision tower, `hidden_size` per token. Raises ValueError for
    sizes below 1."""

    mm_hidden_size: int
    hidden_size: int

    def __post_init__(self) -> None:
        for name in ("mm_hidden_size", "hidden_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it takes a number of channels from 1")


class LDP(SavedModule):
    """LDP: two layers, then depthwise separable blocks of stride 1 and 2."""

    config_class: ClassVar[type] = LDPConfig

    def __init__(self, config: LDPConfig) -> None:
        super().__init__(config)
        self.model = _LDPBlocks(config.mm_hidden_size, config.hidden_size)

    def forward(self, states: Tensor) -> Tensor:
        """Square maps of states [B, s · s, mm_hidden_size] → tokens [B, t · t, hidden_size] for t = ⌈s / 2⌉,
        row by row. Raises ValueError for maps that are not square."""
        side = square_side(states.shape[1])
        maps = self.model.mlp(states).transpose(1, 2).unflatten(2, (side, side))
        return self.model.mb_block(maps).flatten(2).transpose(1, 2)


class LDPv2(SavedModule):
    """LDPv2: two layers, means over a 4 × 4 grid, and a depthwise convolution that adds positions."""

    config_class: ClassVar[type] = LDPConfig
    side: ClassVar[int] = 4

    def __init__(self, config: LDPConfig) -> None:
        super().__init__(config)
        self.mlp = _Layers(config.mm_hidden_size, config.hidden_size)
        self.peg = _PositionalConvolution(config.hidden_size)

    def forward(self, states: Tensor) -> Tensor:
        """Square maps of states [B, s · s, mm_hidden_size] → tokens [B, 16, hidden_size], row by row. Raises
        ValueError for maps that are not square."""
        side = square_side(states.shape[1])
        maps = self.mlp.mlp(states).transpose(1, 2).unflatten(2, (side, side))
        means = F.adaptive_avg_pool2d(maps, self.side)
        return (means + self.peg.peg(means)).flatten(2).transpose(1, 2)


# Parts under the checkpoints' keys --------------------------------------------------------------------------


class _Layers(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))


class _PositionalConvolution(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.peg = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, groups=width))


class _LDPBlocks(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Identity(), nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))
        self.mb_block = nn.Sequential(
            nn.Identity(), _SeparableBlock(out, stride=1), _SeparableBlock(out, stride=2)
        )


class _SeparableBlock(nn.Module):
    """Depthwise convolution, gate per channel, convolution across channels; with stride 1 added to its
    input."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.adds = stride == 1
        self.block = nn.Sequential(
            nn.Sequential(
                nn.Conv2d(width, width, 3, stride, padding=1, groups=width, bias=False),
                _ChannelNorm(width),
                nn.Hardswish(),
            ),
            _ChannelGate(width, _gate_width(width)),
            nn.Sequential(nn.Conv2d(width, width, 1, bias=False), _ChannelNorm(width)),
        )

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        return x + self.block(x) if self.adds else self.block(x)


def _gate_width(width: int) -> int:
    """A quarter of the channels as a multiple of 8: the nearest, or the next one where that is more than a
    tenth less."""
    quarter = width // 4
    rounded = max(8, (quarter + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * quarter else rounded + 8


class _ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of a map [B, C, H, W]."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=NORM_EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _ChannelGate(nn.Module):
    """Squeeze and excitation: each channel times a factor in [0, 1] that the means of all channels decide."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(width, inner, 1)
        self.fc2 = nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * F.hardsigmoid(self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))))
