"""LazyLLM: every step selects anew, and what was dropped may return."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from ..reducer import LayerReducer, LayerTokens, scaled_layers, share_by_layer


@dataclass(kw_only=True)
class LazyLLM(LayerReducer):
    """LazyLLM: Dynamic Token Pruning for Efficient Long Context LLM Inference (Fu et al., 2024, arXiv
    2407.14057), for visual tokens.

    Before each layer of `prune_layers` (0-based) the share of `prune_ratios` of an image's tokens still left
    is dropped: those with the least attention from the last token in the layer before, mean over heads. The
    default drops 30% of them after 30%, 60% and 90% of the layers, as in the paper's illustration; no code
    was published. `keep` sets the share or count behind the last cut, and the others follow.

    Every token of the answer selects anew, from all visual tokens and with its own attention: a token that
    was dropped for an earlier one returns, from the states with which it left, and each layer computes it at
    most once. Text is never dropped. So the prompt gets cheaper and no picture is lost for good; the cache
    grows by what returns.
    """

    summary: ClassVar = "the last token's attention, anew at each step"
    paper: ClassVar = "arXiv 2407.14057"

    prune_layers: Sequence[int] = (10, 19, 29)
    prune_ratios: Sequence[float] = (0.3, 0.3, 0.3)

    rows: ClassVar = "last"
    rows_of: ClassVar = "previous"
    revives: ClassVar = True

    def __post_init__(self) -> None:
        super().__post_init__()
        wrong = [ratio for ratio in self.prune_ratios if not 0 <= ratio < 1]
        if wrong:
            raise ValueError(f"prune_ratios holds {wrong[0]}; it takes shares to drop, from 0 up to below 1")
        self.cuts(0)  # refuses lists of different length

    def cuts(self, num_layers: int) -> dict[int, float]:
        """The share of all the image's tokens that is left behind each of the layers."""
        ratios = share_by_layer(prune_layers=self.prune_layers, prune_ratios=self.prune_ratios)
        left, cuts = 1.0, {}
        for layer, ratio in ratios.items():
            left *= 1 - ratio
            cuts[layer] = left
        return cuts

    def fitted(self, num_layers: int) -> "LazyLLM":
        """A copy that drops at the same relative depths, for a model with too few layers."""
        if max(self.prune_layers, default=0) < num_layers:
            return self
        return replace(self, prune_layers=scaled_layers(self.prune_layers, num_layers))

    def own_count(self, tokens: LayerTokens) -> int:
        """Of the tokens still left, the share to drop is rounded down."""
        ratio = share_by_layer(prune_layers=self.prune_layers, prune_ratios=self.prune_ratios)[tokens.layer]
        return len(tokens.hidden) - int(len(tokens.hidden) * ratio)

    def score(self, tokens: LayerTokens) -> Tensor:
        """Attention of the last token [N]."""
        return tokens.attention
