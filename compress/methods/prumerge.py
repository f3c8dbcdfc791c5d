"""PruMerge: keep the outliers of the class token's attention, and merge the others into them."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..algorithms.anyres import split_budget
from ..algorithms.fold import Folded, prumerge
from ..algorithms.grid import Grid
from ..algorithms.select import top_k, uniform
from ..reducer import FeatureReducer, Image, Selection, TowerLayer, keeps_everything, token_count


@dataclass(kw_only=True)
class PruMerge(FeatureReducer):
    """LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models (Shang et al., 2024,
    arXiv 2403.15388).

    Of every tile those patches stay that get unusually much attention from the class token in a `layer`
    (heads joined to one), more in fuller pictures; `plus` adds evenly spaced ones. To each are added its
    `neighbours` with the most similar keys, weighted by attention, and one token more sums those left out.
    With `keep` the number is the budget's instead: highest attention first (of `plus` a quarter so, the
    paper's proportion).

    Merging happens before the projector, and tokens enter by falling attention, for which positions="paper"
    is meant. Where the projector takes more than states, projected features merge, each at its place.
    """

    summary: ClassVar = "outliers, neighbours merged in"
    merges: ClassVar = True
    paper: ClassVar = "arXiv 2403.15388"
    verified: ClassVar = "merged tokens equal, logits 2.9e-6"

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
        if keeps_everything(budget):
            return token_count(grid)
        tokens = grid if isinstance(grid, int) else int((~grid.separators).sum())
        return min(super().retained_count(grid, budget), tokens)

    def scores(self, image: Image) -> Tensor:
        """Attention of each token [N]; -inf for newlines."""
        return self.per_token(image.attention(self.layer)[:, 0].float(), image.grid)

    def select(self, features: Tensor, grid: Grid | None, count: int, scores: Tensor | None = None) -> Tensor:
        """Mask [N] of the `count` tokens that others would merge into, by `scores` [N]."""
        mask = torch.zeros_like(self.need(scores), dtype=torch.bool)
        mask[self._chosen(scores, count)] = True
        return self.completed(mask, count)

    def reduce(self, image: Image, budget: float | int | None) -> Selection:
        """The tokens merged into, tile by tile, each followed by the sum of the others."""
        weights = image.attention(self.layer)[:, 0].float()  # [tiles, n]
        device, tokens = weights.device, weights.shape[1]
        if image.grid is None:
            place = torch.arange(weights.numel(), device=device).view(weights.shape)
        else:
            place = image.grid.place.to(device)
        is_patch = place >= 0
        counts: list[int | None] = [None] * len(weights)
        if budget is not None:
            total = self.retained_count(image.grid or image.num_tokens, budget)
            counts = split_budget(torch.ones(len(weights)), total, is_patch.sum(1)).tolist()
        inside = image.states is not None and image.project is not None
        values, source = [], []
        for tile, count in enumerate(counts):
            if count == 0:
                continue
            own = is_patch[tile]
            hidden = image.states[tile, -tokens:][own] if inside else image.features[place[tile, own]]
            keys = image.keys[tile, -tokens:][own].flatten(1) if inside else hidden
            folded = self._fold(hidden, weights[tile, own], keys, count)
            values.append(folded.tokens)
            source.append(
                F.pad(place[tile, own][folded.kept], (0, len(folded.tokens) - len(folded.kept)), value=-1)
            )
        merged = torch.cat(values)
        if inside:
            return image.arranged(image.project(merged), torch.cat(source), in_place=not image.renumbered)
        return image.arranged(merged, torch.cat(source), in_place=True)

    def _chosen(self, weight: Tensor, count: int) -> Tensor:
        """`count` places by falling attention [n]; of `plus` a quarter so, and the rest at even distances."""
        order = top_k(weight, count)
        if not self.plus:
            return order
        best = order[: (count + 3) // 4]
        rest = torch.ones_like(weight, dtype=torch.bool).index_fill(0, best, False) & (weight > -torch.inf)
        rest = rest.nonzero().squeeze(1)
        return torch.cat([best, rest[uniform(len(rest), min(count - len(best), len(rest)), rest.device)]])

    def _fold(self, hidden: Tensor, weight: Tensor, keys: Tensor, count: int | None) -> Folded:
        """One tile, with the paper's number of tokens or `count` of them, the last of which sums the rest."""
        kept = None if count is None else self._chosen(weight, count - 1)
        folded = prumerge(hidden, weight, keys, plus=self.plus, neighbours=self.neighbours, kept=kept)
        # Where all stay, none are left to sum.
        return Folded(folded.kept, folded.tokens[: len(hidden)])
