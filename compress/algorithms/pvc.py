"""PVC's preprocessing: the tiles of a picture, the frames of a video, and still pictures as videos."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

TILE = 448
STILL_FRAMES = 4  # how often a picture is repeated as a video
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


def pvc_grid(width: int, height: int, max_tiles: int, side: int = TILE) -> tuple[int, int]:
    """Columns and rows of square tiles of `side` pixels for a picture, at most `max_tiles` in all.

    The grid whose shape is nearest to the picture's; of equal ones the larger, where the picture has more
    than half of its pixels. Raises ValueError for sizes below 1.
    """
    if min(width, height, max_tiles, side) < 1:
        raise ValueError(
            f"a picture of {width} × {height} in up to {max_tiles} tiles of {side}; give 1 or more"
        )
    grids = [(i, j) for i in range(1, max_tiles + 1) for j in range(1, max_tiles // i + 1)]
    best, least = (1, 1), float("inf")
    for columns, rows in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        difference = abs(width / height - columns / rows)
        is_large = width * height > 0.5 * side * side * columns * rows
        if difference < least or (difference == least and is_large):
            best, least = (columns, rows), difference
    return best


def pvc_tiles(image: Image.Image, max_tiles: int = 12, side: int = TILE) -> Tensor:
    """The tiles of a picture, row by row, and behind several of them the whole picture as the last:
    [P, 3, side, side], normalised by ImageNet's mean and deviation.

    Pictures have up to 12 tiles, frames of videos 1. PVC: Progressive Visual Token Compression for Unified
    Image and Video Processing in Large Vision-Language Models (Yang et al., 2024, arXiv 2412.09613).
    """
    image = image.convert("RGB")
    columns, rows = pvc_grid(*image.size, max_tiles, side)
    canvas = image.resize((side * columns, side * rows), Image.Resampling.BICUBIC)
    corners = [(side * column, side * row) for row in range(rows) for column in range(columns)]
    tiles = [canvas.crop((x, y, x + side, y + side)) for x, y in corners]
    if len(tiles) > 1:
        tiles.append(image.resize((side, side), Image.Resampling.BICUBIC))
    pixels = torch.from_numpy(np.stack([np.asarray(tile) for tile in tiles])).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (pixels - mean) / std


def pvc_frames(
    last: int, fps: float, count: int, bounds: tuple[float, float] | Sequence[float] | None = None
) -> list[int]:
    """The numbers of `count` frames, each from the middle of a stretch of the video.

    The video has frames 0 to `last`, `fps` per second; `bounds` limits it to a time from and to, in seconds.
    Short videos repeat frames. Raises ValueError for an empty stretch.
    """
    start, end = 0, last
    if bounds is not None:
        first, final = bounds
        start, end = max(0, round(first * fps)), min(round(final * fps), last)
    if count < 1 or fps <= 0 or end < start:
        raise ValueError(
            f"{count} frames from {start} to {end} at {fps} frames per second; give a count and a rate above "
            "0, and bounds in seconds within the video"
        )
    stretch = (end - start) / count
    return [int(start + stretch / 2 + round(stretch * number)) for number in range(count)]


def still_video(tiles: Tensor, frames: int = STILL_FRAMES) -> Tensor:
    """Pictures [P, 3, H, W] as videos whose frames are equal, [P, frames, 3, H, W]."""
    return tiles[:, None].expand(-1, frames, -1, -1, -1)
