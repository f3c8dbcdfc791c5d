"""Positions of kept visual tokens, spread anew over the extent that their image had in the whole prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..algorithms.spreading import spread_places
from ..families import Host
from ..layout import stretches

if TYPE_CHECKING:
    from .call import Call


def spread_positions(host: Host, call: Call, positions: Tensor, index: Tensor, valid: Tensor) -> Tensor:
    """The positions of the tokens at `index` [B, L'], of which those that are `valid` [B, L'] are real.

    `positions` [B or 1, L] or [planes, B or 1, L] are those of the whole prompt. Text keeps its own. What is
    left of an image stands, in its order, at places of that image which are evenly spread: over the sequence,
    or over the rows and columns of positions in several planes (M-RoPE). Each stretch of neighbouring visual
    tokens (a tile, where text stands between tiles) is spread by itself, so that none moves past text. Raises
    ValueError for positions in several planes that are not those of a grid.
    """
    index, valid = index.to(positions.device), valid.to(positions.device)
    full = positions.expand(*positions.shape[:-2], len(index), positions.shape[-1])
    spread = full.gather(-1, index.expand(*full.shape[:-1], index.shape[-1])).clone()
    moved = slice(1, None) if full.ndim == 3 and len(full) == 4 else slice(None)  # the first counts text
    image = call.prompt.image.to(index.device).gather(1, index).masked_fill(~valid, -1)
    for number, span in enumerate(call.prompt.spans):
        for places in stretches(span.places.to(index.device)):
            inside = (image[span.row] == number) & (index[span.row] >= places[0])
            kept = (inside & (index[span.row] <= places[-1])).nonzero().squeeze(1)
            if len(kept) in (0, len(places)):
                continue
            lines = 1 if full.ndim == 2 else _lines(host, full[-3:, span.row, places])
            chosen = places[spread_places(len(kept), lines, len(places) // lines).to(places.device)]
            if full.ndim == 2:
                spread[span.row, kept] = full[span.row, chosen]
            else:
                spread[moved, span.row, kept] = full[moved, span.row, chosen]
    return spread


def _lines(host: Host, planes: Tensor) -> int:
    """How many lines of equal length the positions [3, N] of an image (time, height, width) have."""
    changes = (planes[:2, 1:] != planes[:2, :-1]).any(0).nonzero().squeeze(1) + 1
    edges = torch.cat([changes.new_zeros(1), changes, changes.new_tensor([planes.shape[1]])])
    lengths = edges.diff()
    columns = planes[2].view(len(lengths), -1) if bool((lengths == lengths[0]).all()) else None
    if columns is None or not torch.equal(columns, columns[:1].expand_as(columns)):
        raise ValueError(
            f"the positions that {host.name} gives to an image of {planes.shape[1]} tokens are not those of "
            "a grid (lines of equal length, with the same columns), over which kept tokens could be spread; "
            "attach with positions='keep'"
        )
    return len(lengths)
