"""VisPruner: the tokens with the most class attention, and of the others those that differ most."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..algorithms.grid import Grid
from ..algorithms.important_diverse import important_and_diverse
from ..reducer import FeatureReducer, Image, TowerLayer


@dataclass(kw_only=True)
class VisPruner(FeatureReducer):
    """Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs (Zhang et al.,
    ICCV 2025, arXiv 2412.01818).

    Equally many tokens of every tile stay: a share `important_ratio` of them are those with the most
    attention from the class token in a `layer`, mean over heads; the others are what is left of the rest when
    the most similar of pairs are removed, round by round. Tokens are compared before the projector, or after
    it where it is not known which states they are made of. Newline vectors go first.
    """

    summary: ClassVar = "class attention, then differing tokens"
    paper: ClassVar = "arXiv 2412.01818"
    verified: ClassVar = "picks equal in 4 sets"

    important_ratio: float = 0.5
    layer: TowerLayer = "features"

    by_token: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.important_ratio <= 1:
            raise ValueError(f"important_ratio is {self.important_ratio}; it takes a share from 0 to 1")

    def tower_layers(self) -> dict[TowerLayer, bool]:
        """Probabilities of one layer."""
        return {self.layer: True}

    def wants_states(self) -> TowerLayer:
        """The states that are projected."""
        return self.layer

    def scores(self, image: Image) -> Tensor:
        """Mean attention of each token [N]; -inf for newlines."""
        return self.per_token(image.attention(self.layer).float().mean(1), image.grid)

    def compared(self, image: Image) -> Tensor:
        """The states before the projector [N, C], or the projected tokens [N, D]."""
        states = image.encoded()
        return image.features if states is None else states

    def select(self, features: Tensor, grid: Grid | None, count: int, scores: Tensor | None = None) -> Tensor:
        """Mask [N] of exactly `count` tokens by `scores` [N] and the differences of `features` [N, C]."""
        scores = self.need(scores)
        mask = torch.zeros(len(features), dtype=torch.bool, device=features.device)
        for places, share in self.even_shares(grid, len(features), count):
            own = places.to(features.device)
            kept = important_and_diverse(scores[own], features[own], share, self.important_ratio)
            mask[own[kept.to(own.device)]] = True
        return self.completed(mask, count)
