"""PruMerge: as many tokens as stand out in the class token's attention, and the others merged into them."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..anyres import split_budget
from ..fold import Folded, prumerge
from ..grid import Grid
from ..reducer import FeatureReducer, Image, Selection, TowerLayer, count_of
from ..select import full_precision, top_k, uniform


@dataclass(kw_only=True)
class PruMerge(FeatureReducer):
    """LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models (Shang et al., 2024, arXiv
    2403.15388).

    Of every tile those patches stay that get unusually much attention from the class token in a `layer` (heads
    joined to one), more in fuller pictures; `plus` adds evenly spaced ones. To each are added its `neighbours` with
    the most similar keys, weighted by attention, and one token more sums those left out. With `keep` the number is
    the budget's instead: highest attention first (of `plus` a quarter so, the paper's proportion). Merging happens
    before the projector where that takes the tower's states; tokens enter by falling attention, for which
    positions="paper" is meant.
    """

    plus: bool = False
    neighbours: int = 32
    layer: TowerLayer = -1

    default_keep: ClassVar[None] = None

    def tower_layers(self) -> dict[TowerLayer, Literal["joined"]]:
        """Probabilities of the heads joined to one."""
        return {self.layer: "joined"}

    def wants_states(self) -> TowerLayer:
        """The keys of the same layer, and the states that are projected."""
        return self.layer

    def retained_count(self, grid: Grid | int, budget: float | int | None) -> int:
        """The budget in tokens. Raises ValueError without one: the picture decides."""
        if budget is None:
            raise ValueError("PruMerge chooses its number of tokens by the picture; give keep to fix it")
        return super().retained_count(grid, budget)

    def scores(self, image: Image) -> Tensor:
        """Attention of each token [N]; -inf for newlines."""
        return self.per_token(image.attention(self.layer)[:, 0].float(), image.grid)

    def select(self, features: Tensor, grid: Grid | None, count: int, scores: Tensor | None = None) -> Tensor:
        """Mask [N] of the `count` tokens that others would merge into, by `scores` [N]."""
        mask = torch.zeros_like(self.need(scores), dtype=torch.bool)
        mask[self._chosen(scores, count)] = True
        return mask
