"""Zero-TPrune: drops tokens that resemble more important ones, then those that matter least."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..algorithms.grid import Grid
from ..algorithms.merge import Matching
from ..algorithms.page_rank import (
    filtered_heads,
    head_mean,
    page_rank,
    prune_similar,
    pruned_matching,
    subgraph,
    without,
)
from ..algorithms.select import top_k
from ..attention import attention_rows
from ..reducer import TowerAttention, VisionReducer

PUBLISHED_BLOCKS = 12
"""Blocks of the vision transformers that the default `layers` are for."""


@dataclass(kw_only=True)
class ZeroTPrune(VisionReducer):
    """Zero-TPrune: Zero-Shot Token Pruning through Leveraging of the Attention Graph in Pre-Trained
    Transformers (Wang et al., 2024, arXiv 2305.17328).

    Tokens go after each of the blocks `layers` (of 12, 0-based; the same relative depth elsewhere). `r`
    less important tokens that resemble a more important one go first, ranked by one iteration of a weighted
    page rank on the block's attention. Of the rest, those with the highest rank stay: `retention` of them
    (one rate, or one per layer). With `keep`, the patches left at the end, counts fall evenly from layer to
    layer, and of the tokens that a layer drops the first `r` are the similar ones. `iterations` of the page
    rank are those in the first three blocks, the middle ones and the last three; `epsilon` ends them earlier
    once no score changes by as much. `uniform`: all tokens start with equal scores ("Zero-TPrune-uni");
    otherwise, in towers that have a class token, it starts √N times as high. Heads whose scores vary by less
    than `v_min` or more than `v_max` do not count. Class, distillation and register tokens stay.

    The authors published no code, so this is written from the paper. Assumptions where it is silent or
    contradicts itself: the update is that of the paper's algorithm box, s ← Aᵀs; the variance of a head is
    that of N · s, whose mean is 1, and all heads count where none passes; the rank after the similar tokens
    have gone uses the attention among those that are left, each row scaled to sum 1; tokens go after a whole
    block, by its attention and its mean keys over heads. The defaults of `layers` and `retention` are not the
    paper's: with them DeiT-S needs about a third less computation, as in its main result.
    """

    summary: ClassVar = "drops what resembles important patches or matters least in the tower"
    paper: ClassVar = "arXiv 2305.17328"
    verified: ClassVar = "ranks, partition and kept sets equal the paper's formulas"
    where: ClassVar = "layer"
    prunes: ClassVar[bool] = True
    reads_attention: ClassVar[bool] = True

    layers: Sequence[int] = (1, 3, 6, 9)
    r: int = 10
    retention: float | Sequence[float] = 0.85
    iterations: tuple[int, int, int] = (30, 5, 1)
    epsilon: float | None = None
    v_min: float = 0.01
    v_max: float = 0.7
    uniform: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        layers = list(self.layers)
        if not layers or layers != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= PUBLISHED_BLOCKS:
            raise ValueError(
                f"layers is {self.layers}; give different blocks from 0 to {PUBLISHED_BLOCKS - 1}, ascending"
            )
        if not all(0 < rate <= 1 for rate in self._rates()):
            raise ValueError(f"retention is {self.retention}; a layer keeps a share in (0, 1] of its tokens")
        if len(self._rates()) != len(layers):
            raise ValueError(
                f"retention has {len(self._rates())} rates and layers {len(layers)} blocks; give one rate, "
                "or one per block"
            )
        if self.r < 0:
            raise ValueError(f"r is {self.r}; it is a number of tokens, 0 or more")
        if len(self.iterations) != 3 or min(self.iterations) < 1:
            raise ValueError(
                f"iterations is {self.iterations}; give three numbers of at least 1, for the first three "
                "blocks, those between, and the last three"
            )

    def plan(self, num_blocks: int, num_tokens: int, prefix: int, keep: int | None) -> list[int]:
        """Tokens dropped after each of `num_blocks` blocks, from `num_tokens` patches to `keep` of them."""
        rates = dict(zip(self.layers, self._rates(), strict=True))
        plan, left, layers = [0] * num_blocks, num_tokens, self._scaled(num_blocks)
        for number, (block, layer) in enumerate(layers.items(), 1):
            if keep is not None:
                target = round(num_tokens * (keep / num_tokens) ** (number / len(layers)))
            else:
                rest = left - min(self.r, left // 2)
                target = max(1, round(rest * rates[layer]))
            plan[block], left = left - target, target
        return plan

    def match(
        self,
        block: int,
        num_blocks: int,
        metric: Tensor,
        r: int,
        prefix: int,
        attention: TowerAttention | None = None,
    ) -> Matching:
        """Drop r tokens by the mean key over heads, `metric` [B, N, D], and the block's `attention`.

        Raises ValueError without the attention.
        """
        if attention is None:
            raise ValueError("Zero-TPrune ranks tokens by a block's attention; give match that attention")
        weights = attention.weights
        starts_high = attention.class_token and not self.uniform
        importance = self._importance(weights, 1, starts_high)
        similar = prune_similar(importance, metric, min(self.r, r), prefix).pruned
        kept = without(metric.shape[1], similar)
        rest = r - similar.shape[1]
        if rest:
            iterations = self._iterations(block, num_blocks)
            importance = self._importance(subgraph(weights, kept), iterations, starts_high)
            best = top_k(importance[:, prefix:], kept.shape[1] - prefix - rest).sort(-1).values + prefix
            first = torch.arange(prefix, device=best.device).expand(len(best), -1)
            kept = kept.gather(1, torch.cat([first, best], 1))
        return pruned_matching(metric, kept, prefix)

    def select(self, features: Tensor, grid: Grid | None, count: int, scores: Tensor | None = None) -> Tensor:
        """Without a tower: the tokens to keep as a mask [N] with exactly `count` True, as in the block after
        `layers[0]`. `scores` is the attention among them [H, N, N]; without it, that of one head whose
        queries and keys are the features [N, D] themselves. The grid is not used."""
        if scores is None:
            rows = features[None, None]
            scores = attention_rows(rows, rows)[0]
        tokens = len(features)
        mask = torch.zeros(tokens, dtype=torch.bool, device=features.device)
        attention = TowerAttention(scores[None], class_token=False)
        matching = self.match(
            self.layers[0], PUBLISHED_BLOCKS, features[None], tokens - count, 0, attention=attention
        )
        mask[matching.kept[0]] = True
        return mask

    def _rates(self) -> list[float]:
        one = isinstance(self.retention, int | float)
        return [self.retention] * len(self.layers) if one else list(self.retention)

    def _scaled(self, num_blocks: int) -> dict[int, int]:
        """Block of a tower with `num_blocks` → the one of `layers` that is at the same relative depth."""
        return {layer * num_blocks // PUBLISHED_BLOCKS: layer for layer in self.layers}

    def _iterations(self, block: int, num_blocks: int) -> int:
        first, middle, last = self.iterations
        return first if block < 3 else last if block >= num_blocks - 3 else middle

    def _importance(self, weights: Tensor, iterations: int, starts_high: bool) -> Tensor:
        """Importance [B, N] in the graph [B, H, N, N]."""
        scores = page_rank(weights, iterations, class_token=starts_high, epsilon=self.epsilon)
        return head_mean(scores, filtered_heads(scores, self.v_min, self.v_max))
