"""TokenFLEX's projector: a grid of visual states pooled to any size, then a gated layer.

"TokenFLEX: Unified VLM Training for Flexible Visual Tokens Inference" (Hu et al., 2025, arXiv 2504.03154).
Written from the paper, which has no public code or weights. It does not state norm, biases and hidden width:
here a LayerNorm follows the pooling, all layers have biases, and the hidden width is that of the language
model.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ..saved_module import SavedModule


@dataclass(frozen=True)
class FlexibleProjectorConfig:
    """`width` channels per state of the vision tower, `out_width` per token of the language model. Raises
    ValueError for widths below 1."""

    width: int
    out_width: int

    def __post_init__(self) -> None:
        for name in ("width", "out_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it takes a number of channels from 1")


class FlexibleProjector(SavedModule):
    """Projects the states of a vision tower to any number of visual tokens."""

    config_class: ClassVar[type] = FlexibleProjectorConfig

    def __init__(self, config: FlexibleProjectorConfig) -> None:
        super().__init__(config)
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.gate = nn.Linear(config.width, config.out_width)
        self.up = nn.Linear(config.width, config.out_width)
        self.down = nn.Linear(config.out_width, config.out_width)

    def forward(
        self, states: Tensor, size: tuple[int, int] | None = None, grid: tuple[int, int] | None = None
    ) -> Tensor:
        """Tokens [B, h · w, out_width] of states [B, H · W, width], row by row.

        `size` is (h, w), by default the states' own; `grid` is (H, W), by default a square. The grid is
        averaged by adaptive pooling, in blocks that overlap where h or w does not divide it. Raises
        ValueError for states that are not of that grid and for a size outside 1 to the grid's.
        """
        count = states.shape[-2]
        height, width = (math.isqrt(count),) * 2 if grid is None else grid
        if height * width != count:
            raise ValueError(
                f"states are {list(states.shape)}, which is not a grid of {height} × {width}; give the grid "
                "as grid=(height, width)"
            )
        rows, cols = (height, width) if size is None else size
        if not (1 <= rows <= height and 1 <= cols <= width):
            raise ValueError(
                f"size is {rows} × {cols}; a grid of {height} × {width} states takes 1 × 1 to {height} × "
                f"{width}"
            )
        if (rows, cols) != (height, width):
            maps = states.transpose(1, 2).unflatten(2, (height, width))
            states = F.adaptive_avg_pool2d(maps, (rows, cols)).flatten(2).transpose(1, 2)
        states = self.norm(states)
        return self.down(F.silu(self.gate(states)) * self.up(states))
