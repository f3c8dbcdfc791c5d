"""H2O: evict the tokens that have received the least attention, and keep the newest."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ..algorithms.heavy_hitters import favour_recent
from ..reducer import CacheReducer, CacheTokens


@dataclass(kw_only=True)
class H2O(CacheReducer):
    """H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models (Zhang et al.,
    NeurIPS 2023, arXiv 2306.14048), for visual tokens.

    In every layer and key head the `recent` last visual tokens stay, and of the others the `heavy` ones with
    the highest sum of attention from all tokens of the prompt. Both are shares of the prompt's visual tokens
    or counts; `keep` sets their sum, and divides it as they are. Generated tokens always stay, so nothing is
    evicted after the prompt. With `per_head=False` the heads of a layer keep the same tokens. The images of a
    prompt share one budget, unless `per_image`.

    Raises ValueError for shares and counts below 0, shares above 1, and for two zeros.
    """

    summary: ClassVar = "attention summed over the prompt, and the newest"
    paper: ClassVar = "arXiv 2306.14048"
    verified: ClassVar = "kept sets and scores equal, five steps"

    heavy: float | int = 0.1
    recent: float | int = 0.1
    per_head: bool = True
    per_image: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("heavy", "recent"):
            value = getattr(self, name)
            share = isinstance(value, float) and 0 <= value <= 1
            if not share and (isinstance(value, bool | float) or not isinstance(value, int) or value < 0):
                raise ValueError(f"{name} is {value!r}; it takes a share from 0.0 to 1.0 or a count from 0")
        if not self.heavy and not self.recent:
            raise ValueError("heavy and recent are both 0, which keeps no token; raise one of them")

    def default_count(self, tokens: int) -> int:
        """Heavy and recent tokens together, at least 1 and at most all."""
        return min(tokens, max(1, sum(round(size) for size in self._sizes(tokens))))

    def _sizes(self, tokens: int) -> tuple[float, float]:
        heavy, recent = (
            size * tokens if isinstance(size, float) else size for size in (self.heavy, self.recent)
        )
        return heavy, recent

    def attention_scores(self, layer: int) -> Callable[[Tensor], Tensor]:
        """Attention itself."""
        return partial(torch.softmax, dim=-1)

    def rank(self, tokens: CacheTokens) -> Tensor:
        """The attention received, and infinity for the newest tokens, [H_k, N] or [N]."""
        received = tokens.received if self.per_head else tokens.received.sum(0)
        heavy, recent = self._sizes(received.shape[-1])
        return favour_recent(received, round(tokens.count * recent / (heavy + recent)))
