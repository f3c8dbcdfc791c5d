"""Encoding a smaller version of the image: the baseline that shows all of it within the budget."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ..algorithms import select
from ..algorithms.grid import Grid, unpadded
from ..reducer import FeatureReducer, Image, Selection, count_of, keeps_everything, token_count


@dataclass(kw_only=True)
class Downsample(FeatureReducer):
    """Shrinks the picture, encodes it again with the model's own tower and projector, and keeps those tokens.

    An image keeps h × w tokens in the layout of `shrunken`: never more than the budget's count, often fewer.
    They take the places of the tokens nearest to them in the picture. Where the tower encodes tiles, a
    count that the thumbnail has room for shrinks the thumbnail; a larger one shrinks all tiles alike, without
    the thumbnail and the vectors between rows. Tower and projector run twice.

    The attached model must get the pixel values. Families that cannot encode a picture of another size are
    refused with TypeError.
    """

    summary: ClassVar = "the picture encoded once more, smaller"
    merges: ClassVar = True

    paper_positions: ClassVar = "keep"
    wants_pixels: ClassVar = True

    def retained_count(self, grid: Grid | int, budget: float | int) -> int:
        """h · w, the tokens that stay; a bare number of tokens is taken for the largest square in it."""
        if keeps_everything(budget):
            return token_count(grid)
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
                "there is no picture to shrink: its features were passed in, or made before attaching; give "
                "the attached model pixel_values"
            )
        small = shrunken(image.grid, count_of(budget, image.num_tokens))
        values, *deepstack = image.encode(small)
        kept, order = nearest_places(image.grid, small).to(values.device).sort()
        deepstack = [layer[order] for layer in deepstack] or None
        return Selection(kept, values[order], kept, deepstack)


def shrunken(grid: Grid, count: int) -> Grid:
    """The layout of the same picture in at most `count` tokens, and no more than it has.

    h × w tokens per tile, with h : w as in the grid: of the exactly scaled sides one is rounded down or up,
    and the other is what the count then allows, rounded up at most; the most tokens win, then the nearest
    aspect. All tiles alike, with the padding around the picture cut away; but the thumbnail alone where it
    has `count` tokens or the tiles could show no more than it. No separators. Raises ValueError for fewer
    tokens than tiles.
    """
    tiles = None
    if grid.thumbnail is None or count > grid.tokens_per_tile:
        size = _tile_size(grid, count, partial(_unpadded_tokens, grid))
        tiles = None if size is None else Grid.tiled(grid.rows, grid.cols, *size, image_size=grid.image_size)
    if tiles is not None and (grid.thumbnail is None or tiles.num_tokens > grid.tokens_per_tile):
        tile, index = tiles.tile + grid.first, tiles.index
        return replace(grid, tile=tile, index=index, height=tiles.height, width=tiles.width)
    if grid.thumbnail is None:
        raise ValueError(f"{count} tokens cannot show {grid.rows * grid.cols} tiles or frames; raise keep")
    height, width = _tile_size(grid, count, lambda height, width: height * width)
    index = torch.arange(height * width)
    return replace(grid, tile=torch.full_like(index, grid.thumbnail), index=index, height=height, width=width)


def _unpadded_tokens(grid: Grid, height: int, width: int) -> int:
    """Tokens of the picture in tiles of height × width, without padding."""
    height, width = grid.rows * height, grid.cols * width
    if grid.image_size is None:
        return height * width
    top, bottom, left, right = unpadded(height, width, grid.image_size)
    return (bottom - top) * (right - left)


def _tile_size(grid: Grid, count: int, area: Callable[[int, int], int]) -> tuple[int, int] | None:
    """Tokens (height, width) per tile with `area(height, width)` of at most `count`; None if 1 × 1 is
    more."""
    scale = min(1.0, math.sqrt(count / area(grid.height, grid.width)))
    rows, cols = scale * grid.height, scale * grid.width
    sizes = []
    for height in {max(1, math.floor(rows)), math.ceil(rows)}:
        fitting = (width for width in range(math.ceil(cols), 0, -1) if area(height, width) <= count)
        sizes += [(height, width) for width in fitting][:1]
    for width in {max(1, math.floor(cols)), math.ceil(cols)}:
        fitting = (height for height in range(math.ceil(rows), 0, -1) if area(height, width) <= count)
        sizes += [(height, width) for height in fitting][:1]

    def merit(size: tuple[int, int]) -> tuple[int, float, int]:
        tall, wide = size[0] * grid.width, size[1] * grid.height  # equal for the grid's aspect
        return area(*size), -max(tall, wide) / min(tall, wide), wide

    return max(sizes, key=merit, default=None)


def nearest_places(grid: Grid, small: Grid) -> Tensor:
    """Places [n] of the grid's tokens in which the centres of the tokens made by `shrunken` lie."""
    if grid.thumbnail is not None and bool((small.tile == grid.thumbnail).all()):
        board = grid.place[grid.thumbnail].view(grid.height, grid.width)
        height, width = small.height, small.width
    else:
        top, bottom, left, right = grid.rectangle
        board = torch.full((bottom - top, right - left), -1)
        board[grid.map_row[grid.shown] - top, grid.map_col[grid.shown] - left] = grid.place[grid.cut][
            grid.shown
        ]
        top, bottom, left, right = small.rectangle
        height, width = bottom - top, right - left
    # Sides are at most the board's, so no two centres lie in one token.
    rows = (2 * torch.arange(height) + 1) * board.shape[0] // (2 * height)
    cols = (2 * torch.arange(width) + 1) * board.shape[1] // (2 * width)
    return board[rows[:, None], cols].flatten()
