"""M3: nested means of a tile's tokens, for models trained to read any of them."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ...nn.nested_pooling import block_side, nested_pool, nested_scales
from ..algorithms.grid import Grid
from ..algorithms.select import uniform
from ..reducer import FeatureReducer, Image, Selection, keeps_everything, token_count
from ..trained.tiles import placed, resized, whole_tiles


@dataclass(kw_only=True)
class M3(FeatureReducer):
    """Matryoshka Multimodal Models (Cai et al., 2024, arXiv 2405.17430).

    Replaces the tokens of every tile by means of square blocks; tiles are then merged as before, with fewer
    tokens. A share is of each tile's tokens, a count of all tokens of the image with its separators; the
    finest nested scale within it is taken, and one token per tile where even that is more. Without a budget
    `scale` states the tokens per tile (a quarter of them where it is None), which with `exact=False` may be a
    number that the original code rounds.

    Models learn to read means in training (`assets/scenes-m3.yaml`), at consecutive positions: attach with
    positions="compact". In others this is average pooling.
    Raises ValueError for a budget beside `scale`, for images whose layout is not known, and for tiles that
    divide into no square blocks.
    """

    summary: ClassVar = "means of square blocks"
    paper: ClassVar = "arXiv 2405.17430"
    verified: ClassVar = "pooled tokens equal, merged ones to half precision"
    merges: ClassVar = True

    scale: int | None = None
    exact: bool = True

    default_keep: ClassVar[None] = None

    def wants_states(self) -> Literal["features"]:
        """The states that are projected: padding that is cut away counts in the means at its edge."""
        return "features"

    def scale_of(self, grid: Grid, budget: float | int | None) -> int:
        """The tokens per tile that a budget gives."""
        if budget is None and self.scale is not None:
            return self.scale
        if self.scale is not None:
            raise ValueError(
                f"keep is {budget} beside M3(scale={self.scale}), which states the same; give one of them"
            )
        budget = 0.25 if budget is None else budget
        scales = nested_scales(grid.height, grid.width)
        if len(scales) == 1:
            raise ValueError(
                f"tiles of {grid.height} × {grid.width} tokens divide into no square blocks, so M3 has no "
                "coarser scale for them; use averagepool, or pictures of another size"
            )
        if isinstance(budget, float):
            fitting = [scale for scale in scales if scale <= budget * grid.tokens_per_tile]
        else:
            fitting = [scale for scale in scales if self._layout(grid, scale).num_tokens <= budget]
        return max(fitting, default=scales[-1])

    def retained_count(self, grid: Grid | int, budget: float | int | None) -> int:
        """How many tokens of an image stay, separators included; a bare number of tokens is taken for the
        largest square in it."""
        if keeps_everything(budget):
            return token_count(grid)
        if isinstance(grid, int):
            grid = Grid.single(math.isqrt(grid), math.isqrt(grid))
        return self._layout(grid, self.scale_of(grid, budget)).num_tokens

    def select(self, features: Tensor, grid: Grid | None, count: int, scores: Tensor | None = None) -> Tensor:
        """Mask [N] of `count` evenly spaced tokens: what stays where nothing can be averaged."""
        mask = torch.zeros(len(features), dtype=torch.bool, device=features.device)
        mask[uniform(len(features), count, features.device)] = True
        return mask

    def reduce(self, image: Image, budget: float | int | None) -> Selection:
        """The means, at the places of the tokens in the middle of their blocks."""
        grid = image.grid
        if grid is None:
            raise ValueError(
                f"the layout of this image's {image.num_tokens} tokens is not known, so there are no blocks "
                "to average; use a reducer that needs the features alone, such as divprune"
            )
        scale = self.scale_of(grid, budget)
        means = nested_pool(whole_tiles(image), scale, size=(grid.height, grid.width), exact=self.exact)
        return placed(image, self._layout(grid, scale), means)

    def _layout(self, grid: Grid, scale: int) -> Grid:
        side = block_side(grid.height, grid.width, scale, exact=self.exact)
        return resized(grid, grid.height // side, grid.width // side)
