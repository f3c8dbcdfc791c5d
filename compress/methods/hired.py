"""HiRED: a budget for every tile, by where the thumbnail's attention lies."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, stack

from ..algorithms.anyres import Geometry, TileSelection, hired
from ..algorithms.grid import Grid
from ..algorithms.select import top_k_mask
from ..reducer import FeatureReducer, Image, Selection, TowerLayer, count_of, keeps_everything, token_count


@dataclass(kw_only=True)
class HiRED(FeatureReducer):
    """HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution Vision-Language
    Models (Arif et al., AAAI 2025, arXiv 2408.10945).

    `keep` is the paper's token budget rate, 0.2. A share `alpha` of it goes to the thumbnail; the rest is
    shared among the tiles by where the thumbnail's most `salient` tokens in the `early` layer lie. In each
    tile the tokens stay that the class token attends to most in the `late` layer. Images without a thumbnail
    keep the best of all.

    The original spends part of the budget on padding and loses remainders; `redistribute` (unless it is
    False, or geometry is "reference") keeps exactly as many tokens as the budget states.
    `geometry="reference"` repeats the published code, mistakes included (see `anyres.hired`): there `keep` is
    a share of the encoder's tokens.
    """

    summary: ClassVar = "a budget per tile by attention"
    paper: ClassVar = "arXiv 2408.10945"
    verified: ClassVar = "picks and packing equal in 6 settings, logits 2.6e-6"

    alpha: float = 0.5
    salient: int | Literal["mass"] | None = None
    redistribute: bool | None = None
    geometry: Geometry = "correct"
    early: TowerLayer = 0
    late: TowerLayer = "features"

    default_keep: ClassVar[float] = 0.2

    def tower_layers(self) -> dict[TowerLayer, bool]:
        """Probabilities of both layers."""
        return {self.early: True, self.late: True}

    def wants_states(self) -> TowerLayer | None:
        """In reference geometry: tokens of the padding may stay, which only the tower has."""
        return "features" if self.geometry == "reference" else None

    def retained_count(self, grid: Grid | int, budget: float | int) -> int:
        """The budget in tokens; without redistribution up to as many stay."""
        if self.geometry == "correct" or keeps_everything(budget):
            return count_of(budget, token_count(grid))
        encoded = grid if isinstance(grid, int) else grid.num_tiles * grid.tokens_per_tile
        return min(budget if isinstance(budget, int) else int(encoded * budget), encoded)

    def scores(self, image: Image) -> Tensor:
        """Attention in the early and the late layer [2, tiles, heads, n]."""
        return stack([image.attention(self.early), image.attention(self.late)]).float()

    def select(self, features: Tensor, grid: Grid | None, count: int, scores: Tensor | None = None) -> Tensor:
        """Mask [N] of exactly `count` tokens by `scores` [2, tiles, heads, n], with redistribution."""
        early, late = self.need(scores)
        if grid is None or grid.thumbnail is None:
            return top_k_mask(self.per_token(late.sum(1), grid), count)
        total = min(count, int((~grid.separators).sum()))
        chosen = self._hired(early, late, grid, total, redistribute=True).kept
        mask = grid.separators.new_zeros(grid.num_tokens).to(late.device)
        mask[grid.place.flatten().to(late.device)[chosen]] = True
        return self.completed(mask, count)

    def reduce(self, image: Image, budget: float | int) -> Selection:
        """The tokens kept of the image; in reference geometry in its order, with tokens of the padding."""
        spend = self.geometry == "correct" if self.redistribute is None else self.redistribute
        if image.grid is None or image.grid.thumbnail is None or (spend and self.geometry == "correct"):
            return super().reduce(image, budget)
        packing = self.tiles(image, budget)
        if self.geometry == "correct":
            return Selection(packing.mask(image.grid).nonzero().squeeze(1))
        values, padding = image.features[packing.places.clamp_min(0)], packing.places < 0
        if bool(padding.any()):
            if image.states is None or image.project is None:
                raise ValueError(
                    'geometry="reference" keeps tokens of the padding, and this model does not let them be '
                    'projected; use geometry="correct"'
                )
            states = image.states[:, -image.grid.tokens_per_tile :].flatten(0, 1)
            values[padding] = image.project(states[packing.packed[padding]]).to(values)
        return image.arranged(values, packing.places)

    def tiles(self, image: Image, budget: float | int) -> TileSelection:
        """The tokens that the tiles of an image with a thumbnail keep."""
        total = self.retained_count(image.grid, budget)
        return self._hired(*self.scores(image), image.grid, total, redistribute=bool(self.redistribute))

    def _hired(
        self, early: Tensor, late: Tensor, grid: Grid, total: int, redistribute: bool
    ) -> TileSelection:
        settings = {"alpha": self.alpha, "salient": self.salient, "geometry": self.geometry}
        return hired(early, late, grid, total=total, redistribute=redistribute, **settings)
