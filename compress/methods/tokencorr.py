"""TokenCorr: as many tokens of each tile as its content needs, by class attention and repetition."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..algorithms.grid import Grid
from ..algorithms.information import informative_order
from ..reducer import FeatureReducer, Image, Selection, TowerLayer, count_of, token_count


@dataclass(kw_only=True)
class TokenCorr(FeatureReducer):
    """Token-level Correlation-guided Compression for Efficient Multimodal Document Understanding (Zhang et
    al., 2024, arXiv 2407.14439).

    A re-implementation from the paper's description: its code was never published, so no output of this class
    has been compared with the original's.

    Of every tile those tokens stay that get unusually much attention from the class token in the
    `deep_layer`, and others drawn by its attention in the `low_layer`: `sample_share` of the tile's tokens
    times the share of those that do not repeat. A token repeats if the keys of at least `redundant_share` of
    the tile have a cosine above `threshold` with its own. The thumbnail stays whole. `deterministic` takes
    the highest attention in place of draws, which depend on the image and the `seed` alone.

    With `keep` the number is the budget's instead, in equal shares for all tiles, outliers first. Newline
    vectors go first. Where the tower's keys cannot be matched with tokens, projected features are compared.
    """

    summary: ClassVar = "attention outliers, and draws by repetition"
    paper: ClassVar = "arXiv 2407.14439"

    threshold: float = 0.9
    redundant_share: float = 0.05
    sample_share: float = 0.5
    deep_layer: TowerLayer = "features"
    low_layer: TowerLayer = 1
    deterministic: bool = False
    seed: int = 0

    default_keep: ClassVar[None] = None
    by_token: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("redundant_share", "sample_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it takes a share above 0 and up to 1")

    def tower_layers(self) -> dict[TowerLayer, bool]:
        """Probabilities of both layers."""
        return {self.deep_layer: True, self.low_layer: True}

    def wants_states(self) -> TowerLayer:
        """The keys of the low layer."""
        return self.low_layer

    def retained_count(self, grid: Grid | int, budget: float | int | None) -> int:
        """The budget in tokens. Raises ValueError without one: the picture decides."""
        if budget is None:
            raise ValueError("TokenCorr chooses its number of tokens by the picture; give keep to fix it")
        return count_of(budget, token_count(grid))

    def scores(self, image: Image) -> Tensor:
        """Minus the rank of each token in its tile [N], from 0; -inf for newlines."""
        return self._ranks(image)[0]

    def select(self, features: Tensor, grid: Grid | None, count: int, scores: Tensor | None = None) -> Tensor:
        """Mask [N] of the highest `scores` [N] of each tile, in even shares of `count`."""
        return self.highest_of_each_tile(self.need(scores), grid, count)

    def reduce(self, image: Image, budget: float | int | None) -> Selection:
        """The tokens kept of the image; without a budget as many of each tile as it needs."""
        if budget is not None:
            return super().reduce(image, budget)
        scores, needed = self._ranks(image)
        return Selection((scores > -needed).nonzero().squeeze(1))

    def _ranks(self, image: Image) -> tuple[Tensor, Tensor]:
        """Minus the rank of each token in its tile [N], -inf for newlines, and how many tokens its tile needs
        [N], 0 for newlines."""
        deep, low = (
            self.per_token(image.attention(layer).float().mean(1), image.grid)
            for layer in (self.deep_layer, self.low_layer)
        )
        keys = image.encoded_keys()
        keys = image.features if keys is None else keys
        settings = {name: getattr(self, name) for name in ("threshold", "redundant_share", "sample_share")}
        generator = None if self.deterministic else image.generator(self.seed)
        scores, needed = torch.full_like(deep, -torch.inf), torch.zeros_like(deep)
        for places, _ in self.even_shares(image.grid, image.num_tokens, 0):
            own = places.to(deep.device)
            order, number = informative_order(deep[own], low[own], keys[own], generator, **settings)
            scores[own[order]] = -torch.arange(len(own), device=deep.device).float()
            whole = image.grid is not None and int(image.grid.tile[places[0]]) == image.grid.thumbnail
            needed[own] = len(own) if whole else number
        return scores, needed
