"""GlobalCom²: the thumbnail says how much of each tile stays, and helps to say what."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..anyres import Geometry, Newline, TileSelection, globalcom2
from ..grid import Grid
from ..reducer import FeatureReducer, Image, Selection, TowerLayer
from ..select import top_k_mask

TEMPERATURE = 10.0


@dataclass(kw_only=True)
class GlobalCom2(FeatureReducer):
    """Compression with Global Guidance: Towards Training-free High-Resolution MLLMs Acceleration (Liu et al., AAAI
    2026, arXiv 2501.05179).

    `keep` is the paper's retention ratio, 0.25, here of all tokens with the newlines. Tokens are ranked by the class
    token's logits in the last tower `layer`, mean over heads: a tile's own plus the thumbnail's at the same place.
    `temperature` says how evenly the tiles share. The newlines that `newline` names stay (of the "rows" of the
    picture unless told, or of "nonempty" ones), unless that takes more than half of the budget. Images without a
    thumbnail keep the best of all. `geometry="reference"` repeats the published code, mistakes included (see
    `anyres.globalcom2`); newlines come on top of the budget there.
    """

    temperature: float = TEMPERATURE
    newline: Newline | None = None
    geometry: Geometry = "correct"
    layer: TowerLayer = -1

    default_keep: ClassVar[float] = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.newline == "reference" and self.geometry != "reference":
            raise ValueError('newline="reference" adds newlines that the model does not have; it needs geometry="reference"')

    def tower_layers(self) -> dict[TowerLayer, bool]:
        """Logits of one layer."""
        return {self.layer: False}

    def scores(self, image: Image) -> Tensor:
        """Mean logit of each tile's tokens [tiles, n]."""
        return image.attention(self.layer).float().mean(1)

    def select(self, features: Tensor, grid: Grid | None, count: int, scores: Tensor | None = None) -> Tensor:
        """Mask [N] of exactly `count` tokens by `scores` [tiles, n], newlines counted."""
        scores = self.need(scores)
        if grid is None or grid.thumbnail is None:
            return top_k_mask(self.per_token(scores, grid), count)
        patches = int((~grid.separators).sum())
        low, high = min(count - 1, count // 2, patches), min(count, patches)
        while high - low > 1:  # the fewest patches that leave no place unused
            middle = (low + high) // 2
            enough = len(self._tiles(scores, grid, total=middle).packed) >= count
            low, high = (low, middle) if enough else (middle, high)
        found = self._tiles(scores, grid, total=high)
        ...

    def reduce(self, image: Image, budget: float | int) -> Selection:
        ...
