"""M3's tokens of an image in tiles: pooled tile by tile, then merged as LLaVA-NeXT merges.

"Matryoshka Multimodal Models" (Cai et al., 2024, arXiv 2405.17430). `nested_pool` and `nested` pool;
`compress.M3` attaches to a model.
"""

from torch import Tensor

from ...nn.nested_pooling import block_side, nested, nested_pool, nested_scales
from ..algorithms.grid import Grid, square_side

__all__ = ["block_side", "merged_tiles", "nested", "nested_pool", "nested_scales"]


def merged_tiles(
    tiles: Tensor,
    rows: int,
    cols: int,
    *,
    image_size: tuple[int, int] | None = None,
    newline: Tensor | None = None,
) -> Tensor:
    """The tokens of an image as they enter the language model [n, D]: the tile that shows it whole, then the
    others stitched to one map, read row by row.

    `tiles` [1 + rows · cols, s · s, D] are pooled already, the whole picture first, or the whole picture
    alone. With `image_size` (height, width in pixels) padding is cut away from the map; `newline` [D] ends
    each of its rows, or a picture without further tiles. Raises ValueError for another number of tiles and
    for tiles that are not square.
    """
    side = square_side(tiles.shape[1])
    if len(tiles) == 1:
        layout = Grid.tiled(1, 1, 1, side**2, newline=newline is not None)
    elif len(tiles) == 1 + rows * cols:
        layout = Grid.tiled(
            rows,
            cols,
            side,
            side,
            thumbnail="first",
            image_size=image_size,
            newline=newline is not None,
            decimals=None,
        )
    else:
        raise ValueError(
            f"tiles are {list(tiles.shape)}; {rows} × {cols} tiles and the whole are {1 + rows * cols}"
        )
    tokens = tiles.flatten(0, 1)[layout.flat.clamp_min(0).to(tiles.device)]
    return tokens if newline is None else tokens.where(~layout.separators[:, None].to(tiles.device), newline)
