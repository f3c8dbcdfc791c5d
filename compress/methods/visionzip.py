"""VisionZip: keep the tokens with the most attention from the class token, and merge the others."""

import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..algorithms.fold import visionzip, visionzip_order
from ..algorithms.grid import Grid
from ..reducer import FeatureReducer, Image, Selection, TowerLayer, count_of, keeps_everything, token_count


@dataclass(kw_only=True)
class VisionZip(FeatureReducer):
    """VisionZip: Longer is Better but Not Necessary in Vision Language Models (Yang et al., CVPR 2025, arXiv
    2412.04467).

    Of every tile the class token and the patches it attends to most stay (`dominant` in all); the others are
    added to `contextual` evenly spaced ones that have the most similar keys. `keep` changes the sum of both,
    in the same proportion, to equal numbers for all tiles. Merging happens before the projector, padding
    included; tokens enter in the paper's order, for which positions="paper" is meant: the thumbnail's, then
    the tiles' dominant patches row by row, class tokens and merged tokens. Towers without a class token, and
    projectors that take more than states, have the projected features merged, at their places in the image.
    """

    summary: ClassVar = "dominant tokens, the rest merged"
    merges: ClassVar = True
    paper: ClassVar = "arXiv 2412.04467"
    verified: ClassVar = "picks equal, merged states, logits 2.6e-6"

    dominant: int = 54
    contextual: int = 10
    layer: TowerLayer = "features"

    default_keep: ClassVar[None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dominant < 1 or self.contextual < 0:
            raise ValueError(
                f"dominant is {self.dominant} and contextual {self.contextual}; at least 1 (the class token) "
                "and 0 are accepted"
            )

    def tower_layers(self) -> dict[TowerLayer, bool]:
        """Probabilities of the layer that makes the features."""
        return {self.layer: True}

    def wants_states(self) -> TowerLayer:
        """The keys of the same layer, and the states that are projected."""
        return self.layer

    def retained_count(self, grid: Grid | int, budget: float | int | None) -> int:
        """Equally many tokens of every tile, at least one and otherwise at most the budget; without a budget
        `dominant` and `contextual` of each."""
        if keeps_everything(budget):
            return token_count(grid)
        tokens, tiles, each = grid, 1, grid
        if isinstance(grid, Grid):
            tokens, tiles, each = grid.num_tokens, grid.num_tiles, grid.tokens_per_tile
        total = (self.dominant + self.contextual) * tiles if budget is None else count_of(budget, tokens)
        if total < tiles:
            warnings.warn(
                f"VisionZip keeps at least one token of each of an image's {tiles} tiles, which is more than "
                f"the budget of {total}",
                stacklevel=2,
            )
        return tiles * max(1, min(total // tiles, tokens // tiles, each))

    def scores(self, image: Image) -> Tensor:
        """Attention of each token, summed over heads [N]; -inf for newlines."""
        return self.per_token(image.attention(self.layer).float().sum(1), image.grid)

    def select(self, features: Tensor, grid: Grid | None, count: int, scores: Tensor | None = None) -> Tensor:
        """Mask [N] of the tokens kept or merged into when projected features are merged, by `scores` [N]."""
        scores = self.need(scores)
        mask = torch.zeros_like(scores, dtype=torch.bool)
        mask[self._fold(features, scores, count)[0]] = True
        return self.completed(mask, count)

    def reduce(self, image: Image, budget: float | int | None) -> Selection:
        """Dominant and merged tokens."""
        rows = image.attention(self.layer).float()
        tiles, _, tokens = rows.shape
        count = self.retained_count(image.grid or image.num_tokens, budget)
        if image.states is None or image.project is None or image.states.shape[1] != tokens + 1:
            places, values = self._fold(image.features, self.scores(image), count)
            return image.arranged(values, places, in_place=True)
        merged = self._merged(count // tiles)
        folded = visionzip(
            image.states, F.pad(rows, (1, 0)), image.keys.mean(2), count // tiles - merged, merged
        )
        # [tiles, dominant + contextual]: the place of each dominant patch in the sequence, -1 for others
        where = (
            torch.arange(tokens, device=rows.device)[None]
            if image.grid is None
            else image.grid.place.to(rows.device)
        )
        source = F.pad(where.gather(1, folded.kept[:, 1:] - 1), (1, merged), value=-1).flatten()
        states = folded.tokens.flatten(0, 1)
        if tiles > 1:
            order = visionzip_order(folded.kept, merged, image.grid)
            source, states = source[order], states[order]
        return image.arranged(image.project(states), source, in_place=not image.renumbered)

    def _merged(self, count: int) -> int:
        """How many of `count` tokens are contextual ones."""
        return min(count - 1, round(count * self.contextual / (self.dominant + self.contextual)))

    def _fold(self, features: Tensor, scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Places and values of at most `count` tokens: features [N, D] merged, scores [N] -inf for
        newlines."""
        patches = (scores > -torch.inf).nonzero().squeeze(1)
        count = min(count, len(patches))
        merged = self._merged(count)
        # `visionzip` always keeps the class token, which these features lack: a row of zeros stands in.
        hidden = F.pad(features[patches], (0, 0, 1, 0))[None]
        attention = F.pad(scores[patches], (1, 0))[None, None]
        folded = visionzip(hidden, attention, hidden, count - merged + 1, merged)
        kept = folded.kept[0, 1:] - 1
        rest = torch.ones_like(patches, dtype=torch.bool).index_fill(0, kept, False).nonzero().squeeze(1)
        targets = rest[:: len(rest) // merged][:merged] if merged else rest[:0]
        return patches[torch.cat([kept, targets])], folded.tokens[0, 1:]
