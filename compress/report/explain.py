"""The part of a picture that each kept token shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..algorithms.grid import Grid
from ..language.call import Call


@dataclass(frozen=True)
class Explanation:
    """One image in one prompt: `tokens` [n] are the numbers of its kept visual tokens, of `num_tokens` (-1:
    what stayed shows none of them alone, as a sum of many).

    `tile` and `index` [n] are the encoder input that each shows and the row-major place in it (-1: no
    patch, as newline vectors), `boxes` [n, 4] the part of the picture as (top, left, bottom, right), each
    from 0 to 1. They are None where the layout is not known. In a cache whose heads hold tokens of their own
    `tokens` are those that some head holds, and `heads` [H_k, n] marks which head holds which.
    """

    row: int
    number: int
    num_tokens: int
    tokens: Tensor
    grid: Grid | None
    heads: Tensor | None = None

    @property
    def tile(self) -> Tensor | None:
        """The encoder input of each kept token."""
        return None if self.grid is None else self.grid.tile[self.tokens].masked_fill(self.tokens < 0, -1)

    @property
    def index(self) -> Tensor | None:
        """The place of each kept token in its encoder input."""
        return None if self.grid is None else self.grid.index[self.tokens].masked_fill(self.tokens < 0, -1)

    @property
    def boxes(self) -> Tensor | None:
        """The part of the picture that each kept token shows; NaN for separators and sums."""
        return (
            None
            if self.grid is None
            else _boxes(self.grid)[self.tokens].masked_fill(self.tokens[:, None] < 0, torch.nan)
        )

    def overlay(self, image: Any) -> Any:
        """The picture with kept patches bright and the others dimmed, as a PIL image."""
        from PIL import Image as PIL

        from ...images import load_image

        if self.grid is None:
            raise ValueError("the layout of this family's tokens is not known, so they cannot be drawn")
        if self.grid.video:
            raise ValueError(
                f"a video of {self.grid.cols} frames cannot be drawn on one picture; `tile` has the frame of "
                "each kept token and `boxes` its part of that frame"
            )
        picture = load_image(image)
        lit = torch.zeros(picture.height, picture.width, dtype=torch.bool)
        for top, left, bottom, right in self.boxes.nan_to_num(0).tolist():
            rows = slice(round(top * picture.height), round(bottom * picture.height))
            lit[rows, round(left * picture.width) : round(right * picture.width)] = True
        mask = PIL.fromarray((lit.numpy() * 255).astype("uint8"))
        dimmed = PIL.eval(picture, lambda value: value // 4)
        return PIL.composite(picture, dimmed, mask)


def _boxes(grid: Grid) -> Tensor:
    rows, cols = grid.index // grid.width, grid.index % grid.width
    height, width = grid.height, grid.width
    whole = torch.stack([rows / height, cols / width, (rows + 1) / height, (cols + 1) / width], 1)
    cut = grid.tile - grid.first
    top, bottom, left, right = grid.rectangle
    map_row = torch.div(cut, grid.cols, rounding_mode="floor") * height + rows - top
    map_col = cut % grid.cols * width + cols - left
    high, wide = bottom - top, right - left
    tiled = torch.stack([map_row / high, map_col / wide, (map_row + 1) / high, (map_col + 1) / wide], 1)
    thumbnail = (
        torch.zeros_like(cut, dtype=torch.bool) if grid.thumbnail is None else grid.tile == grid.thumbnail
    )
    boxes = whole if grid.video else torch.where(thumbnail[:, None], whole, tiled)
    boxes[grid.tile < 0] = torch.nan
    return boxes


def explain(call: Call, layer: int, cache: bool) -> list[Explanation]:
    """The images of a call and their tokens in a layer, or in its cache."""
    layer %= len(call.layouts)
    layout = call.held.get(layer, call.layouts[layer]) if cache else call.layouts[layer]
    places = layout.index.masked_fill(~layout.valid, -1)
    shown = call.layouts[layer].shown
    explanations = []
    for span in call.prompt.spans:
        in_layer = torch.isin(span.places, places[span.row]).cpu()
        tokens = in_layer.nonzero().squeeze(1)
        if shown is not None:  # states have moved to other places
            index = call.layouts[layer].index[span.row]
            numbers = [int((index == place).nonzero()[-1]) for place in span.places[tokens]]
            moved = shown[span.row, numbers].to(span.places.device)
            tokens = torch.searchsorted(span.places, moved.clamp_min(0)).masked_fill(moved < 0, -1).cpu()
        heads = None
        if cache and layer in call.heads:
            by_head = call.layouts[layer].index[span.row].masked_fill(~call.heads[layer][span.row], -1)
            heads = torch.stack([torch.isin(span.places, held).cpu()[in_layer] for held in by_head])
        if span.shown is not None:
            tokens = span.shown[tokens.clamp_min(0)].masked_fill(tokens < 0, -1)
        explanations.append(Explanation(span.row, span.number, len(span.places), tokens, span.grid, heads))
    return explanations
