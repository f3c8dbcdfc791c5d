"""Images whose tiles have fewer tokens: the layout of the smaller tiles, and the places that they take."""

from dataclasses import replace

import torch
from torch import Tensor

from ..algorithms.grid import Grid
from ..reducer import Image, Selection


def resized(grid: Grid, height: int, width: int) -> Grid:
    """The layout of the same tiles with height × width tokens each.

    Tiles that follow each other still do, with the separators between them. Tiles stitched to one map are
    stitched again; padding is cut away by the sizes of the smaller map, as M3's code does (lengths are cut to
    whole numbers without rounding first), and each row keeps its separator.
    """
    tile, index = grid.tile, torch.arange(height * width)
    change = (tile[1:] != tile[:-1]).nonzero().squeeze(1) + 1
    runs = [run for run in tile.tensor_split(change.cpu()) if len(run)]
    numbers = [int(run[0]) for run in runs if int(run[0]) >= 0]
    if len(numbers) == len(set(numbers)) and grid.image_size is None:
        tiles = [run if run[0] < 0 else run[:1].expand(len(index)) for run in runs]
        places = [run if run[0] < 0 else index.to(run.device) for run in runs]
        return replace(grid, tile=torch.cat(tiles), index=torch.cat(places), height=height, width=width)
    thumbnail = None if grid.thumbnail is None else "last" if grid.thumbnail else "first"
    return Grid.tiled(
        grid.rows,
        grid.cols,
        height,
        width,
        thumbnail=thumbnail,
        image_size=grid.image_size,
        newline=bool(grid.separators.any()),
        decimals=None,
    )


def whole_tiles(image: Image) -> Tensor:
    """The projected tokens of each of an image's tiles [P, N, D], padding included.

    Raises ValueError where padding was cut away and the tower's states were not recorded.
    """
    place = image.grid.place.to(image.features.device)
    if bool((place >= 0).all()):
        return image.features[place]
    if image.states is None or image.project is None:
        raise ValueError(
            "padding around the image was cut away, and the tokens there are needed beside those that show "
            "it; have the attached model make the features itself from pixel_values"
        )
    return image.project(image.states[:, -image.grid.tokens_per_tile :])


def placed(image: Image, layout: Grid, tiles: Tensor) -> Selection:
    """The tokens of smaller tiles [P, h · w, D] in the order of their `layout`, each at the place of the
    token in the middle of what it shows, or as near to it as is free."""
    grid, device = image.grid, image.features.device
    flat, separators = layout.flat.to(device), layout.separators.to(device)
    values = tiles.flatten(0, 1)[flat.clamp_min(0)]
    # The token of the full tile in the middle of each smaller one's part of the tile.
    row = (2 * (layout.index // layout.width) + 1) * grid.height // (2 * layout.height)
    col = (2 * (layout.index % layout.width) + 1) * grid.width // (2 * layout.width)
    source = grid.place.cpu()[layout.tile, row * grid.width + col].to(device)
    if bool(separators.any()):
        values[separators] = image.features[grid.separators.to(device)][0]
        rows = layout.separator_row
        middle = (rows // layout.height) * grid.height + (
            (2 * (rows % layout.height) + 1) * grid.height // (2 * layout.height)
        )
        source[separators] = torch.where(rows < 0, -1, grid.row_end.cpu()[middle.clamp_min(0)]).to(device)
    return image.arranged(values, source)
