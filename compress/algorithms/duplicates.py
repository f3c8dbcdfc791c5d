"""Rows of features that occur more than once."""

import torch
from torch import Tensor


def lowest_copies(rows: Tensor, nearest: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The lowest place that holds the same row as each of `rows` [N, D], [N]; None if all differ.

    `nearest` [N] is each row's distance to the nearest other one: only rows with a neighbour within rounding
    are compared, in `dtype`. Rows of zeros, which are at distance 1 from every row, count as different.
    """
    close = (nearest < (1e-4 if torch.finfo(dtype).eps < 1e-5 else 0.1)).nonzero().squeeze(1)
    if len(close) < 2:
        return None
    _, kind = torch.unique(rows[close].to(dtype), dim=0, return_inverse=True)
    lowest = torch.full((len(close),), len(rows), device=rows.device).scatter_reduce(0, kind, close, "amin")
    if bool((lowest[kind] == close).all()):
        return None
    group = torch.arange(len(rows), device=rows.device)
    group[close] = lowest[kind]
    return group
