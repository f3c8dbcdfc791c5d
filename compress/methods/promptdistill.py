"""PromptDistill: keep what the last prompt token's query points at."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from ..algorithms.prompt_logits import prompt_scores
from ..reducer import LayerReducer, LayerTokens, scaled_layers, share_by_layer


@dataclass(kw_only=True)
class PromptDistill(LayerReducer):
    """PromptDistill: Query-based Selective Token Retention in Intermediate Layers for Efficient Large
    Language Model Inference (Jin et al., 2025, arXiv 2503.23274), for visual tokens.

    After each layer of `select_layers` (0-based) as many of an image's tokens as `keep_tokens` states go on:
    those with the largest dot products with the last prompt token's query in that layer, mean over heads,
    without soft-max. With `pool` each product is averaged with its four neighbours in the image. An image of
    no more tokens stays whole; `keep` sets the share or count after the last of the layers, and the other
    numbers follow. The first `cache_truncation_end` selections also cut the caches of the layers up to their
    own to the same tokens (-1: all, 0: none).
    """

    summary: ClassVar = "the last query's raw products"
    paper: ClassVar = "arXiv 2503.23274"
    verified: ClassVar = "logits and scores 1.2e-7, picks equal"

    select_layers: Sequence[int] = (13,)
    keep_tokens: Sequence[int] = (1024,)
    pool: bool = True
    cache_truncation_end: int = 0

    rows: ClassVar = "last"
    rows_of: ClassVar = "previous"
    softmax: ClassVar = False

    def __post_init__(self) -> None:
        super().__post_init__()
        stages = len(self.cuts(0))  # refuses lists of different length
        if not -1 <= self.cache_truncation_end <= stages:
            raise ValueError(
                f"cache_truncation_end is {self.cache_truncation_end}; it takes a number of selections from "
                f"0 to {stages}, or -1 for all"
            )

    def cuts(self, num_layers: int) -> dict[int, int]:
        """A cut behind each selecting layer."""
        counts = share_by_layer(select_layers=self.select_layers, keep_tokens=self.keep_tokens)
        return {layer + 1: count for layer, count in counts.items()}

    def truncated(self, num_layers: int) -> tuple[int, ...]:
        """The first cuts, as many as `cache_truncation_end`."""
        cuts = tuple(self.cuts(num_layers))
        return cuts if self.cache_truncation_end < 0 else cuts[: self.cache_truncation_end]

    def fitted(self, num_layers: int) -> "PromptDistill":
        """A copy that selects at the same relative depths, for a model with too few layers."""
        cuts = tuple(self.cuts(num_layers))
        if max(cuts, default=0) < num_layers:
            return self
        return replace(self, select_layers=tuple(cut - 1 for cut in scaled_layers(cuts, num_layers)))

    def count(self, share: float, tokens: int) -> int:
        """The share of the tokens, rounded."""
        return round(tokens * share)

    def score(self, tokens: LayerTokens) -> Tensor:
        """The products, pooled over the image [N]."""
        return prompt_scores(tokens.attention[None], pool=self.pool)[0]
