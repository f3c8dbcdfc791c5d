"""The image itself made smaller: the baseline that spends no more tokens than the budget on all of it."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from .. import select
from ..grid import Grid, unpadded
from ..reducer import FeatureReducer, Image, Selection, count_of


@dataclass(kw_only=True)
class Downsample(FeatureReducer):
    """Shrinks the picture, encodes it once more with the model's own tower and projector, and keeps those tokens.

    An image keeps h × w tokens, the layout of `shrunken`: never more than the budget's count, often fewer. They
    stand at the places of the tokens nearest to them in the picture. Where the tower sees tiles, a count that the
    thumbnail has room for shrinks the thumbnail, and a larger one all tiles alike, without the thumbnail and the
    vectors between rows. Tower and projector run twice.

    Features that were given (`mm_encoder_outputs`) cannot be shrunk: `attach` must see the pixel values. Raises
    TypeError for families that cannot encode a picture of another size.
    """

    paper_positions: ClassVar = "keep"
    wants_pixels: ClassVar = True

    def retained_count(self, grid: Grid | int, budget: float | int) -> int:
        """Tokens that stay of an image: h · w; a bare number of tokens is taken for the largest square in it."""
        if isinstance(grid, int):
            side = math.isqrt(grid)
            return shrunken(Grid.single(side, side), count_of(budget, grid)).num_tokens
        return shrunken(grid, count_of(budget, grid.num_tokens)).num_tokens

    def select(self, features: Tensor, grid: Grid | None, count: int, scores: Tensor | None = None) -> Tensor:
        """Mask [N] of `count` evenly spaced tokens: what stays where there is no model to encode again."""
        mask = torch.zeros(len(features), dtype=torch.bool, device=features.device)
        mask[select.uniform(len(features), count, features.device)] = True
        return mask

    def reduce(self, image: Image, budget: float | int) -> Selection:
        """The smaller picture's tokens, at the places nearest to them."""
        if image.encode is None:
            raise ValueError(
                "the image was given as features, or they were made before attaching, so there is no picture to shrink; "
                "give the attached model pixel_values"
            )
        small = shrunken(image.grid, count_of(budget, image.num_tokens))
        values, *deepstack = image.encode(small)
        kept, order = nearest_places(image.grid, small).to(values.device).sort()
        deepstack = [layer[order] for layer in deepstack] or None
        return Selection(kept, values[order], torch.full_like(kept, -1), deepstack)


def shrunken(grid: Grid, count: int) -> Grid:
    """The layout of the same picture in at most `count` tokens, and no more than it has.

    h × w tokens a tile, with h : w as in the grid: of the exactly scaled sides one is rounded down or up, and the
    other is what the count then allows, rounded up at most; of these the most tokens, then the nearest aspect.
    The thumbnail alone, where there is one that has so many tokens; else all other tiles, with the padding
    around the picture cut away. No separators. Raises ValueError for fewer tokens than tiles.
    """
    if grid.thumbnail is not None and count <= grid.tokens_per_tile:
        height, width = _tile_size(grid, count, whole=True)
        index = torch.arange(height * width)
        tile = torch.full_like(index, grid.thumbnail)
    else:
        height, width = _tile_size(grid, count, whole=False)
        tiles = Grid.tiled(grid.rows, grid.cols, height, width, image_size=grid.image_size)
        tile, index = tiles.tile + grid.first, tiles.index
    return replace(grid, tile=tile, index=index, height=height, width=width)


def _tile_size(grid: Grid, count: int, whole: bool) -> tuple[int, int]:
    """Tokens (height, width) a tile, for the thumbnail (`whole`) or all other tiles in `count` tokens."""

    def area(height: int, width: int) -> int:
        if not whole:
            height, width = grid.rows * height, grid.cols * width
            if grid.image_size is not None:
                top, bottom, left, right = unpadded(height, width, grid.image_size)
                return (bottom - top) * (right - left)
        return height * width

    full = area(grid.height, grid.width)
    scale = min(1.0, math.sqrt(count / full))
    rows, cols = scale * grid.height, scale * grid.width
    found = []
    for height in {max(1, math.floor(rows)), math.ceil(rows)}:
        fitting = (width for width in range(math.ceil(cols), 0, -1) if area(height, width) <= count)
        found += [(height, width) for width in fitting][:1]
    for width in {max(1, math.floor(cols)), math.ceil(cols)}:
        fitting = (height for height in range(math.ceil(rows), 0, -1) if area(height, width) <= count)
        found += [(height, width) for height in fitting][:1]
    if not found:
        raise ValueError(f"{count} tokens cannot show {grid.rows * grid.cols} tiles or frames; raise keep")

    def merit(size: tuple[int, int]) -> tuple[float, float, int]:
        height, width = size
        return area(height, width), -abs(math.log(height * grid.width / (width * grid.height))), width

    return max(found, key=merit)


def nearest_places(grid: Grid, small: Grid) -> Tensor:
    """For each token of a layout made by `shrunken`, the place of the grid's token that its centre lies in, [n]."""
    if grid.thumbnail is not None and bool((small.tile == grid.thumbnail).all()):
        board = grid.place[grid.thumbnail].view(grid.height, grid.width)
        height, width = small.height, small.width
    else:
        top, bottom, left, right = grid.rectangle
        board = torch.full((bottom - top, right - left), -1)
        board[grid.map_row[grid.shown] - top, grid.map_col[grid.shown] - left] = grid.place[grid.cut][grid.shown]
        top, bottom, left, right = small.rectangle
        height, width = bottom - top, right - left
    # Sides are at most the board's, so no two centres lie in one token.
    rows = (2 * torch.arange(height) + 1) * board.shape[0] // (2 * height)
    cols = (2 * torch.arange(width) + 1) * board.shape[1] // (2 * width)
    return board[rows[:, None], cols].flatten()
