"""Choosing evenly spaced places on the grid of an image, for tokens whose positions are spread anew."""

import math

import torch
from torch import Tensor


def even_places(count: int, total: int) -> Tensor:
    """`count` different numbers out of 0 … `total` - 1, evenly spaced from the first to the last [count]; a
    single one is the middle. Raises ValueError unless 1 ≤ `count` ≤ `total`."""
    if not 1 <= count <= total:
        raise ValueError(f"{count} places were asked for out of {total}; give a count from 1 to {total}")
    if count == 1:
        return torch.tensor([(total - 1) // 2])
    steps = torch.arange(count) * (total - 1)
    return (2 * steps + count - 1) // (2 * (count - 1))  # rounded


def spread_places(count: int, lines: int, width: int) -> Tensor:
    """Numbers [count], rising, of places on a grid of `lines` × `width` (row by row), evenly spread over it.

    The tokens keep their order. They fill a coarser grid of about the same shape: its lines are evenly spaced
    over the grid's, and hold as many tokens as each other, or one more. One line is a plain sequence. Raises
    ValueError unless 1 ≤ `count` ≤ `lines` · `width`.
    """
    if not 1 <= count <= lines * width:
        raise ValueError(f"{count} tokens do not fit on {lines} × {width} places; give 1 to {lines * width}")
    rows = round(lines * math.sqrt(count / (lines * width)))
    rows = max(math.ceil(count / width), min(rows, lines, count), 1)
    row_of = torch.arange(count) * rows // count
    columns = [even_places(int(tokens), width) for tokens in torch.bincount(row_of, minlength=rows)]
    return even_places(rows, lines)[row_of] * width + torch.cat(columns)
