"""FastV: after a few layers, drop the tokens with the least attention from the last prompt token."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..reducer import LayerReducer, LayerTokens


@dataclass(kw_only=True)
class FastV(LayerReducer):
    """An Image is Worth 1/2 Tokens After Layer 2 (Chen et al., ECCV 2024, arXiv 2403.06764).

    Before layer `k` (0-based) a share `r` of the visual tokens is dropped: those with the least attention
    from the last prompt token in layer k - 1, mean over heads. `keep` sets 1 - r. The set is chosen once, at
    prefill.
    """

    summary: ClassVar = "last row's attention, once"
    paper: ClassVar = "arXiv 2403.06764"
    verified: ClassVar = "kept set equal, logits 5.0e-6, three decode steps"

    k: int = 2
    r: float = 0.5

    rows: ClassVar = "last"
    rows_of: ClassVar = "previous"

    def cuts(self, num_layers: int) -> dict[int, float]:
        """One cut, before layer k."""
        return {self.k: 1 - self.r}

    def count(self, share: float, tokens: int) -> int:
        """The share of the tokens, rounded."""
        return round(tokens * share)

    def score(self, tokens: LayerTokens) -> Tensor:
        """Attention of the last prompt token [N]."""
        return tokens.attention
