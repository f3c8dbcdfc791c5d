"""SparseVLM: tokens of the text rate those of the image, and some of the dropped ones go on in means."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..algorithms.raters import text_raters, undecayed_attention
from ..algorithms.recycling import density_peaks, mean_count, recycled_count, split_count
from ..reducer import LayerReducer, LayerSelection, LayerTokens, scaled_layers, share_by_layer

TOKENS = 576
"""Visual tokens of the images that the published numbers are for."""
RETAINED = {
    "1.5": {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
    "2.0": {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}
"""Version of the code → tokens averaged over the layers → tokens kept at each cut."""
HEADS = 14
"""Heads that version 2.0 reads."""


@dataclass(kw_only=True)
class SparseVLM(LayerReducer):
    """SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference (Zhang et al.,
    ICML 2025, arXiv 2410.04417).

    Raters are the tokens of the text after the image that match the image's embeddings more than the mean.
    Before the layers of `pruning_loc` (0-based) those tokens stay that get the most attention from the raters
    in the layer before, mean over heads and raters. `retained_tokens` is the average over the layers for
    which numbers are published (192, 128, 96 or 64 of 576), or the number per cut; images of other sizes keep
    the same shares. `keep` sets the last share, means included, and scales the others.

    `version` "1.5" of the code renumbers positions (`positions="paper"`). With `recycle` the best 30 % of the
    dropped tokens go on in it, as means of clusters of about ten, behind the kept ones. Version "2.0"
    recycles nothing and keeps positions; it reads the 14 heads that attend to the image most, and divides
    attention by its decay with rotary distance (and raises ValueError where that is not positive: for heads
    of width 128 and a rotary base of 10,000, beyond 1,706 tokens). With `scale` the number that a cut drops
    is, as in the paper, that factor times what the tokens exceed the rank of the raters' attention by.
    """

    summary: ClassVar = "rated by the text, dropped ones recycled"
    paper: ClassVar = "arXiv 2410.04417"
    verified: ClassVar = "raters and kept set equal, means 2.4e-7"

    version: Literal["1.5", "2.0"] = "1.5"
    retained_tokens: int | Sequence[int] = 192
    pruning_loc: Sequence[int] = (2, 6, 15)
    recycle: bool = True
    scale: float | None = None

    rows: ClassVar = "raters"
    rows_of: ClassVar = "previous"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.version not in RETAINED:
            raise ValueError(f"version is {self.version!r}; it takes {' or '.join(map(repr, RETAINED))}")
        published = RETAINED[self.version]
        if isinstance(self.retained_tokens, int) and self.retained_tokens not in published:
            raise ValueError(
                f"retained_tokens is {self.retained_tokens}; numbers are published for "
                f"{', '.join(map(str, published))}. Give one of these, the number of tokens per cut, or keep"
            )
        if self.scale is not None and not 0 < self.scale <= 1:
            raise ValueError(f"scale is {self.scale}; it takes a factor above 0 and up to 1, or None")
        self.cuts(0)  # refuses lists of different length

    @property
    def merges(self) -> bool:
        """Whether dropped tokens go on in means."""
        return self.recycle and self.version == "1.5"

    @property
    def paper_positions(self) -> Literal["keep", "compact"]:
        """Version 1.5 numbers tokens anew."""
        return "compact" if self.version == "1.5" else "keep"

    @property
    def wants_decay(self) -> bool:
        """Whether `LayerTokens.decay` is needed."""
        return self.version == "2.0"

    def cuts(self, num_layers: int) -> dict[int, float]:
        """A cut before each layer of the list, with its share of 576 tokens."""
        counts = self.retained_tokens
        counts = RETAINED[self.version][counts] if isinstance(counts, int) else counts
        return share_by_layer(
            pruning_loc=self.pruning_loc, retained_tokens=[count / TOKENS for count in counts]
        )

    def fitted(self, num_layers: int) -> "SparseVLM":
        """A copy that cuts at the same relative depths, for a model with too few layers."""
        if max(self.pruning_loc, default=0) < num_layers:
            return self
        return replace(self, pruning_loc=scaled_layers(self.pruning_loc, num_layers))

    def count(self, share: float, tokens: int) -> int:
        """The share of the tokens, rounded."""
        return round(tokens * share)

    def raters(self, image: Tensor, text: Tensor) -> Tensor:
        """The text tokens that match the image more than the mean."""
        return text_raters(image, text)

    def own_count(self, tokens: LayerTokens) -> int | None:
        """With `scale`, what stays when as many tokens go as their number exceeds the rank of the raters'
        attention by, times the factor."""
        if self.scale is None:
            return None
        number = len(tokens.hidden)
        rank = int(torch.linalg.matrix_rank(tokens.rows.mean(0)))
        return max(1, number - int(self.scale * (number - rank)))

    def score(self, tokens: LayerTokens) -> Tensor:
        """Attention from the raters [N]."""
        if self.version == "1.5":
            return tokens.attention
        return undecayed_attention(tokens.rows, tokens.decay, HEADS)

    def select(self, tokens: LayerTokens, count: int) -> LayerSelection:
        """The tokens with the most attention from the raters, and means of the best of the others."""
        if not self.merges:
            return super().select(tokens, count)
        number = len(tokens.hidden)
        if tokens.exact:
            kept_count, means = split_count(number, count)
        else:
            kept_count = min(count, number - 1)
            means = mean_count(recycled_count(number - kept_count))
        score = self.score(tokens)
        tokens.record("score", score)
        order = tokens.ranked(score)
        kept, dropped = order[:kept_count].sort().values, order[kept_count:]
        if not means:
            return LayerSelection(kept)
        members = dropped[: recycled_count(len(dropped))].sort().values
        groups = density_peaks(tokens.hidden[members.to(tokens.hidden.device)], means)
        return LayerSelection(kept, members, groups)
