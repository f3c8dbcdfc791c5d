"""Nested pooling of visual tokens: means of square blocks, so that coarse tokens are means of fine ones.

"Matryoshka Multimodal Models" (Cai et al., 2024, arXiv 2405.17430; M3).
"""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def nested_scales(height: int, width: int) -> tuple[int, ...]:
    """The numbers of tokens to which a height × width map can be pooled without remainder, largest first.

    A block is a square whose side divides both sides of the map: (576, 144, 64, 36, 16, 9, 4, 1) for 24 × 24.
    """
    common = math.gcd(height, width)
    return tuple(height * width // side**2 for side in range(1, common + 1) if common % side == 0)


def block_side(height: int, width: int, scale: int, *, exact: bool = True) -> int:
    """The side of the blocks that make about `scale` tokens of a height × width map: √(height · width /
    scale), cut to a whole number.

    Raises ValueError for a scale outside 1 to height · width and, if `exact`, for one that these blocks do
    not give.
    """
    tokens = height * width
    if not 1 <= scale <= tokens:
        raise ValueError(f"scale is {scale}; a map of {height} × {width} tokens takes 1 to {tokens}")
    side = math.isqrt(tokens // scale)
    rows, cols = height // side, width // side
    if exact and (rows * cols != scale or rows * side != height or cols * side != width):
        raise ValueError(
            f"scale is {scale}, which rounds to {rows} × {cols} = {rows * cols} tokens of a map of {height} "
            f"× {width}; give one of {', '.join(map(str, nested_scales(height, width)))}, or exact=False for "
            "what it rounds to"
        )
    return side


def nested_pool(
    tokens: Tensor, scale: int, *, size: tuple[int, int] | None = None, exact: bool = True
) -> Tensor:
    """Means of square blocks of a map of tokens, row by row: [..., height · width, C] → [..., n, C].

    `size` is (height, width); without it the map is square. With `exact=False` a scale that does not divide
    the map rounds as in the original code (100 of 24 × 24 gives 144), and rows and columns that fill no block
    are left out: the last axis but one of the result is the actual count. Raises ValueError for maps that are
    not of that size and for scales as `block_side` does.
    """
    count = tokens.shape[-2]
    height, width = (math.isqrt(count),) * 2 if size is None else size
    if height * width != count:
        raise ValueError(
            f"tokens are {list(tokens.shape)}, which is not a map of {height} × {width}; give the size of "
            "the map as size=(height, width)"
        )
    side = block_side(height, width, scale, exact=exact)
    if side == 1:
        return tokens
    maps = tokens.flatten(0, -3) if tokens.ndim > 2 else tokens[None]  # [B, N, C]
    maps = maps.transpose(1, 2).unflatten(2, (height, width))
    means = F.avg_pool2d(maps, side).flatten(2).transpose(1, 2)
    return means.reshape(*tokens.shape[:-2], *means.shape[1:])


def nested(tokens: Tensor, scales: Sequence[int], *, size: tuple[int, int] | None = None) -> list[Tensor]:
    """The same tokens [..., N, C] at every one of `scales`, as `nested_pool` makes them."""
    return [nested_pool(tokens, scale, size=size) for scale in scales]
