"""FasterVLM: keep the tokens with the most attention from the class token."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..algorithms.grid import Grid
from ..reducer import FeatureReducer, Image, TowerLayer


@dataclass(kw_only=True)
class FasterVLM(FeatureReducer):
    """[CLS] Attention is All You Need for Training-Free Visual Token Pruning (Zhang et al., 2024, arXiv
    2412.01818).

    Keeps equally many tokens of every tile, those with the most attention from the class token in the `layer`
    that made the features, mean over heads. Newline vectors go first.
    """

    summary: ClassVar = "highest class attention in each tile"
    paper: ClassVar = "arXiv 2412.01818"
    verified: ClassVar = "as HiRED on one tile"

    layer: TowerLayer = "features"

    by_token: ClassVar[bool] = True

    def tower_layers(self) -> dict[TowerLayer, bool]:
        """Probabilities of one layer."""
        return {self.layer: True}

    def scores(self, image: Image) -> Tensor:
        """Mean attention of each token [N]; -inf for newlines."""
        return self.per_token(image.attention(self.layer).float().mean(1), image.grid)

    def select(self, features: Tensor, grid: Grid | None, count: int, scores: Tensor | None = None) -> Tensor:
        """Mask [N] of the highest `scores` [N] of each tile, as even a share of `count` as the tiles can
        give."""
        return self.highest_of_each_tile(self.need(scores), grid, count)
