"""GlobalCom²: the thumbnail decides how many tokens of each tile stay, and helps to rank them."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..algorithms.anyres import Geometry, Newline, TileSelection, globalcom2
from ..algorithms.grid import Grid
from ..algorithms.select import top_k_mask
from ..reducer import FeatureReducer, Image, Selection, TowerLayer


@dataclass(kw_only=True)
class GlobalCom2(FeatureReducer):
    """Compression with Global Guidance: Towards Training-free High-Resolution MLLMs Acceleration (Liu et al.,
    AAAI 2026, arXiv 2501.05179).

    `keep` is the paper's retention ratio, 0.25, here of all tokens with the newlines. Tokens are ranked by
    the class token's logits in the last tower `layer`, mean over heads: a tile's own plus the thumbnail's at
    the same place; the higher the `temperature`, the more evenly tiles share. Newlines stay for all "rows" of
    the picture, or for those that keep a token (`newline="nonempty"`), and take at most half of the budget.
    Images without a thumbnail keep the best of all.

    `geometry="reference"` repeats the published code, mistakes included (see `anyres.globalcom2`): newlines
    come on top of the budget, for rows of padding too, and the thumbnail's tokens enter by falling score.
    """

    summary: ClassVar = "the thumbnail steers the tiles"
    paper: ClassVar = "arXiv 2501.05179"
    verified: ClassVar = "ranks and sequences equal for 5 pictures, logits 7.4e-6"

    temperature: float = 10.0
    newline: Newline | None = None
    geometry: Geometry = "correct"
    layer: TowerLayer = -1

    default_keep: ClassVar[float] = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.newline == "reference" and self.geometry == "correct":
            raise ValueError('newline="reference" takes geometry="reference": models have no such newlines')

    def tower_layers(self) -> dict[TowerLayer, bool]:
        """Logits of one layer."""
        return {self.layer: False}

    def scores(self, image: Image) -> Tensor:
        """Mean logit of each tile's tokens [tiles, n]."""
        # Only shares depend on the scale, for which `anyres.globalcom2` takes 10: ranks use unit lengths.
        return image.attention(self.layer).float().mean(1) * (10.0 / self.temperature)

    def select(self, features: Tensor, grid: Grid | None, count: int, scores: Tensor | None = None) -> Tensor:
        """Mask [N] of exactly `count` tokens by `scores` [tiles, n], newlines counted."""
        scores = self.need(scores)
        if grid is None or grid.thumbnail is None:
            return top_k_mask(self.per_token(scores, grid), count)
        newline: Newline = "nonempty" if self.newline == "nonempty" else "rows"
        newlines = int(grid.separators.sum())
        patches = grid.num_tokens - newlines
        low, high = max(count - newlines, min((count + 1) // 2, patches)), min(count, patches)
        while newline == "nonempty" and low < high:  # the fewest patches that leave no room
            middle = (low + high) // 2
            room = len(globalcom2(scores, grid, total=middle, newline=newline).packed) < count
            low, high = (middle + 1, high) if room else (low, middle)
        packing = globalcom2(scores, grid, total=low, newline=newline)
        is_newline = packing.packed < 0
        mask = torch.zeros(grid.num_tokens, dtype=torch.bool, device=scores.device)
        mask[packing.places[~is_newline]] = True
        mask[packing.places[is_newline][: count - low]] = True
        return self.completed(mask, count)

    def reduce(self, image: Image, budget: float | int) -> Selection:
        """The tokens kept of the image; in reference geometry in its order, with newlines of padding."""
        if self.geometry == "correct" or image.grid is None or image.grid.thumbnail is None:
            return super().reduce(image, budget)
        packing = self.tiles(image, budget)
        values, is_newline = image.features[packing.places.clamp_min(0)], packing.packed < 0
        if bool(is_newline.any()):
            values[is_newline] = image.newline.to(values)
        # Parity: tokens after the thumbnail pass through a float16 buffer.
        whole = int((packing.kept < image.grid.tokens_per_tile).sum())
        values[whole:] = values[whole:].half().to(values)
        return image.arranged(values, packing.places)

    def tiles(self, image: Image, budget: float | int) -> TileSelection:
        """The tokens that the published code keeps of an image with a thumbnail."""
        amount = {"ratio": budget} if isinstance(budget, float) else {"total": budget}
        return globalcom2(
            self.scores(image), image.grid, newline=self.newline, geometry="reference", **amount
        )
